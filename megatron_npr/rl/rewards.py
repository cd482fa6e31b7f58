"""The format reward of stage 1, read off the one grammar (NPR, arXiv 2512.07461).

0      strictly valid, texts long enough
-1.5   no complete block, or stray text around the blocks
-1.0   guideline without plan, steps and plans differ in number, tags astray after a complete block,
       no non-empty \\boxed in the conclusion, not ended by EOS
else   the sum, at least -2, of -0.4 for text in a guideline, -0.2 for text between steps, -0.4 for every plan
       under 3 characters, -0.4 for every step and takeaway under 6, -0.4 for every wrong number
"""

from __future__ import annotations

from npr_engine.language.grammar import Block, Grammar, Reading
from npr_engine.language.token_ids import TokenIds
from npr_ext.layout.violations import Violation

NO_BLOCK = -1.5
BROKEN = -1.0
LOWEST = -2.0
MIN_PLAN, MIN_STEP, MIN_TAKEAWAY = 3, 6, 6
SHORT = -4

_COUNTS_DIFFER = {Violation.GUIDELINE_WITHOUT_PLAN, Violation.MISSING_STEP, Violation.EXTRA_STEP}
_AROUND_BLOCKS = {Violation.PREAMBLE, Violation.TEXT_AROUND_BLOCK, Violation.NO_BLOCK}
_UNANSWERED = {
    Violation.NO_BOXED_ANSWER,
    Violation.EMPTY_BOXED_ANSWER,
    Violation.NO_EOS,
    Violation.TOKENS_AFTER_EOS,
}
_BLEMISH = {
    Violation.TEXT_IN_GUIDELINE: -4,
    Violation.TEXT_BETWEEN_STEPS: -2,
    Violation.PLAN_NUMBERING: -4,
    Violation.STEP_NUMBERING: -4,
}
"""In tenths, as SHORT is."""
_TOO_SHORT = {Violation.EMPTY_PLAN, Violation.EMPTY_STEP, Violation.EMPTY_TAKEAWAY}


def format_reward(grammar: Grammar, response_ids: TokenIds) -> float:
    """0 for a valid response, negative otherwise. Of several reasons the gravest row of the table counts."""
    return reward_of_reading(grammar, response_ids, grammar.read(response_ids, require_block=True))


def reward_of_reading(grammar: Grammar, response_ids: TokenIds, reading: Reading) -> float:
    """The format reward of a response that was read already (with require_block)."""
    if reading.structural is not None:
        whole = bool(reading.structural.complete_blocks)
        return BROKEN if whole or reading.structural.violation in _COUNTS_DIFFER else NO_BLOCK
    found = [defect.violation for defect in reading.defects]
    if _AROUND_BLOCKS.intersection(found):
        return NO_BLOCK
    if _UNANSWERED.intersection(found):
        return BROKEN
    blemishes = sum(_BLEMISH[violation] for violation in found if violation not in _TOO_SHORT)
    short = sum(_num_short(grammar, response_ids, block) for block in reading.response.blocks)
    # Tenths are whole numbers, so that equal sums are equal floats: -0.2 three times is not -0.4 and -0.2.
    return max(LOWEST, (blemishes + SHORT * short) / 10)


def accuracy_reward(correct: bool) -> float:
    """+1 or -1."""
    return 1.0 if correct else -1.0


def _num_short(grammar: Grammar, response_ids: TokenIds, block: Block) -> int:
    """Plans, steps and takeaways of a block that are too short to say anything; empty ones among them."""
    limits = (
        *((plan, MIN_PLAN) for plan in block.plans),
        *((step, MIN_STEP) for step in block.steps),
        (block.takeaway, MIN_TAKEAWAY),
    )
    return sum(len(grammar.text(response_ids, span)) < limit for span, limit in limits)
