"""Executes planned batches: arrays to tensors, model, sampler. It decides nothing.

The logits of rows that no token has are -inf before any sampler sees them, so log-probs are normalised over
the tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npr_engine.executor.device_forward import DeviceForward
from npr_engine.executor.sampler import sample
from npr_engine.language.constraint import Constraint
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.scheduler.batch import Batch, Sampled, SampleInputs


class Runner:
    """A model, its KV cache, and the masks of constrained sampling."""

    def __init__(self, model: InferenceModel, num_slots: int, constraint: Constraint) -> None:
        self._model = model
        self._unused_ids = torch.from_numpy(constraint.unused_ids).to(model.device)
        self._constraint = constraint
        self._forbidden: Tensor | None = None
        self._num_slots = num_slots
        self._cache: KVCache | None = None
        self._on_device: DeviceForward | None = None
        self._replays_before = 0
        self.resume_memory()

    @property
    def has_memory(self) -> bool:
        return self._cache is not None

    @property
    def num_replays(self) -> int:
        """Steps that replayed a CUDA graph."""
        return self._replays_before + (self._on_device.num_replays if self._on_device is not None else 0)

    def release_memory(self) -> None:
        self._replays_before = self.num_replays
        self._cache = self._on_device = None

    def resume_memory(self) -> None:
        if self._cache is None:
            self._cache = self._model.new_cache(self._num_slots)
            if self._model.device.type == "cuda":
                self._on_device = DeviceForward(self._model, self._cache)

    @torch.inference_mode()
    def run(self, batch: Batch, inputs: SampleInputs) -> Sampled:
        """Feeds the batch and samples after it."""
        assert self._cache is not None, "the KV cache is released"
        if self._on_device is not None:
            logits = self._on_device.logits(batch)
        else:
            logits = self._model.forward(self._step(batch), self._cache)
        if len(self._unused_ids):
            logits.index_fill_(1, self._unused_ids, -torch.inf)
        return sample(logits, inputs, self._masks() if inputs.masks.any() else None)

    @torch.inference_mode()
    def run_empty(self) -> None:
        """A step without tokens, for the engines that share the model's experts."""
        self._model.serve_experts()

    def _step(self, batch: Batch) -> Step:
        """The batch as tensors that share its memory."""
        return Step(
            token_ids=torch.from_numpy(batch.token_ids),
            positions=torch.from_numpy(batch.positions),
            slots=torch.from_numpy(batch.slots),
            rows=torch.from_numpy(batch.rows),
            lengths=torch.from_numpy(batch.lengths),
            block_tables=torch.from_numpy(batch.block_tables),
            sample_index=torch.from_numpy(batch.sample_index),
        )

    def _masks(self) -> Tensor:
        """The forbidden tokens of each mask, bool [K, V], on the model's device."""
        if self._forbidden is None:
            self._forbidden = torch.from_numpy(self._constraint.forbidden).to(self._model.device)
        return self._forbidden
