"""What the tokens that an engine step has sampled do to the responses: they grow, fork, join and end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.constraint import Constraint, Phase
from npr_engine.language.grammar import Grammar
from npr_engine.language.parser import QUIET_TAGS
from npr_engine.language.vocabulary import TokenClass
from npr_engine.scheduler.batch import Batch, Sampled
from npr_engine.scheduler.branching import Branching, error
from npr_engine.scheduler.limits import Counters
from npr_engine.scheduler.memory import Memory
from npr_engine.scheduler.request_slots import RequestSlots
from npr_engine.scheduler.response_queue import ResponseQueue
from npr_engine.scheduler.rows import Rows

NO_DISTRIBUTION = error("the model's logits are NaN or infinite")


@dataclass(frozen=True)
class NewTokens:
    """The sampled tokens that are taken: their batch rows and request slots int32 [S], and what was drawn [S]."""

    rows: NDArray[np.int32]
    slots: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampler_logprobs: NDArray[np.float32]

    def where(self, kept: NDArray[np.bool_]) -> NewTokens:
        """Those of `kept`, bool [S]."""
        return NewTokens(
            self.rows[kept],
            self.slots[kept],
            self.token_ids[kept],
            self.logprobs[kept],
            self.sampler_logprobs[kept],
        )


class StepCommit:
    """Writes sampled tokens to the rows and draws the consequences, each kind for the whole batch at once."""

    def __init__(
        self,
        grammar: Grammar,
        constraint: Constraint,
        counters: Counters,
        rows: Rows,
        request_slots: RequestSlots,
        memory: Memory,
        queue: ResponseQueue,
    ) -> None:
        self._constraint, self._counters = constraint, counters
        self._rows, self._request_slots, self._memory, self._queue = rows, request_slots, memory, queue
        self._branching = Branching(grammar, rows, request_slots)

    def commit(self, batch: Batch, sampled: Sampled) -> None:
        """Takes what the planned engine step has sampled."""
        rows, slots = batch.sample_rows, self._rows.request_slot[batch.sample_rows]
        new = NewTokens(rows, slots, sampled.token_ids, sampled.logprobs, sampled.sampler_logprobs)
        self._rows.decoding[rows] = True
        if sampled.invalid.any():
            new = new.where(self._end_invalid(new, sampled.invalid))
        counts = np.bincount(new.slots, minlength=len(self._request_slots.tokens_left))
        self._request_slots.tokens_left -= counts
        accepted = self._within_budget(new, counts)
        if accepted is not None:
            new = new.where(accepted)
        position = self._rows.position[new.rows]
        self._append(new, position)
        self._advance_phases(new)
        self._end_stopped(new)
        self._structural_tokens(new)
        self._end_by_length(new, position, counts)
        self._counters.steps += 1

    def _append(self, new: NewTokens, position: NDArray[np.int32]) -> None:
        """One token more for each of the rows."""
        rows, row = self._rows, new.rows
        end = rows.num_tokens[row]
        if len(row):
            rows.need_capacity(int(end.max()) + 1)
        rows.tokens[row, end], rows.forced[row, end] = new.token_ids, False
        rows.logprobs[row, end], rows.sampler_logprobs[row, end] = new.logprobs, new.sampler_logprobs
        rows.steps[row, end], rows.positions[row, end] = self._counters.steps, position
        rows.num_tokens[row] = end + 1
        self._counters.sampled_tokens += len(row)

    def _end_invalid(self, new: NewTokens, invalid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Ends the responses of rows without a distribution; which rows are left, bool [S]. Nobody else has
        seen their KV but the users of their prompt: the last of them takes it along."""
        for slot in np.unique(new.slots[invalid]).tolist():
            response = self._queue.in_slot(slot)
            assert response is not None
            self._queue.finish(response, NO_DISTRIBUTION)
            self._memory.prompts.forget(response.prefix_ids, self._counters.steps)
        left: NDArray[np.bool_] = self._rows.request_slot[new.rows] >= 0
        return left

    def _within_budget(self, new: NewTokens, counts: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which sampled tokens max_tokens still allows, the first ones in packed order, bool [S]; None: all
        of them. `counts` [request slots] are the tokens that each response has sampled."""
        left = self._request_slots.tokens_left
        over = np.flatnonzero(left < 0)
        if len(over) == 0:
            return None
        accepted = np.ones(len(new.rows), np.bool_)
        for slot in over.tolist():
            response = self._queue.in_slot(slot)
            assert response is not None
            allowed = int(counts[slot] + left[slot])
            mine = set(new.rows[new.slots == slot].tolist())
            order = [branch.row for branch in response.branches_on_rows() if branch.row in mine]
            accepted[np.isin(new.rows, order[allowed:])] = False
            left[slot] = 0
        return accepted

    def _advance_phases(self, new: NewTokens) -> None:
        """What the tokens of constrained responses mean for the next mask."""
        if self._request_slots.num_constrained == 0:
            return
        constrained = self._request_slots.constrained[new.slots]
        row, token = new.rows[constrained], new.token_ids[constrained]
        rows, states = self._rows, self._rows.state[row]
        rows.phase[row] = self._constraint.following(states, rows.phase[row], token)
        for place in row[self._constraint.may_answer(states, token)].tolist():
            answered = self._branching.has_answer(self._queue.owner(place))
            rows.phase[place] = Phase.CLOSABLE if answered else Phase.BEGUN

    def _end_stopped(self, new: NewTokens) -> None:
        """Ends responses by their stop tokens."""
        if self._request_slots.stop_ids.shape[1] == 0:
            return
        stopped = (self._request_slots.stop_ids[new.slots] == new.token_ids[:, None]).any(1)
        for slot in np.unique(new.slots[stopped]).tolist():
            response = self._queue.in_slot(slot)
            assert response is not None
            self._queue.finish(response, "stopped")

    def _structural_tokens(self, new: NewTokens) -> None:
        """Forks, joins and ends by tags and EOS; other tags only move the state of their row."""
        classes = self._constraint.classes[new.token_ids]
        structural = np.flatnonzero(classes >= TokenClass.EOS)
        following = QUIET_TAGS[self._rows.state[new.rows[structural]], classes[structural]]
        quiet = following >= 0
        self._rows.state[new.rows[structural[quiet]]] = following[quiet]
        constrained = self._request_slots.constrained[new.slots[structural]]
        numbered = (classes[structural] == TokenClass.PLAN) & constrained
        for index in structural[~quiet | numbered].tolist():
            self._structural_token(int(new.rows[index]), int(new.slots[index]), TokenClass(classes[index]))

    def _structural_token(self, row: int, slot: int, token: TokenClass) -> None:
        """What one tag or EOS does to its response."""
        response, step = self._queue.in_slot(slot), self._counters.steps
        if response is None:
            return  # another of its branches, or a stop token, has just ended it
        if self._request_slots.constrained[slot] and token is TokenClass.PLAN:
            reason = self._branching.number_plan(response, step)
        else:
            reason = self._branching.structural(response, self._memory.branch_at[row], token, step)
        if reason is not None:
            self._queue.finish(response, reason)

    def _end_by_length(self, new: NewTokens, position: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """Ends responses that have used up max_tokens, or that would go on beyond their critical path."""
        at_end = (position >= self._request_slots.last_position[new.slots]) & self._rows.decoding[new.rows]
        used_up = (counts > 0) & (self._request_slots.tokens_left <= 0)
        for slot in {*new.slots[at_end].tolist(), *np.flatnonzero(used_up).tolist()}:
            response = self._queue.in_slot(slot)
            if response is not None:
                self._queue.finish(response, "length")
