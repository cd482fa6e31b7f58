"""Who holds which KV slot: prompts, responses, and within a response the rows of its branches.

A response owns its blocks as a whole and deals their slots to its branches, so slots of one block may serve
different branches: tables are slot-level, a fork copies no KV, a join moves none, and at most one block per
response is partly unused, however many branches it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from npr_engine.kvcache.block_pool import BlockPool
from npr_engine.kvcache.prompt_cache import PromptCache
from npr_engine.language.constraint import Phase
from npr_engine.language.parser import State
from npr_engine.scheduler.response_state import Branch, Fork, Record, ResponseState
from npr_engine.scheduler.rows import Rows


class Memory:
    """KV slots and the rows of the block table that point to them. It never preempts: it says no."""

    def __init__(self, pool: BlockPool, rows: Rows) -> None:
        self.pool = pool
        self.rows = rows
        self.prompts = PromptCache(pool)
        self.retired: list[int] = []  # rows that the planned batch still reads
        self.branch_at: dict[int, Branch] = {}  # what stands on a row

    def fits(self, response: ResponseState, headroom: int, step: int) -> bool:
        """Whether prompt and tokens of a response that has no KV fit beside `headroom` free blocks."""
        records = [response.trunk.record, *(b.record for fork in response.forks for b in fork.branches)]
        tokens = sum(len(record) for record in records if record is not None)
        need = self.pool.blocks_for(tokens + 1) + self.prompts.missing_blocks(response.prefix_ids) + headroom
        short = need - self.pool.num_free
        return short <= 0 or short <= self.prompts.evictable_blocks(step, response.prefix_ids)

    def admit(self, response: ResponseState, step: int) -> None:
        """Gives the response its prompt and its trunk a row; `fits` has said yes."""
        rows, prefix = self.rows, response.prefix_ids
        while self.pool.num_free < self.prompts.missing_blocks(prefix):
            evicted = self.prompts.evict(step, spared=prefix)
            assert evicted, "admitted without room for the prompt"
        prompt = response.prompt = self.prompts.acquire(prefix)
        trunk = response.trunk
        row = self._place(response, trunk)
        length = len(prompt.slots)
        rows.block_table[row, :length] = prompt.slots
        rows.length[row] = rows.reserved[row] = length

    def open(self, response: ResponseState, fork: Fork) -> None:
        """Rows for all branches of a fork; each aliases the slots that the trunk sees."""
        rows, trunk = self.rows, response.trunk.row
        self._spare_tail(response, trunk)
        length = int(rows.length[trunk])
        for branch in fork.branches:
            row = self._place(response, branch)
            rows.block_table[row, :length] = rows.block_table[trunk, :length]
            rows.length[row] = rows.reserved[row] = length

    def join(self, response: ResponseState, fork: Fork) -> None:
        """The trunk's row becomes: prefix, branch 1, ..., branch n; the branches' rows retire."""
        rows, trunk = self.rows, response.trunk.row
        start = end = int(rows.length[trunk])
        for branch in fork.branches:
            self._spare_tail(response, branch.row)
            length = int(rows.length[branch.row])
            rows.block_table[trunk, end : end + length - start] = rows.block_table[branch.row, start:length]
            end += length - start
            branch.record = Record.take(rows, branch.row)
            rows.decoding[branch.row] = False
            self.retired.append(branch.row)
            branch.row = -1
        rows.length[trunk] = rows.reserved[trunk] = end
        rows.position[trunk] = join_position(fork)

    def reserve(self, response: ResponseState, row: int, count: int, step: int) -> bool:
        """Slots for `count` more tokens of the row, from what is spare, free, evictable or idle; False without."""
        rows, size = self.rows, self.pool.block_size
        rows.num_scheduled_tokens[row] = count
        need = int(rows.length[row]) + count - int(rows.reserved[row])
        while need > 0:
            if not response.spare and not self._take_block(response, step):
                self._spare_idle_tails(response, row)
                if not response.spare:
                    return False
            taken = min(max(need, size), len(response.spare))
            end = int(rows.reserved[row])
            room = rows.width - end
            taken = min(taken, room)
            assert taken > 0, f"row {row} is full: {end} of {rows.width}"
            rows.block_table[row, end : end + taken] = response.spare[:taken]
            del response.spare[:taken]
            rows.reserved[row] = end + taken
            need -= taken
        return True

    def extend(self, full: NDArray[np.int64], owners: Sequence[ResponseState]) -> NDArray[np.int64]:
        """A free block to each of the rows, which have used up theirs, all at once. Returns those that need
        `reserve`: rows of responses with spare slots, which go first, and all of them where free blocks or
        columns are too few."""
        rows, size = self.rows, self.pool.block_size
        if self.pool.num_free < len(full) or int(rows.reserved[full].max()) + size > rows.width:
            return full
        spare = np.array([bool(owner.spare) for owner in owners])
        taking = full[~spare]
        blocks = self.pool.allocate(len(taking))
        for owner, block in zip((owner for owner in owners if not owner.spare), blocks, strict=True):
            owner.blocks.append(block)
        columns = rows.reserved[taking, None] + np.arange(size)
        rows.block_table[taking[:, None], columns] = self.pool.slots(blocks).reshape(-1, size)
        rows.reserved[taking] += size
        return full[spare]

    def evacuate(self, response: ResponseState) -> None:
        """Takes rows and KV from the response; what it has decoded stays in its records."""
        for branch in response.branches_on_rows():
            branch.record = Record.take(self.rows, branch.row)
            branch.step_start = int(self.rows.step_start[branch.row])
            branch.state = State(self.rows.state[branch.row])
            branch.phase = Phase(self.rows.phase[branch.row])
            self.rows.release([branch.row])
            branch.row = -1
        self.pool.release(response.blocks)
        response.blocks, response.spare = [], []
        response.work.clear()
        if response.prompt is not None:
            self.prompts.release(response.prompt)
            response.prompt = None

    def release_retired(self) -> None:
        """The planned batch has run: its retired rows are free."""
        self.rows.release(self.retired)
        self.retired = []

    def _place(self, response: ResponseState, branch: Branch) -> int:
        """A row that holds the branch's record."""
        assert branch.record is not None
        branch.row = self.rows.allocate(response.request_slot, branch.key, int(branch.record.positions[0]))
        branch.record.append_to(self.rows, branch.row)
        self.rows.step_start[branch.row] = branch.step_start
        self.rows.state[branch.row], self.rows.phase[branch.row] = branch.state, branch.phase
        self.branch_at[branch.row] = branch
        return branch.row

    def _take_block(self, response: ResponseState, step: int) -> bool:
        if self.pool.num_free == 0 and not self.prompts.evict(step):
            return False
        block = self.pool.allocate(1)
        response.blocks += block
        response.spare += self.pool.slots(block).tolist()
        return True

    def _spare_tail(self, response: ResponseState, row: int, keep: int = 0) -> None:
        """Slots that the row has reserved and not used, all but `keep`, become spare."""
        rows = self.rows
        start, end = int(rows.length[row]) + keep, int(rows.reserved[row])
        if start < end:
            response.spare += rows.block_table[row, start:end].tolist()
            rows.reserved[row] = start

    def _spare_idle_tails(self, response: ResponseState, row: int) -> None:
        """Out of blocks: what the response's other rows hold beyond this step's token."""
        for branch in response.branches_on_rows():
            if branch.row != row:
                self._spare_tail(response, branch.row, keep=int(self.rows.num_scheduled_tokens[branch.row]))

    def utilisation(self) -> float:
        """Slots that hold a token which some row sees / all slots, counted from the tables."""
        rows = self.rows
        live = np.zeros(self.pool.num_blocks * self.pool.block_size, np.bool_)
        for row in rows.in_use().tolist():
            live[rows.block_table[row, : rows.length[row]]] = True
        return float(live.mean())

    def check_integrity(self, running: list[ResponseState]) -> None:
        """Every block has one owner or is free; every slot of a response is seen from one place; no row is lost."""
        self.pool.check_integrity([*(r.blocks for r in running), *(p.blocks for p in self.prompts)])
        used = list(self.retired)
        for prompt in self.prompts:
            users = sum(response.prompt is prompt for response in running)
            assert prompt.num_users == users, f"prompt has {prompt.num_users} users, {users} use it"
            used += [prompt.row] * (prompt.row >= 0)
        for response in running:
            used += [branch.row for branch in response.branches_on_rows()]
            self._check_slots(response)
        self.rows.check_integrity(used)

    def _check_slots(self, response: ResponseState) -> None:
        rows = self.rows
        assert response.prompt is not None
        trunk = response.trunk.row
        start, shared = len(response.prompt.slots), int(rows.length[trunk])
        assert np.array_equal(rows.block_table[trunk, :start], response.prompt.slots)
        held = [*response.spare, *rows.block_table[trunk, start : rows.reserved[trunk]].tolist()]
        for branch in response.branches_on_rows()[1:]:
            assert np.array_equal(rows.block_table[branch.row, :shared], rows.block_table[trunk, :shared])
            held += rows.block_table[branch.row, shared : rows.reserved[branch.row]].tolist()
        assert len(set(held)) == len(held), f"{response.request.request_id}: a slot is held twice"
        assert sorted(held) == sorted(self.pool.slots(response.blocks).tolist())


def join_position(fork: Fork) -> int:
    """Position of the first token after a join: one beyond the longest branch, all branches start at one position."""
    records = [branch.record for branch in fork.branches if branch.record is not None]
    assert len(records) == len(fork.branches)
    return int(records[0].positions[0]) + max(len(record) for record in records)
