"""The policy: a Megatron-Core GPTModel over branch layouts, returning log-probs where a target has a predecessor.

    PackedRow ──► PolicyChunk.forward ──► ... ──► log_probs [1, M], or with the entropy [2, M], from the last chunk (hidden
    states from the others)

A rank holds `parallel.vpp` chunks of layers (one without interleaving): chunk c of stage s is virtual stage c * pp + s.

Shape legend: T tokens of a row, M trained tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional

from megatron_npr.config import Fp8Settings, ParallelSettings, Recompute
from megatron_npr.hf.huggingface import HuggingFaceWeights
from megatron_npr.model.context_parallel import shard_bounds
from megatron_npr.model.experts import Router, mark_expert_weights
from megatron_npr.model.fp8_linears import LinearConfig
from megatron_npr.model.fp8_parameters import fill, plain_or_fp8
from megatron_npr.model.layers import LayoutRotaryEmbedding, RMSNorm, layer_spec
from megatron_npr.model.linears import (
    LinearModules,
    fp8_options,
    fuses_gradients,
    layer_linears,
    linear_modules,
)
from megatron_npr.model.log_probs import token_log_probs
from megatron_npr.runtime.process_world import World, megatron_context, on_every_rank
from megatron_npr.sharding.catalog import catalog
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, check_layouts, split_layers
from megatron_npr.sharding.weights import global_name, padded_vocabulary, shard
from npr_engine.model.transformer import ModelConfig
from npr_ext import BranchLayout
from npr_ext.errors import UserError


def unused_rows(unused_ids: Sequence[int], vocab_size: int, world: World) -> Tensor:
    """int64 [U]: rows of this rank's part of the vocabulary that no token has, those that make the parts equal included."""
    padded = padded_vocabulary(vocab_size, world.tp_size)
    share = padded // world.tp_size
    local = torch.tensor([*unused_ids, *range(vocab_size, padded)], dtype=torch.int64) - world.tp_rank * share
    return local[(local >= 0) & (local < share)]


