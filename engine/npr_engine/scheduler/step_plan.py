"""Collects what one engine step computes and turns it into a Batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npr_engine.scheduler.batch import Batch
from npr_engine.scheduler.rows import Rows


class StepPlan:
    """Chunks (consecutive tokens that a row has already) beside the rows that decode; `room` tokens are left
    for chunks."""

    def __init__(self, rows: Rows, room: int) -> None:
        self._rows = rows
        self.room = room
        self._chunks: list[tuple[int, int, int, int, int]] = []  # row, first, length, position, count
        self._sampled: list[int] = []  # indices of chunks
        self.num_chunk_tokens = 0

    def add(self, row: int, count: int, *, sample: bool = False) -> None:
        """Plans the next `count` tokens of the row, whose KV slots are reserved; `sample`: draws the token
        after them."""
        rows = self._rows
        if sample:
            self._sampled.append(len(self._chunks))
        first, length = int(rows.num_computed_tokens[row]), int(rows.length[row])
        self._chunks.append((row, first, length, int(rows.position[row]), count))
        rows.num_computed_tokens[row] += count
        rows.length[row] += count
        rows.position[row] += count
        rows.num_scheduled_tokens[row] = 0
        self.room -= count
        self.num_chunk_tokens += count

    def build(self, decoding: NDArray[np.int64]) -> Batch:
        """The step: one token of each decoding row, then the chunks."""
        rows = self._rows
        num_decode = len(decoding)
        decode_first, decode_length = rows.num_computed_tokens[decoding], rows.length[decoding]
        decode_position = rows.position[decoding]
        rows.num_computed_tokens[decoding] += 1
        rows.length[decoding] += 1
        rows.position[decoding] += 1
        if not self._chunks:
            return Batch(
                token_ids=rows.tokens[decoding, decode_first],
                positions=decode_position,
                slots=rows.block_table[decoding, decode_length],
                rows=decoding.astype(np.int32),
                lengths=decode_length + 1,
                block_tables=rows.block_table,
                generations=rows.generation,
                sample_index=np.arange(num_decode),
                sample_rows=decoding.astype(np.int32),
                num_decode=num_decode,
            )
        chunks = np.array(self._chunks, np.int32)
        counts = chunks[:, 4]
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
        row, first, length, position = (np.repeat(chunks[:, column], counts) for column in range(4))
        row = np.concatenate((decoding.astype(np.int32), row))
        first = np.concatenate((decode_first, first + offsets))
        length = np.concatenate((decode_length, length + offsets))
        sampled = np.array(self._sampled, np.int64)
        return Batch(
            token_ids=rows.tokens[row, first],
            positions=np.concatenate((decode_position, position + offsets)),
            slots=rows.block_table[row, length],
            rows=row,
            lengths=length + 1,
            block_tables=rows.block_table,
            generations=rows.generation,
            sample_index=np.concatenate((np.arange(num_decode), num_decode + ends[sampled] - 1)),
            sample_rows=np.concatenate((decoding.astype(np.int32), chunks[sampled, 0])),
            num_decode=num_decode,
        )
