"""Forwards on a GPU: one copy up a step, CUDA graphs for steps that only decode.

    Batch ─► DeviceTable (what is new) ─► one upload of all arrays ─► decode only: graph of the bucket ─┬─► logits [S, V]
                                                                  └─► with chunks: eager, runs of 16 ───┘

A decode step of up to `GRAPH_ROWS[-1]` rows is padded to the next bucket and replayed; padding rows see no key and leave none
(slot -1). The host waits for nothing here.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npr_engine.batch import Batch
from npr_engine.device_table import DeviceTable
from npr_engine.model import InferenceModel, KVCache, Step
from npr_ext.paged import RUN_TOKENS

GRAPH_ROWS = (1, 2, 4, 8, *range(16, 128, 16), *range(128, 513, 32))
NO_SLOT = -1


def runs_of(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [R, 2]: (first token, tokens) of neighbours in one row, at most RUN_TOKENS each."""
    edges = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1], [True])))
    begins, lengths = edges[:-1], np.diff(edges)
    pieces = -(-lengths // RUN_TOKENS)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    firsts = np.repeat(begins, pieces) + within * RUN_TOKENS
    counts = np.minimum(RUN_TOKENS, np.repeat(begins + lengths, pieces) - firsts)
    return np.stack((firsts, counts), axis=1).astype(np.int32)


def bucket_of(num_rows: int) -> int | None:
    """The least bucket of GRAPH_ROWS that holds so many rows; None beyond the largest."""
    place = bisect.bisect_left(GRAPH_ROWS, num_rows)
    return GRAPH_ROWS[place] if place < len(GRAPH_ROWS) else None


def decodes_only(batch: Batch) -> bool:
    """Whether every token is the next one of a row and is sampled after."""
    return batch.num_tokens == batch.num_decode == len(batch.sample_index)


def padded_arrays(batch: Batch, bucket: int) -> NDArray[np.int32]:
    """int32 [5, bucket]: token ids, positions, slots, rows, lengths; padding sees no key and leaves none."""
    arrays = np.zeros((5, bucket), np.int32)
    arrays[2] = NO_SLOT
    for array, values in zip(
        arrays, (batch.token_ids, batch.positions, batch.slots, batch.rows, batch.lengths), strict=True
    ):
        array[: len(values)] = values
    return arrays


@dataclass(frozen=True)
class Graph:
    """A captured decode step: where its inputs go, and where its logits come."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits_SV: Tensor


class DeviceForward:
    """A model's forwards into one KV cache."""

    def __init__(self, model: InferenceModel, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._table = DeviceTable(model.device)
        self._captured_table: Tensor | None = None
        self._graphs: dict[int, Graph] = {}

    def logits(self, batch: Batch) -> Tensor:
        """[S, V]; of a replayed graph it is overwritten by the next step."""
        table = self._table.update(batch)
        # Which experts have how many tokens is read by the host: such steps cannot be replayed.
        fixed = decodes_only(batch) and not self._model.config.num_experts
        bucket = bucket_of(batch.num_tokens) if fixed else None
        if bucket is None:
            return self._model.forward(self._eager_step(batch, table), self._cache)
        if table is not self._captured_table:  # the graphs read the old one
            self._graphs.clear()
            self._captured_table = table
        arrays = torch.from_numpy(padded_arrays(batch, bucket))
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(arrays, table)
        graph = self._graphs[bucket]
        graph.inputs.copy_(arrays.pin_memory(), non_blocking=True)
        graph.graph.replay()
        return graph.logits_SV[: batch.num_tokens]

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
        flat = torch.from_numpy(np.concatenate(parts)).pin_memory().to(self._model.device, non_blocking=True)
        tokens, positions, slots, rows, lengths, sample_index, flat_runs = flat.split(
            [len(part) for part in parts]
        )
        return Step(
            tokens, positions, slots, rows, lengths, table, sample_index.long(), flat_runs.view(-1, 2)
        )

    def _capture(self, arrays: Tensor, table: Tensor) -> Graph:
        inputs = arrays.to(self._model.device)
        tokens, positions, slots, rows, lengths = inputs
        everything = torch.arange(inputs.shape[1], device=inputs.device)
        step = Step(tokens, positions, slots, rows, lengths, table, everything, None)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # kernels are compiled and libraries take their workspace before the capture
            self._model.forward(step, self._cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_SV = self._model.forward(step, self._cache)
        return Graph(graph, inputs, logits_SV)
