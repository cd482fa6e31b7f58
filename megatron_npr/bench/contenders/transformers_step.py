"""A training step as a user would write it with transformers: SDPA, a dense mask and a pass for each sequence, AdamW.

sequence ─► branch layout ─► position ids, additive mask [T, T] ─► model ─► logits of the targets' predecessors ─► token mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from npr_engine.model.architecture import ModelConfig
from npr_ext import branch_layout
from npr_ext.testing import TAGS


def model_of(shape: ModelConfig, *, positions: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of this shape with tied embeddings, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        num_hidden_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).to(dtype)


@dataclass(frozen=True)
class _Sequence:
    """ids int64 [1, T], positions [1, T], mask [1, 1, T, T]; targets [M] and what predicts them, predecessors [M]."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    predecessors: Tensor


class TransformersTrainer:
    """Updates of a transformers model on branch layouts, one sequence a pass, clipped at norm 1."""

    def __init__(
        self, model: LlamaForCausalLM, sequences: Sequence[tuple[Tensor, int]], *, lr: float
    ) -> None:
        """`sequences`: token ids [T] and the length of the prompt, which is not trained on."""
        self._model = model.train()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        self._sequences = [_prepared(ids, prompt, model.dtype) for ids, prompt in sequences]
        self._num_targets = sum(len(one.targets) for one in self._sequences)

    def step(self) -> float:
        """One update; the loss before it, the mean over all targets."""
        self._optimizer.zero_grad()
        total = 0.0
        for one in self._sequences:
            states = self._model.model(
                input_ids=one.ids, position_ids=one.positions, attention_mask=one.mask
            ).last_hidden_state[0]
            logits = self._model.lm_head(states[one.predecessors]).float()
            loss = functional.cross_entropy(logits, one.ids[0, one.targets], reduction="sum")
            (loss / self._num_targets).backward()
            total += float(loss) / self._num_targets
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return total


def _prepared(ids: Tensor, prompt: int, dtype: torch.dtype) -> _Sequence:
    layout = branch_layout(ids, tags=TAGS, prompt_lengths=prompt)
    targets = torch.arange(prompt, len(ids))
    targets = targets[layout.predecessor[targets] >= 0]
    mask = torch.zeros(len(ids), len(ids), dtype=dtype).masked_fill_(~layout.visible(), -torch.inf)
    return _Sequence(
        ids.long()[None],
        layout.position_ids.long()[None],
        mask[None, None],
        targets,
        layout.predecessor[targets].long(),
    )
