"""Forwards on a GPU: one copy up a step, CUDA graphs for all steps but the largest.

    Batch ─► DeviceTable (what is new) ─► one upload of all arrays ─┬─► graph of the step's bucket ─┬─► logits [S, V]
                                                                    └─► more tokens, or experts: eager ─┘

    decode bucket   every token is a row's next one and is sampled after; each is computed alone
    mixed bucket    forks, joins and short prompts feed several tokens of a row: runs of up to 16 are computed together

A step is padded to its bucket; padding sees no key and leaves none (slot -1). Where hundreds of responses
run, some response forks or joins in most steps: without mixed buckets few steps would be replayed. The host
waits for nothing here.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npr_engine.executor.device_graph import CudaGraphs, Recorder, Recording
from npr_engine.executor.device_table import DeviceTable
from npr_engine.executor.upload import pinned, upload
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.scheduler.batch import Batch
from npr_ext.sizes import RUN_TOKENS

DECODE_BUCKETS = (1, 2, 4, 8, *range(16, 128, 16), *range(128, 513, 32))
MIXED_BUCKETS = (16, 32, 64, 128, 256, 512)
NO_SLOT = -1


@dataclass(frozen=True)
class Bucket:
    """The shape that a step is padded to; `mixed`: its neighbours in a row are computed together."""

    num_tokens: int
    mixed: bool


def runs_of(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [R, 2]: (first token, tokens) of neighbours in one row, at most RUN_TOKENS each."""
    edges = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1], [True])))
    begins, lengths = edges[:-1], np.diff(edges)
    pieces = -(-lengths // RUN_TOKENS)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    firsts = np.repeat(begins, pieces) + within * RUN_TOKENS
    counts = np.minimum(RUN_TOKENS, np.repeat(begins + lengths, pieces) - firsts)
    return np.stack((firsts, counts), axis=1).astype(np.int32)


def bucket_of(batch: Batch) -> Bucket | None:
    """The least bucket that holds the step; None beyond the largest."""
    mixed = not decodes_only(batch)
    sizes = MIXED_BUCKETS if mixed else DECODE_BUCKETS
    place = bisect.bisect_left(sizes, batch.num_tokens)
    return Bucket(sizes[place], mixed) if place < len(sizes) else None


def decodes_only(batch: Batch) -> bool:
    """Whether every token is the next one of a row and is sampled after."""
    return batch.num_tokens == batch.num_decode == len(batch.sample_index)


def padded_arrays(batch: Batch, bucket: Bucket) -> NDArray[np.int32]:
    """int32 [5, T]: token ids, positions, slots, rows, lengths; padding sees no key and leaves none. [7, T]
    in a mixed bucket: the last two, flat, hold the runs, padded with empty ones."""
    count, size = batch.num_tokens, bucket.num_tokens
    arrays = np.zeros((7 if bucket.mixed else 5, size), np.int32)
    arrays[2] = NO_SLOT
    for array, values in zip(
        arrays, (batch.token_ids, batch.positions, batch.slots, batch.rows, batch.lengths), strict=False
    ):
        array[:count] = values
    if bucket.mixed:
        of_padding = np.full(size - count, -1, np.int32)
        runs = runs_of(np.concatenate((batch.rows, of_padding)))
        arrays[5:].reshape(-1)[: runs.size] = runs.reshape(-1)
    return arrays


def padded_step(inputs: Tensor, table: Tensor) -> Step:
    """The step of `padded_arrays` on a device; every token is sampled after."""
    tokens, positions, slots, rows, lengths = inputs[:5]
    everything = torch.arange(inputs.shape[1], device=inputs.device)
    runs = inputs[5:].reshape(-1, 2) if len(inputs) > 5 else None
    return Step(tokens, positions, slots, rows, lengths, table, everything, runs)


@dataclass(frozen=True)
class Graph:
    """A recorded step: where its inputs go, how it runs, and where its logits come."""

    inputs: Tensor
    replay: Callable[[], None]
    logits_TV: Tensor


class DeviceForward:
    """A model's forwards into one KV cache."""

    def __init__(
        self, model: InferenceModel, cache: KVCache, recorder: Callable[[], Recorder] = CudaGraphs
    ) -> None:
        self.num_replays = 0
        self._model, self._cache, self._new_recorder = model, cache, recorder
        self._table = DeviceTable(model.device)
        self._known_table: Tensor | None = None
        self._graphs: dict[Bucket, Graph] = {}
        self._recorder = recorder()

    def logits(self, batch: Batch) -> Tensor:
        """Logits [S, V] of the sampled tokens; those of an engine step that only decodes are overwritten by
        the next."""
        table = self._table.update(batch)
        # Which experts have how many tokens is read by the host: such steps cannot be recorded.
        bucket = None if self._model.config.num_experts else bucket_of(batch)
        if bucket is None:
            return self._model.forward(self._eager_step(batch, table), self._cache)
        if table is not self._known_table:  # the graphs read the old one
            self._graphs.clear()
            self._recorder, self._known_table = self._new_recorder(), table
        arrays = pinned(padded_arrays(batch, bucket), self._model.device)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(arrays.to(self._model.device, copy=True), table)
        graph = self._graphs[bucket]
        graph.inputs.copy_(arrays, non_blocking=True)
        graph.replay()
        self.num_replays += 1
        if bucket.mixed:
            return graph.logits_TV.index_select(0, upload(batch.sample_index, self._model.device))
        return graph.logits_TV[: batch.num_tokens]

    def _record(self, inputs: Tensor, table: Tensor) -> Graph:
        step = padded_step(inputs, table)
        recording: Recording = self._recorder(lambda: self._model.forward(step, self._cache))
        return Graph(inputs, *recording)

    def _eager_step(self, batch: Batch, table: Tensor) -> Step:
        runs = runs_of(batch.rows)
        parts = (
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.rows,
            batch.lengths,
            batch.sample_index.astype(np.int32),
            runs.reshape(-1),
        )
        flat = upload(np.concatenate(parts), self._model.device)
        tokens, positions, slots, rows, lengths, sample_index, flat_runs = flat.split(
            [len(part) for part in parts]
        )
        return Step(
            tokens, positions, slots, rows, lengths, table, sample_index.long(), flat_runs.view(-1, 2)
        )
