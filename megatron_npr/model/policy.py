"""The policy: a Megatron-Core GPTModel over branch layouts, returning log-probs where a target has a predecessor.

    PackedRow ──► PolicyChunk.forward ──► ... ──► log_probs [1, M], or with the entropy [2, M], from the last chunk (hidden
    states from the others)

A rank holds `parallel.vpp` chunks of layers (one without interleaving): chunk c of stage s is virtual stage c * pp + s.

Shape legend: T tokens of a row, M trained tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_npr.model.context_parallel import shard_bounds
from megatron_npr.model.experts import Router
from megatron_npr.model.fp8_linears import LinearConfig
from megatron_npr.model.layers import LayoutRotaryEmbedding
from megatron_npr.model.log_probs import token_log_probs
from megatron_npr.runtime.process_world import World
from megatron_npr.sharding.layouts import TrainerLayout
from megatron_npr.sharding.weights import padded_vocabulary
from npr_engine.model.transformer import ModelConfig
from npr_ext import BranchLayout


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
        """Vocab-parallel logits [1, T / cp, V / tp] of this rank's share of a row; only without pipeline stages."""
        (whole,) = self.chunks
        return whole.logits(token_ids, layout_5T)
