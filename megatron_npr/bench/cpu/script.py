"""What a scripted model says: one response with one block of branches.

<guideline> plans </guideline>  branches, all alike, in as many steps  <takeaway> ... </takeaway> ... <eos>
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npr_engine.language.vocabulary import Vocabulary
from npr_engine.sampling import SamplingParams

PLAN_TOKENS, TAKEAWAY_TOKENS, CONCLUSION_TOKENS = 6, 12, 12


@dataclass(frozen=True)
class Script:
    """A response whose branches say the same, so that a position alone tells the next token.

    Attributes:
        next_token: int64 [P], the token after each position; -1 where the engine forces it.
        trunk_tokens: sampled before the fork.
        branches, branch_tokens: sampled in each branch, `</step>` included.
        tail_tokens: sampled after the join, end of sequence included.
        forced_tokens: what the engine writes beside these.
    """

    next_token: Tensor
    trunk_tokens: int
    branches: int
    branch_tokens: int
    tail_tokens: int
    forced_tokens: int

    @property
    def sampled_tokens(self) -> int:
        return self.trunk_tokens + self.branches * self.branch_tokens + self.tail_tokens

    @property
    def params(self) -> SamplingParams:
        """Greedy, with just enough budget."""
        total = self.sampled_tokens + self.forced_tokens
        return SamplingParams(total, temperature=0.0, max_branches=self.branches)


def response_script(
    vocabulary: Vocabulary, prompt_length: int, *, branches: int = 5, branch_tokens: int = 100
) -> Script:
    """One block of `branches` branches of `branch_tokens` sampled tokens behind a prompt of that length."""
    tags, newline, text = vocabulary.tags, vocabulary.newline, vocabulary.encode_piece(":")[:1]
    trunk = [tags.guideline, *newline]
    for number in range(1, branches + 1):
        label = (*vocabulary.encode_piece(str(number)), *vocabulary.encode_piece(":"))
        trunk += [tags.plan, *label, *text * PLAN_TOKENS, tags.plan_end, *newline]
    trunk.append(tags.guideline_end)
    branch = [*text * (branch_tokens - 1), tags.step_end]
    tail = [*text * TAKEAWAY_TOKENS, tags.takeaway_end, *text * CONCLUSION_TOKENS, vocabulary.eos_id]
    forced = [len(vocabulary.forced_step(number)) for number in range(1, branches + 1)]
    assert len(set(forced)) == 1, f"openings of {forced} tokens: branches would not stay in step"
    takeaway = len(vocabulary.forced_takeaway)
    next_token = [
        *[-1] * (prompt_length - 1),
        *trunk,
        *[-1] * forced[0],
        *branch,
        *[-1] * takeaway,
        *tail,
    ]
    return Script(
        torch.tensor(next_token),
        len(trunk),
        branches,
        branch_tokens,
        len(tail),
        sum(forced) + takeaway,
    )
