"""What a sampled tag or EOS does to a response: fork, close a branch, join, or end."""

from __future__ import annotations

from npr_engine.language.constraint import Phase
from npr_engine.language.grammar import Grammar
from npr_engine.language.parser import State
from npr_engine.language.tree import Defect
from npr_engine.language.vocabulary import TokenClass
from npr_engine.scheduler.request_slots import RequestSlots
from npr_engine.scheduler.response_state import (
    Branch,
    Feed,
    Fork,
    Join,
    Open,
    Record,
    ResponseState,
    Resume,
    branch_key,
)
from npr_engine.scheduler.rows import Rows
from npr_ext.layout.violations import Violation

BAD_PLANS = {Violation.PLAN_NUMBERING, Violation.EMPTY_PLAN, Violation.TEXT_IN_GUIDELINE}


class Branching:
    """Reads the grammar, writes tokens and work of responses. Every answer is a finish reason, or None to go on."""

    def __init__(self, grammar: Grammar, rows: Rows, request_slots: RequestSlots) -> None:
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._rows = rows
        self._request_slots = request_slots

    def structural(self, response: ResponseState, branch: Branch, token: TokenClass, step: int) -> str | None:
        """A tag or EOS was sampled in `step` and is the last token of the branch's row."""
        if not response.request.params.branching:
            return self._in_plain_text(response, branch, token)
        if branch.number == 0:
            return self._in_trunk(response, token, step)
        if token is TokenClass.STEP_END:  # the branch stands inside its forced <step>
            return self._close(response, branch, step)
        parser = response.parser.branch(branch.number)
        parser.extend(self._rows.tokens[branch.row, : self._rows.num_tokens[branch.row]])
        assert parser.structural is not None
        return malformed(parser.structural)

    def number_plan(self, response: ResponseState, step: int) -> str | None:
        """A constrained response opened a plan: the engine writes its `N:`."""
        self._parse_trunk(response)
        row = response.trunk.row
        forced = self._vocabulary.forced_plan(response.parser.num_plans + 1)
        return self._force(response, forced, int(self._rows.position[row]) + 1, step)

    def has_answer(self, response: ResponseState) -> bool:
        """Whether the text after the trunk's last tag holds a \\boxed answer that is not empty."""
        self._parse_trunk(response)
        return response.parser.has_answer

    def _parse_trunk(self, response: ResponseState) -> None:
        row = response.trunk.row
        count = int(self._rows.num_tokens[row])
        response.parser.extend(self._rows.tokens[row, response.parsed : count])
        response.parsed = count

    def _in_plain_text(self, response: ResponseState, branch: Branch, token: TokenClass) -> str | None:
        if token is TokenClass.EOS and not response.request.params.ignore_eos:
            return "eos"
        if token is TokenClass.STEP:
            self._rows.step_start[branch.row] = self._rows.num_tokens[branch.row]
        elif token is TokenClass.STEP_END:
            self._rows.step_start[branch.row] = -1
        return None

    def _in_trunk(self, response: ResponseState, token: TokenClass, step: int) -> str | None:
        parser = response.parser
        self._parse_trunk(response)
        if parser.structural is not None:
            return malformed(parser.structural)
        if token is TokenClass.EOS:
            return "eos"
        if token is not TokenClass.GUIDELINE_END:
            return None
        bad = next((defect for defect in parser.defects if defect.violation in BAD_PLANS), None)
        return malformed(bad) if bad is not None else self._fork(response, step)

    def _fork(self, response: ResponseState, step: int) -> str | None:
        """Opens a branch per plan with its forced text, if the budgets allow all of them one token more."""
        row, slot, params = response.trunk.row, response.request_slot, response.request.params
        numbers = range(1, response.parser.num_plans + 1)
        forced = [self._vocabulary.forced_step(number) for number in numbers]
        first = int(self._rows.position[row]) + 1
        num_forced = sum(map(len, forced))
        if (
            len(forced) > params.max_branches
            or len(response.forks) >= params.max_blocks
            or self._request_slots.tokens_left[slot] < num_forced + len(forced)
            or self._request_slots.last_position[slot] < first + max(map(len, forced))
        ):
            return "budget"
        self._request_slots.tokens_left[slot] -= num_forced
        block, key = len(response.forks), response.request.key
        branches = [
            Branch(
                number,
                branch_key(key, block, number),
                record=Record.given(ids, first, step + 1),
                step_start=0,
                state=State.STEP,
            )
            for number, ids in zip(numbers, forced, strict=True)
        ]
        fork = Fork(int(self._rows.num_tokens[row]), branches, open=len(branches))
        response.forks.append(fork)
        self._rows.decoding[row] = False
        response.work.append(Feed(response.trunk, fork.trunk_tokens))
        response.work.append(Open(fork))
        response.work.append(Resume(tuple(branches)))
        return None

    def _close(self, response: ResponseState, branch: Branch, step: int) -> str | None:
        fork = response.forks[-1]
        branch.closed = True
        fork.open -= 1
        self._rows.decoding[branch.row] = False
        response.work.append(Feed(branch, None))
        return self._close_block(response, fork, step) if fork.open == 0 else None

    def _close_block(self, response: ResponseState, fork: Fork, step: int) -> str | None:
        """All branches have closed: the trunk goes on with the forced opening of the takeaway."""
        rows, trunk = self._rows, response.trunk
        taken = [rows.tokens[branch.row, : rows.num_tokens[branch.row]] for branch in fork.branches]
        response.parser.join(taken)
        position = int(rows.positions[fork.branches[0].row, 0]) + max(map(len, taken))
        response.work.append(Join(fork))
        rows.state[trunk.row], rows.phase[trunk.row] = State.TAKEAWAY, Phase.EMPTY
        return self._force(response, self._vocabulary.forced_takeaway, position, step)

    def _force(
        self, response: ResponseState, forced: tuple[int, ...], position: int, step: int
    ) -> str | None:
        """The engine goes on writing the trunk from `position` on, if the budgets allow one token more than that."""
        slot, trunk = response.request_slot, response.trunk
        after = position + len(forced)
        if (
            self._request_slots.tokens_left[slot] <= len(forced)
            or self._request_slots.last_position[slot] < after
        ):
            return "budget"
        self._request_slots.tokens_left[slot] -= len(forced)
        Record.given(forced, position, step + 1).append_to(self._rows, trunk.row)
        self._rows.decoding[trunk.row] = False
        response.work.append(Resume((trunk,)))
        return None


def malformed(defect: Defect) -> str:
    """The finish reason of a response that broke the language."""
    return f"malformed({defect.violation.name})"


def error(cause: str) -> str:
    """The finish reason of a response that could not be decoded further."""
    return f"error({cause})"


def is_error(reason: str) -> bool:
    return reason.startswith("error(")
