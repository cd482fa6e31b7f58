"""Executes planned batches: arrays to tensors, model, sampler. It decides nothing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npr_engine.batch import Batch, Sampled, SampleInputs
from npr_engine.constraint import Constraint
from npr_engine.model import InferenceModel, KVCache, Step
from npr_engine.sampler import sample


class Runner:
    """A model, its KV cache, and the masks of constrained sampling."""

    def __init__(self, model: InferenceModel, num_slots: int, constraint: Constraint) -> None:
        self._model = model
        self._constraint = constraint
        self._forbidden: Tensor | None = None
        self._num_slots = num_slots
        self._cache: KVCache | None = model.new_cache(num_slots)

    @property
    def has_memory(self) -> bool:
        return self._cache is not None

    def release_memory(self) -> None:
        self._cache = None

    def resume_memory(self) -> None:
        if self._cache is None:
            self._cache = self._model.new_cache(self._num_slots)

    @torch.inference_mode()
    def run(self, batch: Batch, inputs: SampleInputs) -> Sampled:
        """Feeds the batch and samples after it."""
        assert self._cache is not None, "the KV cache is released"
        step = Step(
            token_ids=self._tensor(batch.token_ids),
            positions=self._tensor(batch.positions),
            slots=self._tensor(batch.slots),
            rows=self._tensor(batch.rows),
            lengths=self._tensor(batch.lengths),
            tables=self._tensor(batch.tables),
            sample_index=self._tensor(batch.sample_index),
        )
        logits = self._model.forward(step, self._cache)
        return sample(logits, inputs, self._masks() if inputs.masks.any() else None)

    def _masks(self) -> Tensor:
        """The forbidden tokens of each mask, bool [K, V], on the model's device."""
        if self._forbidden is None:
            self._forbidden = torch.from_numpy(self._constraint.forbidden).to(self._model.device)
        return self._forbidden

    def _tensor(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)
