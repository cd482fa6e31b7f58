"""The grammar, case by case."""

import time

import pytest

from npr_engine.language.boxed import last_boxed
from npr_engine.language.grammar import Defect, Response
from npr_engine.testing import GRAMMAR, VOCABULARY, answer, block, encode
from npr_ext.layout.violations import Violation

ONE = block("a|b")
TWO = block("a|b", "c|d")
DONE = answer("7")

DEFECTIVE = {
    "text before the first block": ("abc" + ONE + DONE, Violation.PREAMBLE),
    "text between two blocks": (ONE + "a" + TWO + DONE, Violation.TEXT_AROUND_BLOCK),
    "text between two plans": (TWO.replace("</plan>\n", "</plan>a", 1) + DONE, Violation.TEXT_IN_GUIDELINE),
    "text between two steps": (TWO.replace("</step>\n", "</step>a", 1) + DONE, Violation.TEXT_BETWEEN_STEPS),
    "text before a step": (
        ONE.replace("line>\n<step>", "line>x<step>") + DONE,
        Violation.TEXT_BETWEEN_STEPS,
    ),
    "text before the end": (
        ONE.replace("\n<takeaway>", "x<takeaway>") + DONE,
        Violation.TEXT_BETWEEN_STEPS,
    ),
    "plans out of order": (TWO.replace("<plan>2", "<plan>3") + DONE, Violation.PLAN_NUMBERING),
    "a plan twice": (TWO.replace("<plan>2", "<plan>1") + DONE, Violation.PLAN_NUMBERING),
    "a plan without number": (ONE.replace("<plan>1:", "<plan>") + DONE, Violation.PLAN_NUMBERING),
    "a step of another plan": (TWO.replace("<step>\n2", "<step>\n1") + DONE, Violation.STEP_NUMBERING),
    "an empty plan": (block(" |b") + DONE, Violation.EMPTY_PLAN),
    "an empty step": (block("a| ") + DONE, Violation.EMPTY_STEP),
    "an empty takeaway": (block("a|b", takeaway="") + DONE, Violation.EMPTY_TAKEAWAY),
    "no boxed answer": (ONE + "\n7<eos>", Violation.NO_BOXED_ANSWER),
    "an empty boxed answer": (ONE + answer(" "), Violation.EMPTY_BOXED_ANSWER),
    "an open boxed answer": (ONE + "\\boxed{7<eos>", Violation.NO_BOXED_ANSWER),
    "no end of sequence": (ONE + "\\boxed{7}", Violation.NO_EOS),
    "tokens after the end": (ONE + DONE + "\n", Violation.TOKENS_AFTER_EOS),
    "a step without guideline": ("<step>\n1: a</step>" + DONE, Violation.STRAY_TAG),
    "a stray tag after the last block": (ONE + "</takeaway>" + DONE, Violation.STRAY_TAG),
    "a plan after the guideline": (ONE.replace("\n<step>", "<plan>", 1) + DONE, Violation.STRAY_TAG),
    "a nested guideline": (ONE.replace("\n<plan>", "<guideline>", 1) + DONE, Violation.NESTED_TAG),
    "a tag inside a step": (ONE.replace("1: b", "1: <step>b") + DONE, Violation.NESTED_TAG),
    "a wrong closing tag": (ONE.replace("</plan>", "</step>") + DONE, Violation.MISMATCHED_TAG),
    "a guideline without plan": ("<guideline>a</guideline>" + DONE, Violation.GUIDELINE_WITHOUT_PLAN),
    "a missing step": (TWO.replace("<step>\n2: d\n</step>\n", "") + DONE, Violation.MISSING_STEP),
    "an extra step": (ONE.replace("</step>", "</step>\n<step>\n2: d</step>") + DONE, Violation.EXTRA_STEP),
    "a guideline instead of steps": (ONE.split("<step>")[0] + TWO + DONE, Violation.UNFINISHED_BLOCK),
    "no takeaway, a guideline": (
        ONE.split("<takeaway>")[0] + TWO + DONE,
        Violation.MISSING_TAKEAWAY,
    ),
    "an end inside the guideline": ("<guideline>\n<eos>", Violation.UNCLOSED_GUIDELINE),
    "an end inside a plan": ("<guideline><plan>1: a<eos>", Violation.UNCLOSED_PLAN),
    "an end inside a step": (ONE.split("</step>")[0], Violation.UNCLOSED_STEP),
    "an end before the last step": (ONE.split("<step>")[0], Violation.UNFINISHED_BLOCK),
    "an end before the takeaway": (ONE.split("<takeaway>")[0], Violation.MISSING_TAKEAWAY),
    "an end inside the takeaway": (ONE.split("</takeaway>")[0] + "<eos>", Violation.UNCLOSED_TAKEAWAY),
}


