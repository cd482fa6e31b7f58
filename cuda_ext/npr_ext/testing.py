"""Seeded inputs: every bench and test names its layouts by these arguments. And the choice of an instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_ext.errors import UserError
from npr_ext.layout.branch_layout import BranchLayout, branch_layout
from npr_ext.layout.tags import TagIds
from npr_ext.library import cpu_isa

TAGS = TagIds(2, 3, 4, 5, 6, 7, 8, 9)
GAP_TOKEN = 10
FIRST_TEXT_TOKEN = 11
NUM_TEXT_TOKENS = 1000
TAGS_PER_BLOCK = 4  # <guideline> </guideline> <takeaway> </takeaway>


@dataclass(frozen=True)
class RandomLayout:
    """One sequence: prompt and well-formed response."""

    token_ids: Tensor  # int64 [T]
    prompt_length: int
    tags: TagIds

    def layout(self, *, branching: bool = True) -> BranchLayout:
        """Its branch layout."""
        return branch_layout(
            self.token_ids, tags=self.tags, prompt_lengths=self.prompt_length, branching=branching
        )


def random_layout(
    seed: int, tokens: int, blocks: int = 3, branches: int = 5, step_share: float = 0.85, gap: int = 1
) -> RandomLayout:
    """A well-formed sequence of exactly `tokens` tokens.

    Args:
        seed: names the sample; equal arguments give equal tokens.
        tokens: length of the sequence, prompt included.
        blocks: parallel blocks of the response.
        branches: branches (= plans = steps) of every block.
        step_share: share of the tokens that stand in branches (their tags and the gaps before them included).
        gap: gap tokens between every pair of tags.
    """
    generator = torch.Generator().manual_seed(seed)
    units = blocks * branches
    in_branch = round(tokens * step_share) if units else 0
    per_branch_fixed = gap + 2
    outside_fixed = blocks * (TAGS_PER_BLOCK + branches * (2 + gap) + 3 * gap)
    steps = in_branch - units * per_branch_fixed
    texts = tokens - in_branch - outside_fixed
    num_texts = units + blocks + 2  # plans, takeaways, prompt, conclusion
    if steps < units or texts < num_texts:
        raise UserError(
            f"{tokens} tokens are too few for {blocks} blocks of {branches} branches with gaps of {gap}"
        )
    step_lengths = _random_split(steps, units, generator)
    text_lengths = _random_split(texts, num_texts, generator)
    between = [GAP_TOKEN] * gap

    def text(length: int) -> list[int]:
        drawn = torch.randint(
            FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + NUM_TEXT_TOKENS, (length,), generator=generator
        )
        ids: list[int] = drawn.tolist()
        return ids

    prompt_length = text_lengths.pop()
    ids = text(prompt_length)
    for _ in range(blocks):
        ids += between if len(ids) > prompt_length else []
        ids += [TAGS.guideline]
        for _ in range(branches):
            ids += [*between, TAGS.plan, *text(text_lengths.pop()), TAGS.plan_end]
        ids += [*between, TAGS.guideline_end]
        for _ in range(branches):
            ids += [*between, TAGS.step, *text(step_lengths.pop()), TAGS.step_end]
        ids += [*between, TAGS.takeaway, *text(text_lengths.pop()), TAGS.takeaway_end]
    ids += text(tokens - len(ids))
    return RandomLayout(torch.tensor(ids, dtype=torch.int64), prompt_length, TAGS)


def _random_split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`parts` positive integers that add up to `total`, none more than a few times the mean."""
    if parts == 0:
        return []
    weights = torch.rand(parts, generator=generator, dtype=torch.float64) + 0.5
    edges = (weights.cumsum(0) / weights.sum() * (total - parts)).round().long()
    lengths: list[int] = (torch.diff(edges, prepend=torch.zeros(1, dtype=torch.int64)) + 1).tolist()
    return lengths


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """The CPU's operators by this instruction set of the processor (one of npr_ext.library.cpu_isas), in all
    threads."""
    before = cpu_isa()
    torch.ops.npr.use_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.npr.use_cpu_isa(before)
