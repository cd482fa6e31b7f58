"""The table of KV slots on the model's device, brought up to date by what is new in it.

Below its length a row of the table never changes while it lives: fork, join and decoding append. So a row is
copied from where the last copy ended, and from its beginning when it has a new owner. A decode step moves one
number a row, a fork the branches' prefixes, whatever the width of the table.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npr_engine.executor.upload import upload
from npr_engine.scheduler.batch import Batch

ROWS_AT_LEAST = 512
"""So that the table keeps its place, which captured graphs know, while a run's first forks ask for rows."""


class DeviceTable:
    """int32 [rows, width] on `device`; holds what the batches so far see."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._generations: NDArray[np.int64] = np.zeros(0, np.int64)
        self._copied: NDArray[np.int32] = np.zeros(0, np.int32)

    def update(self, batch: Batch) -> Tensor:
        """The table after the batch's new entries; another tensor than before only where its shape has grown."""
        rows, width = batch.block_tables.shape
        if rows > len(self._table) or width != self._table.shape[1]:
            shape = (max(rows, ROWS_AT_LEAST), width)
            self._table = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._generations = np.full(shape[0], -1, np.int64)
            self._copied = np.zeros(shape[0], np.int32)
        places = self._new_entries(batch)
        if len(places):
            both = np.stack((places, batch.block_tables.reshape(-1)[places]))  # int64: one copy up for both
            flat_places, slots = upload(both, self._device)
            self._table.view(-1).index_copy_(0, flat_places, slots.int())
        return self._table

    def _new_entries(self, batch: Batch) -> NDArray[np.int64]:
        """Flat indices of the entries that the batch sees and the device lacks."""
        ends = np.zeros(len(batch.block_tables), np.int32)
        np.maximum.at(ends, batch.rows, batch.lengths)
        rows = np.flatnonzero(ends)
        self._copied[rows[self._generations[rows] != batch.generations[rows]]] = 0
        self._generations[rows] = batch.generations[rows]
        begins = self._copied[rows]
        counts = np.maximum(ends[rows] - begins, 0)
        self._copied[rows] = begins + counts
        firsts = rows * batch.block_tables.shape[1] + begins
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(firsts, counts) + within
