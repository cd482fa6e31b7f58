"""The one table of violation codes: what can be wrong with a response, for the layout and for the grammar.

Codes below 100 are found by the layout (tags alone, CPU and CUDA) and by the grammar alike, at the same
token. Codes from 100 on need the text of the tokens, so only the grammar finds them.
`include/npr/layout/layout_rules.h` mirrors the codes below 100.

The token index of a violation is the index of the first token that cannot continue a valid response. For text that
merely ends too early (UNCLOSED_*, UNFINISHED_BLOCK or MISSING_TAKEAWAY at the end) it is the end of the sequence.
"""

from enum import IntEnum


class Violation(IntEnum):
    """Why a response is malformed; 0 is none."""

    OK = 0
    STRAY_TAG = 1
    NESTED_TAG = 2
    MISMATCHED_TAG = 3
    GUIDELINE_WITHOUT_PLAN = 4
    MISSING_STEP = 5
    EXTRA_STEP = 6
    UNFINISHED_BLOCK = 7
    MISSING_TAKEAWAY = 8
    UNCLOSED_GUIDELINE = 9
    UNCLOSED_PLAN = 10
    UNCLOSED_STEP = 11
    UNCLOSED_TAKEAWAY = 12
    BAD_BOUNDS = 90
    BAD_PROMPT_LENGTH = 91
    BAD_PARENT = 92

    PREAMBLE = 100
    PLAN_NUMBERING = 101
    STEP_NUMBERING = 102
    EMPTY_PLAN = 103
    EMPTY_STEP = 104
    EMPTY_TAKEAWAY = 105
    TEXT_IN_GUIDELINE = 106
    TEXT_BETWEEN_STEPS = 107
    TEXT_AROUND_BLOCK = 108
    NO_BOXED_ANSWER = 109
    EMPTY_BOXED_ANSWER = 110
    NO_EOS = 111
    TOKENS_AFTER_EOS = 112
    NO_BLOCK = 113


MESSAGES: dict[Violation, str] = {
    Violation.OK: "well-formed",
    Violation.STRAY_TAG: "a tag stands where no tag may stand",
    Violation.NESTED_TAG: "a tag opens inside another one that is still open",
    Violation.MISMATCHED_TAG: "a closing tag does not close the tag that is open",
    Violation.GUIDELINE_WITHOUT_PLAN: "a guideline closes without any plan",
    Violation.MISSING_STEP: "a takeaway opens before every plan has its step",
    Violation.EXTRA_STEP: "a step opens after every plan has had its step",
    Violation.UNFINISHED_BLOCK: "a block ends before every plan has its step",
    Violation.MISSING_TAKEAWAY: "a block ends without its takeaway",
    Violation.UNCLOSED_GUIDELINE: "the text ends inside a guideline",
    Violation.UNCLOSED_PLAN: "the text ends inside a plan",
    Violation.UNCLOSED_STEP: "the text ends inside a step",
    Violation.UNCLOSED_TAKEAWAY: "the text ends inside a takeaway",
    Violation.BAD_BOUNDS: "cu_seqlens does not rise from 0 to the number of tokens here",
    Violation.BAD_PROMPT_LENGTH: "the prompt length is negative or exceeds the segment",
    Violation.BAD_PARENT: "the parent is not the prompt-only segment that opens this group",
    Violation.PREAMBLE: "text stands before the first block",
    Violation.PLAN_NUMBERING: "plans are not numbered 1, 2, 3 in order",
    Violation.STEP_NUMBERING: "a step does not carry the number of its plan",
    Violation.EMPTY_PLAN: "a plan is empty",
    Violation.EMPTY_STEP: "a step is empty",
    Violation.EMPTY_TAKEAWAY: "a takeaway is empty",
    Violation.TEXT_IN_GUIDELINE: "text stands between the plans of a guideline",
    Violation.TEXT_BETWEEN_STEPS: "text stands between guideline, steps and takeaway",
    Violation.TEXT_AROUND_BLOCK: "text stands between two blocks",
    Violation.NO_BOXED_ANSWER: "the conclusion has no \\boxed{answer}",
    Violation.EMPTY_BOXED_ANSWER: "the \\boxed{} of the conclusion is empty",
    Violation.NO_EOS: "the response does not end with the end-of-sequence token",
    Violation.TOKENS_AFTER_EOS: "tokens follow the end-of-sequence token",
    Violation.NO_BLOCK: "the response has no parallel block",
}
