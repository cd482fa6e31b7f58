"""Blocks of KV slots: each is free or has one owner (a response, or a prompt that many responses share)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def slots_needed(prompt_tokens: int, max_tokens: int, block_size: int) -> int:
    """KV slots, in whole blocks, of a prompt and a response that spends its budget: the prompt's last token
    is fed with the response, and has its slot there."""
    return (-(-(prompt_tokens - 1) // block_size) + -(-(max_tokens + 1) // block_size)) * block_size


class BlockPool:
    """Hands out blocks; block b holds the slots [b * block_size, (b + 1) * block_size)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1 and block_size >= 1, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = np.zeros(num_blocks, np.bool_)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def room_behind(self, prompt_tokens: int) -> int:
        """The largest budget of a response to a prompt of so many tokens; below 1 where none fits."""
        return (self.num_blocks - self.blocks_for(prompt_tokens - 1)) * self.block_size - 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks; there must be as many."""
        assert count <= len(self._free), (count, len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        self._owned[blocks] = True
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Takes back blocks that are owned."""
        assert self._owned[blocks].all() and len(set(blocks)) == len(blocks), f"{blocks} freed twice"
        self._owned[blocks] = False
        self._free.extend(reversed(blocks))

    def restore_order(self) -> None:
        """The free blocks are handed out from the lowest on again, as those of a new pool are."""
        self._free.sort(reverse=True)

    def slots(self, blocks: list[int]) -> NDArray[np.int32]:
        """All slots of blocks, in order."""
        offsets = np.arange(self.block_size, dtype=np.int32)
        first = np.asarray(blocks, np.int32) * np.int32(self.block_size)
        slots: NDArray[np.int32] = np.add.outer(first, offsets).ravel()
        return slots

    def check_integrity(self, owners: list[list[int]]) -> None:
        """Every block is free or in exactly one of the lists."""
        owned = [block for blocks in owners for block in blocks]
        assert len(set(owned)) == len(owned), f"blocks with two owners: {_repeated(owned)}"
        assert len(set(self._free)) == len(self._free), f"free twice: {_repeated(self._free)}"
        assert not set(owned) & set(self._free), f"free and owned: {set(owned) & set(self._free)}"
        lost = self.num_blocks - len(owned) - len(self._free)
        assert lost == 0, f"{lost} blocks are neither free nor owned"
        assert sorted(owned) == np.flatnonzero(self._owned).tolist()


def _repeated(items: list[int]) -> list[int]:
    return sorted({item for item in items if items.count(item) > 1})