class PolicyChunk(GPTModel):
    """GPTModel (or some layers of one) whose positions come from the batch and whose last chunk gives log-probs."""

    def __init__(
        self,
        *,
        model_config: ModelConfig,
        world: World,
        unused_ids: Sequence[int] = (),
        entropy_coefficient: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        unused_U = unused_rows(unused_ids, model_config.vocab_size, world)
        self.register_buffer("unused_U", unused_U, persistent=False)
        self.model_config = model_config
        self.world = world
        self.entropy_coefficient = entropy_coefficient
        # Megatron's own module counts positions 0..T-1 and ignores position_ids; ours reads them.
        self.rotary_pos_emb = LayoutRotaryEmbedding(model_config)

    def logits(self, token_ids: Tensor, layout_5T: Tensor) -> Tensor:
        """Vocab-parallel logits [1, T / cp, V / tp] of this rank's share (last stage); for tests and small models. With
        experts, call it within `megatron_context`."""
        own = slice(*self._own_tokens(token_ids))
        output: Tensor = self(token_ids[:, own], layout_5T[:1, own], layout_5T)
        return output

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        *,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """GPTModel's, of this rank's share of a row; `padding_mask` bool [1, T / cp]: what its routers do not count."""
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron shards it beside the embeddings, so on the first stage alone.
            padding_mask = padding_mask.chunk(self.world.tp_size, dim=1)[self.world.tp_rank]
        output: Tensor = super().forward(
            input_ids, position_ids, attention_mask, padding_mask=padding_mask, **kwargs
        )
        return output

    @property
    def head_weight(self) -> Tensor:
        """Rows of the vocabulary that the hidden states are multiplied with, [V / tp, D] (last stage)."""
        # Untied, Megatron's method of that name gives the input embedding wherever this chunk has one.
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _own_tokens(self, token_ids: Tensor) -> tuple[int, int]:
        return shard_bounds(token_ids.shape[1], self.world.cp_rank, self.world.cp_size)

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        *args: Any,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(
                hidden_states,
                input_ids,
                position_ids,
                labels,
                *args,
                loss_mask=loss_mask,
                attention_mask=attention_mask,
                **kwargs,
            )
            return output
        assert loss_mask is not None and attention_mask is not None
        return self._target_log_probs(hidden_states, labels, loss_mask, attention_mask)

    def _target_log_probs(
        self, hidden: Tensor, token_ids: Tensor, targets: Tensor, layout_5T: Tensor
    ) -> Tensor:
        begin, _ = self._own_tokens(token_ids)
        predecessors = BranchLayout.from_tensor(layout_5T).predecessor[targets].long() - begin
        if self.config.sequence_parallel:
            hidden_TBD = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden_TBD = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        weight = self.head_weight
        log_probs_M, entropy_M = token_log_probs(
            # Not [predecessors]: siblings share one, and its gradient is summed by atomics, in the order of the threads.
            hidden_TBD[:, 0].index_select(0, predecessors),
            weight,
            token_ids[0, targets],
            first_row=self.world.tp_rank * weight.shape[0],
            unused_U=self.unused_U,
            group=self.world.tp_group,
            entropy=self.entropy_coefficient is not None,
        )
        if entropy_M is None:
            return log_probs_M[None]
        # Only watched, it has no gradient: detached here, backward does not compute one of zeros.
        return torch.stack((log_probs_M, entropy_M if self.entropy_coefficient else entropy_M.detach()))


class Policy(torch.nn.ModuleList):
    """This rank's chunks of the policy, and where it stands in the grid."""

    def __init__(self, chunks: Sequence[PolicyChunk], layout: TrainerLayout) -> None:
        super().__init__(chunks)
        self.chunks, self.layout = tuple(chunks), layout

    @property
    def config(self) -> LinearConfig:
        """Megatron's configuration, one object for all chunks."""
        return self.chunks[0].config

    @property
    def model_config(self) -> ModelConfig:
        return self.chunks[0].model_config

    @property
    def world(self) -> World:
        return self.chunks[0].world

    @property
    def routers(self) -> list[Router]:
        """Those of this rank's layers with experts."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @property
    def entropy_coefficient(self) -> float | None:
        """Weight of the entropy bonus in the loss; None: the entropy is not computed."""
        return self.chunks[0].entropy_coefficient

    def logits(self, token_ids: Tensor, layout_5T: Tensor) -> Tensor:
        """See `PolicyChunk.logits`; without pipeline stages."""
        (whole,) = self.chunks
        return whole.logits(token_ids, layout_5T)


RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    # Attention keeps O(T) already; the widest activations are the MLP's.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    model: ModelConfig,
    world: World,
    *,
    dtype: torch.dtype,
    parallel: ParallelSettings,
    recompute: Recompute = "none",
    router_aux_loss: float = 0.0,
    fp8: Fp8Settings | None = None,
    linears: LinearModules | None = None,
) -> LinearConfig:
    """Megatron's configuration of a model in this world; `linears`: the device's by default."""
    linears = linears or linear_modules(world.device, fp8=fp8 is not None)
    for name, count in (
        ("num_attention_heads", model.num_heads),
        ("num_key_value_heads", model.num_kv_heads),
    ):
        if count % world.tp_size:
            raise UserError(
                f"parallel.tp {world.tp_size} does not divide the model's {name} {count}: choose a divisor"
            )
    return LinearConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_te_activation_func=linears.activation is not None,  # the name means: a module, whoever's
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fuses_gradients(world.device),
        use_cpu_initialization=world.device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=world.tp_size,
        pipeline_model_parallel_size=world.pp_size,
        virtual_pipeline_model_parallel_size=world.vpp_size if world.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_layers,
        num_layers_in_last_pipeline_stage=parallel.last_layers,
        context_parallel_size=world.cp_size,
        sequence_parallel=parallel.sequence_parallel and world.tp_size > 1,
        calculate_per_token_loss=True,
        mrope_section=[model.head_dim // 2, 0, 0],
        softmax_scale=_softmax_scale(model),
        perform_initialization=True,
        # The overlapped schedule frees outputs before their send has ended: NCCL's stream orders that, gloo reads garbage.
        deallocate_pipeline_outputs=world.vpp_size == 1 or world.device.type == "cuda",
        # Interleaved chunks send both ways between the same two ranks: one batch of messages would mix them up under pp 2.
        overlap_p2p_comm=world.vpp_size > 1,
        batch_p2p_comm=world.vpp_size == 1,
        **(
            RECOMPUTE[recompute]
            | (_moe_settings(model, world, recompute, router_aux_loss, linears) if model.num_experts else {})
            | (fp8_options(fp8, linears, num_layers=model.num_layers, stages=world.pp_size) if fp8 else {})
        ),
    )


def _softmax_scale(model: ModelConfig) -> float | None:
    """1 / sqrt(H) (None), times the factor that stretched RoPE gives to queries and to keys: Megatron rotates without it."""
    if model.rope_scaling is None:
        return None
    return model.rope_scaling.attention_factor**2 / math.sqrt(model.head_dim)


def _moe_settings(
    model: ModelConfig, world: World, recompute: Recompute, router_aux_loss: float, linears: LinearModules
) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts: no token is dropped, the router computes in fp32."""
    settings: dict[str, Any] = {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.experts_per_token,
        # softmax over the chosen experts alone IS softmax over all of them, divided by the sum of the chosen
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # Megatron's own; ours is `load_balance`
        "moe_aux_loss_coeff": router_aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": linears.grouped is not None,
        "expert_model_parallel_size": world.ep_size,
        "expert_tensor_parallel_size": 1,
    }
    return settings | ({"recompute_modules": ["moe"]} if recompute == "selective" else {})


NO_AXES = ParallelSettings()


def trainer_layout(model: ModelConfig, world: World, parallel: ParallelSettings) -> TrainerLayout:
    """The grid of this world; UserError where the layers cannot be split so."""
    return TrainerLayout(
        layers=split_layers(
            model.num_layers,
            pp=world.pp_size,
            vpp=world.vpp_size,
            first=parallel.first_layers,
            last=parallel.last_layers,
        ),
        tp=world.tp_size,
        pp=world.pp_size,
        dp_cp=world.cp_size * world.dp_size,
        ep=world.ep_size,
    )


def build_policy(
    model: ModelConfig,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelSettings = NO_AXES,
    recompute: Recompute = "none",
    router_aux_loss: float = 0.0,
    fp8: Fp8Settings | None = None,
    unused_ids: Sequence[int] = (),
    entropy_coefficient: float | None = None,
    linears: LinearModules | None = None,
) -> Policy:
    """The policy's part on this rank, randomly initialised; the sizes of the axes are those of `world`, `parallel` tells how
    layers and activations go with them. `unused_ids` are the vocabulary's rows that no token has (Vocabulary.unused_ids): they
    take no probability. With an `entropy_coefficient` the entropy is computed beside the log-probs, with
    gradient unless it is 0. `linears`: the device's by default."""
    linears = linears or linear_modules(world.device, fp8=fp8 is not None)
    layout = trainer_layout(model, world, parallel)
    check_layouts(model, layout, EngineLayout())
    if model.num_experts and world.tp_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "a model with experts under parallel.tp >= 2 needs parallel.sequence_parallel = true: Megatron dispatches "
            "sharded tokens"
        )
    config = transformer_config(
        model,
        world,
        dtype=dtype,
        parallel=parallel,
        recompute=recompute,
        router_aux_loss=router_aux_loss,
        fp8=fp8,
        linears=linears,
    )
    with megatron_context():
        chunks = [
            _build_chunk(
                model,
                world,
                config,
                linears,
                number,
                unused_ids,
                entropy_coefficient,
            )
            for number in range(world.vpp_size)
        ]
    return Policy([chunk.to(world.device) for chunk in chunks], layout)


