"""Incremental parser over token ids: npr_ext's tag machine, and the checks of the texts that its tags close."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from npr_engine.language.boxed import BoxedReader, last_boxed
from npr_engine.language.token_ids import TokenIds
from npr_engine.language.tree import Block, Defect, Reading, Response, Span
from npr_engine.language.vocabulary import TokenClass, Vocabulary
from npr_ext.layout.violations import MESSAGES, Violation

NUMBER = re.compile(r"\s*(\d+)[ \t]*:")
_MOST_DIGITS = 18
_FIRST_STRUCTURAL = int(TokenClass.EOS)
_TEXT = bytes((TokenClass.TEXT,))


def _value(digits: str) -> int:
    """A number as written, -1 for one that no block can count to: Python refuses to read thousands of digits."""
    return int(digits) if len(digits) <= _MOST_DIGITS else -1


class State(IntEnum):
    """Where a response stands; the states of npr_ext's layout machine."""

    TRUNK = 0
    GUIDELINE = 1
    PLAN = 2
    BEFORE_STEP = 3
    STEP = 4
    BEFORE_TAKEAWAY = 5
    TAKEAWAY = 6


# Tags that continue a valid response; every other tag is a violation.
_NEXT: dict[tuple[State, TokenClass], State] = {
    (State.TRUNK, TokenClass.GUIDELINE): State.GUIDELINE,
    (State.GUIDELINE, TokenClass.PLAN): State.PLAN,
    (State.GUIDELINE, TokenClass.GUIDELINE_END): State.BEFORE_STEP,
    (State.PLAN, TokenClass.PLAN_END): State.GUIDELINE,
    (State.BEFORE_STEP, TokenClass.STEP): State.STEP,
    (State.STEP, TokenClass.STEP_END): State.BEFORE_STEP,
    (State.BEFORE_TAKEAWAY, TokenClass.TAKEAWAY): State.TAKEAWAY,
    (State.TAKEAWAY, TokenClass.TAKEAWAY_END): State.TRUNK,
}


def _quiet_tags() -> NDArray[np.int8]:
    """int8 [states, classes]: the next state after a tag that continues a valid response and opens or closes
    no branch, else -1. Whoever decodes may pass such a tag over and have it parsed later."""
    table = np.full((len(State), len(TokenClass)), -1, np.int8)
    for (state, token_class), following in _NEXT.items():
        if following in (State.TRUNK, State.GUIDELINE, State.PLAN):
            table[state, token_class] = following
    return table


QUIET_TAGS = _quiet_tags()
_SPECIFIC: dict[tuple[State, TokenClass], Violation] = {
    (State.BEFORE_STEP, TokenClass.TAKEAWAY): Violation.MISSING_STEP,
    (State.BEFORE_STEP, TokenClass.GUIDELINE): Violation.UNFINISHED_BLOCK,
    (State.BEFORE_TAKEAWAY, TokenClass.STEP): Violation.EXTRA_STEP,
    (State.BEFORE_TAKEAWAY, TokenClass.GUIDELINE): Violation.MISSING_TAKEAWAY,
}
_UNFINISHED: dict[State, Violation] = {
    State.GUIDELINE: Violation.UNCLOSED_GUIDELINE,
    State.PLAN: Violation.UNCLOSED_PLAN,
    State.BEFORE_STEP: Violation.UNFINISHED_BLOCK,
    State.STEP: Violation.UNCLOSED_STEP,
    State.BEFORE_TAKEAWAY: Violation.MISSING_TAKEAWAY,
    State.TAKEAWAY: Violation.UNCLOSED_TAKEAWAY,
}
_GAP = {
    State.GUIDELINE: Violation.TEXT_IN_GUIDELINE,
    State.BEFORE_STEP: Violation.TEXT_BETWEEN_STEPS,
    State.BEFORE_TAKEAWAY: Violation.TEXT_BETWEEN_STEPS,
}
_OPENS_TEXT_IN = (State.GUIDELINE, State.PLAN, State.STEP, State.TAKEAWAY)


