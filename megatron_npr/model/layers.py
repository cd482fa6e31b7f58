"""Megatron layers of the policy: our attention in the layer spec, Transformer Engine's parameter names everywhere.

`layer_spec()` puts `BranchAttention` where Megatron has dot-product attention. The linear layers own the norm before them
(`linear_qkv.layer_norm_weight`), as Transformer Engine's do, so a checkpoint does not know which implementation wrote it.

Shape legend: T tokens of the row, S of them this rank's share (T / cp), F those and the keys fetched for them, B = 1,
N heads, K key heads, H head dim, D hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_npr.model.context_parallel import KeyExchange, fetch_rows, plan_key_exchange
from megatron_npr.model.experts import experts_spec
from megatron_npr.model.linears import OWN, LinearModules, mark_sequence_parallel
from npr_engine.model.rotary import frequencies
from npr_engine.model.transformer import ModelConfig
from npr_ext import BranchLayout, branch_attention
from npr_ext.ops import differentiable


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dim, marked for sequence parallelism (torch's own is refused by Megatron there).

    Shapes: [..., D] -> [..., D]. Source: Zhang and Sennrich 2019, as in Qwen3.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return differentiable.rms_norm(hidden, self.weight, self.eps)


@dataclass(frozen=True)
class RowLayout:
    """What attention needs of a row: its layout and, under context parallelism, this rank's part in the exchange of keys."""

    layout: BranchLayout
    exchange: KeyExchange | None


class LayoutCache:
    """The last few layouts of a policy by the identity of the int32 [5, T] tensor that carried them through Megatron.

    All layers of a micro-batch (and its recompute) then share one derived attention plan and key exchange. The tensor itself
    is held, so its address cannot be reused while the entry lives.
    """

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[tuple[int, int], tuple[Tensor, RowLayout]] = OrderedDict()

    def get(self, layout_5T: Tensor, cp_group: dist.ProcessGroup | None) -> RowLayout:
        key = (layout_5T.data_ptr(), layout_5T.shape[-1])
        entry = self._entries.get(key)
        if entry is None:
            entry = (layout_5T, _row_layout(layout_5T, cp_group))
            self._entries[key] = entry
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return entry[1]


def _row_layout(layout_5T: Tensor, cp_group: dist.ProcessGroup | None) -> RowLayout:
    layout = BranchLayout.from_tensor(layout_5T)
    if cp_group is None:
        return RowLayout(layout, None)
    exchange = plan_key_exchange(layout, cp_group.rank(), cp_group.size())
    return RowLayout(exchange.shard.layout, exchange)


class BranchAttention(MegatronModule):
    """Megatron core attention over a branch layout; `attention_mask` carries the int32 [5, T] layout of the whole row.

    q [S, 1, N, H], k and v [S, 1, K, H] -> [S, 1, N * H]; heads are this tensor-parallel rank's share, the S tokens this
    context-parallel rank's (all T without). `layouts` is one for all layers of a policy.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layouts: LayoutCache,
    ) -> None:
        super().__init__(config=config)
        self.layouts = layouts
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        assert pg_collection is not None
        self.cp_group = pg_collection.cp if pg_collection.cp.size() > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        row = self.layouts.get(attention_mask, self.cp_group)
        key_SKH, value_SKH = key.squeeze(1), value.squeeze(1)
        if row.exchange is not None:
            assert self.cp_group is not None
            both_SC = torch.cat((key_SKH.flatten(1), value_SKH.flatten(1)), dim=1)
            both_FC = fetch_rows(both_SC, row.exchange, self.cp_group)
            key_SKH, value_SKH = (part.unflatten(1, key_SKH.shape[1:]) for part in both_FC.chunk(2, dim=1))
        output_SNH = branch_attention(
            query.squeeze(1), key_SKH, value_SKH, row.layout, scale=self.softmax_scale
        )
        return output_SNH.reshape(query.shape[0], 1, -1)


class LayoutRotaryEmbedding(torch.nn.Module):
    """RoPE angles from the batch's own position ids (Megatron's module counts 0..T-1 and ignores them).

    Called in the place of `MultimodalRotaryEmbedding`: position_ids [1, T] -> angles [T, 1, 1, H], fp32.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        # Kept a plain attribute: bf16 casts of the model must not round the frequencies.
        self.inverse_frequencies = frequencies(model)

    def forward(self, position_ids: Tensor, mrope_section: object = None, cp_group: object = None) -> Tensor:
        self.inverse_frequencies = self.inverse_frequencies.to(position_ids.device)
        angles = position_ids[0].float()[:, None] * self.inverse_frequencies[None, :]
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def layer_spec(
    layouts: LayoutCache, *, qk_norm: bool, experts: bool = False, linears: LinearModules = OWN
) -> ModuleSpec:
    """One transformer layer of Qwen3 (with norms of the heads), Qwen3-MoE (with experts), Qwen2.5 or Llama, with branch
    attention; `layouts` is one for all layers of a policy."""
    norm = RMSNorm if qk_norm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.norm_column,
                    core_attention=ModuleSpec(module=BranchAttention, params={"layouts": layouts}),
                    linear_proj=linears.row,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # Router and experts read the same normed states; the MLP of a dense layer owns its norm.
            pre_mlp_layernorm=RMSNorm if experts else IdentityOp,
            mlp=experts_spec(linears) if experts else _mlp_spec(linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_spec(linears: LinearModules) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=linears.norm_column, linear_fc2=linears.row, activation_func=linears.activation
        ),
    )
