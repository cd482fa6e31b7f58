"""Random responses with their tree: every token is written together with the unit that it belongs to, so that a test
needs no parser to know who may see whom."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from npr_ext.testing import FIRST_TEXT_TOKEN, GAP_TOKEN, TAGS

texts = st.lists(st.sampled_from([FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + 1, GAP_TOKEN]), max_size=4)
gaps = st.lists(st.just(GAP_TOKEN), max_size=2)
prompts = st.lists(st.integers(0, 14), max_size=5)  # tags in a prompt mean nothing


@dataclass
class Tree:
    """A prompt and a well-formed response.

    Attributes:
        ids: [T] tokens.
        blocks: [T]: the block whose branches a token belongs to, from 1 on; 0 for trunk.
        branches: [T]: the branch of that block, from 1 on; 0 for trunk.
    """

    prompt_length: int
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)

    def write(self, tokens: list[int], block: int = 0, branch: int = 0) -> None:
        self.ids += tokens
        self.blocks += [block] * len(tokens)
        self.branches += [branch] * len(tokens)

    @property
    def response(self) -> list[int]:
        return self.ids[self.prompt_length :]

    def may_attend(self) -> Tensor:
        """bool [T, T], the definition in cuda_ext/README.md word for word: a token sees every earlier token of its
        sequence (and itself) EXCEPT those of sibling branches of the same block."""
        block_T, branch_T = torch.tensor(self.blocks), torch.tensor(self.branches)
        in_one_block = (block_T[:, None] == block_T) & (block_T[:, None] > 0)
        siblings = in_one_block & (branch_T[:, None] != branch_T)
        return torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril() & ~siblings

    def positions(self) -> list[int]:
        """[T]: trunk counts up by one; every branch starts behind `</guideline>`, the join behind the longest."""
        positions: list[int] = []
        fork, longest, previous = -1, -1, 0
        for index, (block, token) in enumerate(zip(self.blocks, self.ids, strict=True)):
            first = index == 0 or (block, self.branches[index]) != (
                self.blocks[index - 1],
                self.branches[index - 1],
            )
            if block > 0:
                position = fork + 1 if first else previous + 1
                longest = max(longest, position)
            else:
                joins = first and index > 0
                position = (max(longest, fork) if joins else previous) + (index > 0)
            if token == TAGS.guideline_end and index >= self.prompt_length:
                fork = longest = position
            positions.append(position)
            previous = position
        return positions

    def predecessors(self) -> list[int]:
        """[T]: who predicts each token; -1 for the first one and for the first of a join."""
        found: list[int] = []
        fork = -1
        for index, (block, token) in enumerate(zip(self.blocks, self.ids, strict=True)):
            same_unit = index > 0 and (block, self.branches[index]) == (
                self.blocks[index - 1],
                self.branches[index - 1],
            )
            found.append(index - 1 if same_unit else fork if block > 0 else -1)
            if token == TAGS.guideline_end and index >= self.prompt_length:
                fork = index
        return found


@st.composite
def trees(draw: st.DrawFn, max_blocks: int = 3) -> Tree:
    """Blocks of 1 to 4 branches with gap tokens anywhere that the language allows them, texts around them."""
    prompt = draw(prompts)
    tree = Tree(len(prompt))
    tree.write(prompt)
    tree.write(draw(texts))
    for block in range(1, draw(st.integers(0, max_blocks)) + 1):
        num_branches = draw(st.integers(1, 4))
        tree.write([TAGS.guideline])
        for _ in range(num_branches):
            tree.write([*draw(gaps), TAGS.plan, *draw(texts), TAGS.plan_end])
        tree.write([*draw(gaps), TAGS.guideline_end])
        for branch in range(1, num_branches + 1):
            tree.write([*draw(gaps), TAGS.step, *draw(texts), TAGS.step_end], block, branch)
        tree.write([*draw(gaps), TAGS.takeaway, *draw(texts), TAGS.takeaway_end, *draw(gaps)])
    tree.write(draw(texts))
    return tree


def responses(max_blocks: int = 3) -> st.SearchStrategy[list[int]]:
    """Well-formed responses without a prompt."""
    return trees(max_blocks).map(lambda tree: tree.response)


any_response = st.one_of(
    responses(),
    responses().flatmap(lambda ids: st.integers(0, len(ids)).map(lambda cut: ids[:cut])),
    st.tuples(responses(), st.integers(0, 60), st.integers(0, 12)).map(
        lambda drawn: [drawn[2] if i == drawn[1] else each for i, each in enumerate(drawn[0])]
    ),
    st.lists(st.integers(0, 12), max_size=30),
)
"""Well-formed, cut, with one token changed, or tokens without sense."""