class Parser:
    """Feed tokens one by one or many at once; `structural` and `defects` tell what is wrong so far.

    Text between two tags is looked at when the later tag arrives. After EOS or a structural violation the
    parser only counts. A response with branches is fed in packed order; `branch(n)` gives a parser for branch
    n alone and `join` takes all of them in.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._classes = bytearray()
        self.state = State.TRUNK
        self.structural: Defect | None = None
        self.defects: list[Defect] = []
        self.blocks: list[Block] = []
        self.num_plans = 0
        self.num_steps = 0
        self._plans: list[Span] = []
        self._steps: list[Span] = []
        self._guideline = Span(0, 0)
        self._first_guideline: int | None = None
        self._eos: int | None = None
        self._text_start = 0  # first token after the last tag
        self._guideline_start = 0
        self._boxed: BoxedReader | None = (
            None  # of the text after the last tag, read up to token `_boxed_end`
        )
        self._boxed_end = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def defect(self) -> Defect | None:
        """The structural violation, else the first defect of a text, else None."""
        return self.structural or next(iter(self.defects), None)

    @property
    def has_answer(self) -> bool:
        """Whether the text after the last tag holds a \\boxed{...} that is not empty; asked again, only what
        is new is read."""
        if self._boxed is None:
            self._boxed, self._boxed_end = BoxedReader(), self._text_start
        self._boxed.feed(self._vocabulary.text(self._ids[self._boxed_end :]))
        self._boxed_end = len(self._ids)
        return bool(self._boxed.answer)

    def feed(self, token_id: int) -> None:
        """Takes one token."""
        self.extend((token_id,))

    def extend(self, token_ids: TokenIds) -> None:
        """Takes tokens, int [n]."""
        ids: list[int] = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
        classes = self._vocabulary.class_bytes(ids)
        start = len(self._ids)
        self._ids += ids
        self._classes += classes
        if self.structural is not None or self._eos is not None:
            return
        for offset, token_class in enumerate(classes):
            if token_class >= _FIRST_STRUCTURAL:
                self._structural_token(start + offset)
                if self.structural is not None or self._eos is not None:
                    return

    def branch(self, number: int) -> Parser:
        """A parser for branch `number` (1..n) of the block whose guideline was just closed."""
        assert self.state is State.BEFORE_STEP and self.num_steps == 0, (self.state, self.num_steps)
        assert 1 <= number <= self.num_plans, (number, self.num_plans)
        branch = Parser(self._vocabulary)
        branch.state = State.BEFORE_STEP
        branch.num_plans, branch.num_steps = self.num_plans, number - 1
        return branch

    def join(self, branches: Iterable[TokenIds]) -> None:
        """Takes the tokens of branches 1..n in packed order."""
        for token_ids in branches:
            self.extend(token_ids)

    def finish(self, *, require_block: bool = False) -> Reading:
        """What was found when the response ends here; the parser may be fed on."""
        end = len(self._ids)
        structural, defects = self.structural, list(self.defects)
        if structural is None and self.state is not State.TRUNK:
            structural = self._defect(_UNFINISHED[self.state], end)
        text_end = end if self._eos is None else self._eos
        start = self._text_start if self.state is State.TRUNK else text_end
        conclusion = Span(min(start, text_end), text_end)
        if structural is None:
            defects += self._closing_defects(conclusion, end, require_block)
        preamble = Span(0, 0 if self._first_guideline is None else self._first_guideline)
        response = Response(preamble, tuple(self.blocks), conclusion, eos=self._eos is not None)
        return Reading(response, structural, tuple(defects))

    def _closing_defects(self, conclusion: Span, end: int, require_block: bool) -> list[Defect]:
        found = []
        if require_block and not self.blocks:
            found.append(self._defect(Violation.NO_BLOCK, end))
        boxed = last_boxed(self._vocabulary.text(self._ids[conclusion.start : conclusion.end]))
        if boxed is None:
            found.append(self._defect(Violation.NO_BOXED_ANSWER, conclusion.end))
        elif not boxed:
            found.append(self._defect(Violation.EMPTY_BOXED_ANSWER, conclusion.end))
        if self._eos is None:
            found.append(self._defect(Violation.NO_EOS, end))
        elif self._eos != end - 1:
            found.append(self._defect(Violation.TOKENS_AFTER_EOS, self._eos + 1))
        return found

    def _structural_token(self, index: int) -> None:
        """Takes the tag or EOS at `index`; everything before it is known."""
        token_class = TokenClass(self._classes[index])
        if token_class is TokenClass.EOS:
            if self.state is State.TRUNK:
                self._eos = index
            else:
                self.structural = self._defect(_UNFINISHED[self.state], index)
            return
        following = _NEXT.get((self.state, token_class))
        violation = self._violation(token_class) if following is None else Violation.OK
        if token_class is TokenClass.GUIDELINE_END and following is not None and self.num_plans == 0:
            violation = Violation.GUIDELINE_WITHOUT_PLAN
        if violation is not Violation.OK:
            self.structural = self._defect(violation, index)
            return
        assert following is not None
        self._close_text(Span(self._text_start, index), token_class)
        self.state = following
        if following is State.BEFORE_STEP and self.num_steps == self.num_plans:
            self.state = State.BEFORE_TAKEAWAY
        self._text_start = index + 1
        self._boxed = None

    def _violation(self, token_class: TokenClass) -> Violation:
        specific = _SPECIFIC.get((self.state, token_class))
        if specific is not None:
            return specific
        if self.state in _OPENS_TEXT_IN:
            opens = (token_class - TokenClass.GUIDELINE) % 2 == 0
            return Violation.NESTED_TAG if opens else Violation.MISMATCHED_TAG
        return Violation.STRAY_TAG

    def _close_text(self, text: Span, tag: TokenClass) -> None:
        """Checks and files the text that ends at `tag`, in the state before it."""
        match self.state:
            case State.TRUNK:
                self._open_block(text)
            case State.PLAN:
                self.num_plans += 1
                violations = (Violation.PLAN_NUMBERING, Violation.EMPTY_PLAN)
                self._plans.append(self._numbered(text, self.num_plans, *violations))
            case State.STEP:
                self.num_steps += 1
                violations = (Violation.STEP_NUMBERING, Violation.EMPTY_STEP)
                self._steps.append(self._numbered(text, self.num_steps, *violations))
            case State.TAKEAWAY:
                if not self._has_text(text):
                    self._note(Violation.EMPTY_TAKEAWAY, text.end)
                self.blocks.append(Block(self._guideline, tuple(self._plans), tuple(self._steps), text))
            case _:
                self._check_gap(text, _GAP[self.state])
        if tag is TokenClass.GUIDELINE_END:
            self._guideline = Span(self._guideline_start, text.end)

    def _open_block(self, text: Span) -> None:
        if self._first_guideline is None:
            self._first_guideline = text.end
            self._check_gap(text, Violation.PREAMBLE)
        else:
            self._check_gap(text, Violation.TEXT_AROUND_BLOCK)
        self.num_plans = self.num_steps = 0
        self._plans, self._steps = [], []
        self._guideline_start = text.end + 1

    def _numbered(self, text: Span, number: int, numbering: Violation, empty: Violation) -> Span:
        """The span of a plan or step, after checks of its `N:` and of the text behind it."""
        content = self._vocabulary.text(self._ids[text.start : text.end])
        match = NUMBER.match(content)
        if match is None or _value(match[1]) != number:
            self._note(numbering, text.start)
        if not content[match.end() if match else 0 :].strip():
            self._note(empty, text.end)
        return Span(text.start, text.end, number)

    def _check_gap(self, text: Span, violation: Violation) -> None:
        index = self._classes.find(_TEXT, text.start, text.end)
        if index >= 0:
            self._note(violation, index)

    def _has_text(self, text: Span) -> bool:
        return self._classes.find(_TEXT, text.start, text.end) >= 0

    def _note(self, violation: Violation, index: int) -> None:
        self.defects.append(self._defect(violation, index))

    def _defect(self, violation: Violation, index: int) -> Defect:
        message = f"token {index}: {MESSAGES[violation]}"
        return Defect(violation, index, message, len(self.blocks))
