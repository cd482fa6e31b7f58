"""Collects what one step feeds and turns it into a Batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npr_engine.scheduler.batch import Batch
from npr_engine.scheduler.rows import Rows


class StepPlan:
    """Chunks (runs of known tokens of a row) beside the rows that decode; `room` tokens are left for
    chunks."""

    def __init__(self, rows: Rows, room: int) -> None:
        self._rows = rows
        self.room = room
        self._chunks: list[tuple[int, int, int, int, int]] = []  # row, fed, length, position, count
        self._sampled: list[int] = []  # indices of chunks
        self.num_chunk_tokens = 0

    def add(self, row: int, count: int, *, sample: bool = False) -> None:
        """Feeds the next `count` tokens of the row, whose slots are reserved; then samples, if told so."""
        rows = self._rows
        if sample:
            self._sampled.append(len(self._chunks))
        self._chunks.append((row, int(rows.fed[row]), int(rows.length[row]), int(rows.position[row]), count))
        rows.fed[row] += count
        rows.length[row] += count
        rows.position[row] += count
        rows.promised[row] = 0
        self.room -= count
        self.num_chunk_tokens += count

    def build(self, decoding: NDArray[np.int64]) -> Batch:
        """The step: one token of each decoding row, then the chunks."""
        rows = self._rows
        num_decode = len(decoding)
        decode_fed, decode_length = rows.fed[decoding], rows.length[decoding]
        decode_position = rows.position[decoding]
        rows.fed[decoding] += 1
        rows.length[decoding] += 1
        rows.position[decoding] += 1
        if not self._chunks:
            return Batch(
                token_ids=rows.tokens[decoding, decode_fed],
                positions=decode_position,
                slots=rows.table[decoding, decode_length],
                rows=decoding.astype(np.int32),
                lengths=decode_length + 1,
                tables=rows.table,
                births=rows.birth,
                sample_index=np.arange(num_decode),
                sample_rows=decoding.astype(np.int32),
                num_decode=num_decode,
            )
        chunks = np.array(self._chunks, np.int32)
        counts = chunks[:, 4]
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
        row, fed, length, position = (np.repeat(chunks[:, column], counts) for column in range(4))
        row = np.concatenate((decoding.astype(np.int32), row))
        fed = np.concatenate((decode_fed, fed + offsets))
        length = np.concatenate((decode_length, length + offsets))
        sampled = np.array(self._sampled, np.int64)
        return Batch(
            token_ids=rows.tokens[row, fed],
            positions=np.concatenate((decode_position, position + offsets)),
            slots=rows.table[row, length],
            rows=row,
            lengths=length + 1,
            tables=rows.table,
            births=rows.birth,
            sample_index=np.concatenate((np.arange(num_decode), num_decode + ends[sampled] - 1)),
            sample_rows=np.concatenate((decoding.astype(np.int32), chunks[sampled, 0])),
            num_decode=num_decode,
        )
