"""KV of prompts, computed once and shared by every response with the same prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npr_engine.kvcache.block_pool import BlockPool


@dataclass(eq=False)
class PromptKV:
    """Slots of a prompt without its last token (each response feeds that one itself, for its first logits).

    Attributes:
        token_ids, slots: int32 [P - 1].
        blocks: the blocks of the slots.
        num_computed_tokens: tokens whose KV is computed or planned.
        row: row of the block table while it is being filled, else -1.
        num_users: running responses that alias the slots.
        planned_step: last engine step that wrote to the slots.
    """

    token_ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    blocks: list[int]
    num_computed_tokens: int = 0
    row: int = -1
    num_users: int = 0
    planned_step: int = -1

    @property
    def ready(self) -> bool:
        return self.num_computed_tokens == len(self.token_ids)


class PromptCache:
    """Prompts by the content of their tokens, least recently used first. Only whole prompts are shared: KV
    that was joined from branches is not a function of the token ids alone and never enters."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._entries: dict[bytes, PromptKV] = {}  # in order of last use

    def __iter__(self) -> Iterator[PromptKV]:
        return iter(self._entries.values())

    def missing_blocks(self, token_ids: NDArray[np.int32]) -> int:
        """Blocks that `acquire` would allocate."""
        return 0 if token_ids.tobytes() in self._entries else self._pool.blocks_for(len(token_ids))

    def acquire(self, token_ids: NDArray[np.int32]) -> PromptKV:
        """The prompt's KV, one user more; a new entry still has to be filled."""
        key = token_ids.tobytes()
        entry = self._entries.pop(key, None)
        if entry is None:
            blocks = self._pool.allocate(self._pool.blocks_for(len(token_ids)))
            entry = PromptKV(token_ids, self._pool.slots(blocks)[: len(token_ids)], blocks)
        self._entries[key] = entry
        entry.num_users += 1
        return entry

    def release(self, entry: PromptKV) -> None:
        """One user less; the KV stays for later prompts until it is evicted."""
        assert entry.num_users > 0, entry.num_users
        entry.num_users -= 1

    def evictable_blocks(self, step: int, spared: NDArray[np.int32]) -> int:
        """Blocks that `evict` could free before `step`, the entry of tokens `spared` left alone."""
        key = spared.tobytes()
        return sum(len(e.blocks) for k, e in self._entries.items() if k != key and _evictable(e, step))

    def evict(self, step: int, spared: NDArray[np.int32] | None = None) -> bool:
        """Frees the least recently used entry without users that no work of `step` writes to; False without one."""
        spared_key = None if spared is None else spared.tobytes()
        for key, entry in self._entries.items():
            if key != spared_key and _evictable(entry, step):
                del self._entries[key]
                self._pool.release(entry.blocks)
                return True
        return False

    def forget(self, token_ids: NDArray[np.int32], step: int) -> None:
        """Drops a prompt whose KV is not to be trusted, where nobody else uses it."""
        key = token_ids.tobytes()
        entry = self._entries.get(key)
        if entry is not None and _evictable(entry, step + 1):
            self._pool.release(self._entries.pop(key).blocks)

    def clear(self) -> None:
        """Forgets everything (the weights are others now); nothing may be in use."""
        for entry in self._entries.values():
            assert entry.num_users == 0 and entry.row < 0, (entry.num_users, entry.row)
            self._pool.release(entry.blocks)
        self._entries.clear()


def _evictable(entry: PromptKV, step: int) -> bool:
    return entry.num_users == 0 and entry.ready and entry.planned_step < step and bool(entry.blocks)