@pytest.mark.parametrize("case", DEFECTIVE)
def test_every_way_to_be_wrong_has_its_own_violation(case: str) -> None:
    text, violation = DEFECTIVE[case]
    found = GRAMMAR.parse(encode(text))
    assert isinstance(found, Defect) and found.violation is violation, found


@pytest.mark.parametrize("text", [ONE + DONE, TWO + "\n\n" + ONE + DONE, DONE, "a b" + DONE])
def test_canonical_text_is_valid(text: str) -> None:
    assert isinstance(GRAMMAR.parse(encode(text)), Response)


@pytest.mark.parametrize("gap", ["", " ", "\n\n", " \n "])
def test_any_whitespace_may_stand_between_tags(gap: str) -> None:
    ids = encode((TWO + DONE).replace(">\n<", f">{gap}<"))
    assert isinstance(GRAMMAR.parse(ids), Response)


def test_a_response_without_block_is_a_defect_only_where_a_block_is_required() -> None:
    ids = encode(DONE)
    found = GRAMMAR.parse(ids, require_block=True)
    assert isinstance(found, Defect) and (found.violation, found.token_index) == (
        Violation.NO_BLOCK,
        len(ids),
    )


def test_spans_hold_the_texts_between_the_tags() -> None:
    ids = encode(block("a|b", "cc|dd", takeaway="e") + "\n\n" + ONE + answer("7"))
    response = GRAMMAR.parse(ids)
    assert isinstance(response, Response) and len(response.blocks) == 2 and response.eos
    first = response.blocks[0]
    assert [GRAMMAR.text(ids, span) for span in first.plans] == ["a", "cc"]
    assert [GRAMMAR.text(ids, span) for span in first.steps] == ["b", "dd"]
    assert [span.number for span in first.steps] == [1, 2]
    assert GRAMMAR.text(ids, first.takeaway) == "e"
    assert VOCABULARY.text(ids[first.guideline.start : first.guideline.end]).startswith("\n<plan>1: a</plan>")
    assert GRAMMAR.text(ids, response.conclusion) == "\\boxed{7}" and len(response.preamble) == 0


def test_a_defect_tells_its_token_and_the_blocks_before_it() -> None:
    found = GRAMMAR.parse(encode(ONE + TWO + "</plan>" + DONE))
    assert isinstance(found, Defect)
    assert found.token_index == len(encode(ONE + TWO)) and found.complete_blocks == 2
    assert str(found.token_index) in found.message


def test_the_tag_structure_outranks_earlier_texts_and_all_defects_are_listed() -> None:
    ids = encode("x" + ONE.replace("</plan>\n", "</plan>a") + "</plan>" + DONE)
    reading = GRAMMAR.read(ids)
    assert reading.structural is not None and reading.structural.violation is Violation.STRAY_TAG
    assert [d.violation for d in reading.defects] == [Violation.PREAMBLE, Violation.TEXT_IN_GUIDELINE]
    assert GRAMMAR.parse(ids) == reading.structural


def test_text_before_the_end_is_no_preamble_without_a_block() -> None:
    response = GRAMMAR.parse(encode("a" + DONE))
    assert isinstance(response, Response) and len(response.preamble) == 0 and response.conclusion.start == 0


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{}", ""),
        ("boxed 1", None),
    ],
)
def test_the_last_complete_boxed_counts(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_a_branch_is_parsed_alone_and_joined_in_packed_order() -> None:
    text = block("a|b", "c|d")
    trunk = GRAMMAR.parser()
    trunk.extend(encode(text[: text.index("</guideline>")] + "</guideline>"))
    branches = [encode("\n<step>\n1: b\n</step>"), encode("\n<step>\n2: d\n</step>")]
    for number, ids in enumerate(branches, 1):
        branch = trunk.branch(number)
        branch.extend(ids)
        assert branch.defect is None
    wrong = trunk.branch(2)
    wrong.extend(encode("\n<step>\n1: d\n</step>"))
    assert wrong.defect is not None and wrong.defect.violation is Violation.STEP_NUMBERING
    trunk.join(branches)
    trunk.extend(encode("\n<takeaway>\n8\n</takeaway>" + DONE))
    assert trunk.finish().response == GRAMMAR.parse(encode(text + DONE))


def test_forced_text_is_what_the_canonical_form_says() -> None:
    assert list(VOCABULARY.forced_step(12)) == encode("\n<step>\n12:")
    assert list(VOCABULARY.forced_takeaway) == encode("\n<takeaway>\n")


def test_a_plain_token_costs_less_than_a_microsecond() -> None:
    ids = encode(block("a|" + "b" * 50_000, "c|" + "d" * 50_000) + DONE)
    best = min(_seconds(ids) for _ in range(3))
    assert best / len(ids) < 1e-6


def _seconds(ids: list[int]) -> float:
    start = time.thread_time()
    GRAMMAR.parse(ids)
    return time.thread_time() - start