def _build_chunk(
    model: ModelConfig,
    world: World,
    config: LinearConfig,
    linears: LinearModules,
    number: int,
    unused_ids: Sequence[int],
    entropy_coefficient: float | None,
) -> PolicyChunk:
    stage = _virtual_stage(world, number)
    first = get_transformer_layer_offset(config, vp_stage=stage, pp_rank=world.pp_rank)
    layers = range(first, first + get_num_layers_to_build(config, stage))
    chunk = PolicyChunk(
        model_config=model,
        world=world,
        unused_ids=unused_ids,
        entropy_coefficient=entropy_coefficient,
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[
                layer_spec(
                    qk_norm=model.qk_norm,
                    experts=model.num_experts > 0,
                    linears=layer_linears(linears, config, layer),
                )
                for layer in layers
            ],
            layer_norm=RMSNorm,
        ),
        vocab_size=padded_vocabulary(model.vocab_size, world.tp_size),
        max_sequence_length=1 << 30,  # positions come from the layout; nothing is sized by this
        pre_process=world.pp_rank == 0 and number == 0,
        post_process=world.is_last_stage and number == world.vpp_size - 1,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="mrope",
        rotary_base=model.rope_theta,
        vp_stage=stage,
    )
    mark_expert_weights(chunk, config)
    return chunk


def _virtual_stage(world: World, number: int) -> int | None:
    """A chunk's number as Megatron wants it: None without interleaving."""
    return number if world.vpp_size > 1 else None


def local_weights(policy: Policy) -> dict[str, Tensor]:
    """This rank's parameters by global name; the tensors themselves, no copies. Those held in FP8 are `fp8_parameters`'."""
    config, world = policy.config, policy.world
    named: dict[str, Tensor] = {}
    first_expert = world.ep_rank * (policy.model_config.num_experts // world.ep_size)
    for number, chunk in enumerate(policy.chunks):
        offset = get_transformer_layer_offset(
            config, vp_stage=_virtual_stage(world, number), pp_rank=world.pp_rank
        )
        named |= {
            global_name(name, first_layer=offset, first_expert=first_expert): plain_or_fp8(weight)
            for name, weight in chunk.named_parameters()
        }
    if policy.model_config.tied_embeddings:
        # With pipeline parallelism the last stage holds a copy of the tied embedding under the output layer's name.
        copy = named.pop("output_layer.weight", None)
        if copy is not None:
            named.setdefault("embedding.word_embeddings.weight", copy)
    return named


def load_policy_weights(policy: Policy, folder: Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder; UserError on every rank where one cannot. Collective."""
    world, listed = policy.world, catalog(policy.model_config)

    def load() -> None:
        with HuggingFaceWeights(folder, policy.model_config) as source, torch.no_grad():
            for name, weight in local_weights(policy).items():
                entry = listed[name]
                cut = entry.trainer_cut(policy.layout, world.rank)
                fill(weight, shard(source.full(name), entry.kind.matrix, *cut))

    on_every_rank(load)
