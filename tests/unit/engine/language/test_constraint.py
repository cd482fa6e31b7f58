"""The table of allowed tokens against the grammar: a token is forbidden exactly where it would be a fault."""

from __future__ import annotations

import numpy as np
import pytest

from npr_engine.language.constraint import Constraint, Phase
from npr_engine.language.parser import State
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.sampling import SamplingParams
from npr_engine.testing import EOS, GRAMMAR, PIECES, VOCABULARY, answer, block, encode
from npr_ext.errors import UserError
from npr_ext.layout.violations import Violation

EARLY_END = {Violation.NO_BOXED_ANSWER, Violation.EMPTY_BOXED_ANSWER, Violation.NO_EOS}
RESPONSES = [
    block("a|b", "c|d") + "\n\n" + block("e|f") + answer("7"),
    "abc \\boxed{} {a} \\boxed{3}<eos>",
    "ab\\boxed{a}c\\boxed{} d\\boxed{b}<eos>",
]


def is_fault(prefix: list[int], token: int) -> bool:
    """Whether the grammar objects to this token after the prefix."""
    reading = GRAMMAR.read([*prefix, token])
    if token == EOS:
        return reading.defect is not None
    unfinished = reading.structural is not None and reading.structural.token_index > len(prefix)
    structural = None if unfinished else reading.structural
    found = {defect.violation for defect in (*reading.defects, structural) if defect}
    return bool(found - EARLY_END)


@pytest.mark.parametrize("text", RESPONSES)
def test_a_tag_is_forbidden_exactly_where_the_grammar_objects(text: str) -> None:
    constraint = Constraint(VOCABULARY, len(PIECES))
    parser, prefix, phase = GRAMMAR.parser(), list[int](), Phase.EMPTY
    compared = 0
    for token in encode(text):
        state = parser.state
        opening = state in (State.PLAN, State.STEP) and phase is not Phase.CLOSABLE  # the engine writes `N:`
        if state not in (State.BEFORE_STEP, State.BEFORE_TAKEAWAY) and not opening:
            (mask,) = constraint.masks(np.array([state], np.int8), np.array([phase], np.int8))
            for candidate in (EOS, *VOCABULARY.tag_ids):
                assert constraint.forbidden[mask, candidate] == is_fault(prefix, candidate), (
                    VOCABULARY.text(prefix),
                    PIECES[candidate],
                )
            assert not constraint.forbidden[mask, token], "what was written must be allowed"
            compared += 1
        (phase,) = constraint.following(
            np.array([state], np.int8), np.array([phase], np.int8), np.array([token], np.int32)
        )
        parser.feed(token)
        prefix.append(token)
        if constraint.may_answer(np.array([state], np.int8), np.array([token]))[0]:
            phase = Phase.CLOSABLE if parser.has_answer else Phase.BEGUN
        phase = Phase(phase)
        if parser.state in (State.PLAN, State.STEP) and PIECES[token] in "\n 1234:":
            phase = Phase.EMPTY
    assert compared > 10


def test_parts_of_characters_do_not_fill_a_plan_but_printable_pieces_do() -> None:
    pieces = (*VOCABULARY.pieces, b"\xc2", b"\xa0", " ", "", "é", " é")
    vocabulary = Vocabulary(pieces, EOS, VOCABULARY.tags)
    constraint = Constraint(vocabulary, len(pieces) + 2)
    tokens = np.arange(len(PIECES), len(pieces) + 2, dtype=np.int32)
    states = np.full(len(tokens), State.PLAN, np.int8)
    phases = constraint.following(states, np.zeros_like(states), tokens)
    assert (phases == Phase.CLOSABLE).tolist() == [False, False, False, False, True, True, False, False]


def test_unmasked_rows_are_mask_zero() -> None:
    constraint = Constraint(VOCABULARY, len(PIECES) + 5)
    assert not constraint.forbidden[0].any()
    assert constraint.forbidden.shape == (1 + len(State) * len(Phase), len(PIECES) + 5)


def test_a_constraint_without_branches_is_a_mistake() -> None:
    with pytest.raises(UserError, match="branching=True"):
        SamplingParams(max_tokens=1, constrain=True, branching=False)
