"""The published builders' own positions and visibility, on gap-free text."""

import json
import re

import pytest
import torch

from npr_ext import BranchLayout, TagIds, UserError, Violation, branch_layout
from npr_ext.layout.violations import MESSAGES
from npr_ext.testing import TAGS, random_layout
from tests.support.places import ROOT, VECTORS


def test_all_forty_reference_vectors_are_equal() -> None:
    names = json.loads((VECTORS / "tag_ids.json").read_text())
    tags = TagIds(
        **{
            field: names[f"</{field[:-4]}>" if field.endswith("_end") else f"<{field}>"]
            for field in vars(TAGS)
        }
    )
    lines = (VECTORS / "branch_layout.jsonl").read_text().splitlines()
    assert len(lines) == 40
    for line in lines:
        vector = json.loads(line)
        layout = branch_layout(
            torch.tensor(vector["token_ids"]), tags=tags, prompt_lengths=vector["prompt_length"]
        )
        expected = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
        for query, intervals in enumerate(vector["visible"]):
            for begin, end in intervals:
                expected[query, begin:end] = True
        assert layout.violations() == ()
        assert layout.position_ids.tolist() == vector["position_ids"]
        assert torch.equal(layout.visible(), expected)


def test_the_cpp_table_of_codes_mirrors_the_python_one() -> None:
    header = (ROOT / "cuda_ext/include/npr/layout/layout_rules.h").read_text()
    in_cpp = {
        name: int(code) for name, code in re.findall(r"\bk(\w+) = (\d+),", header.split("enum class Tag")[0])
    }
    in_python = {
        "".join(part.capitalize() for part in violation.name.split("_")): int(violation)
        for violation in Violation
        if violation < 100  # the grammar's own begin there
    }
    assert in_cpp == in_python
    assert set(MESSAGES) == set(Violation)


def test_a_layout_survives_its_journey_as_a_tensor() -> None:
    layout = random_layout(0, 600).layout()
    arrived = BranchLayout.from_tensor(layout.as_tensor())
    assert torch.equal(arrived.visible(), layout.visible())
    assert arrived.as_tensor().data_ptr() == layout.as_tensor().data_ptr()
    with pytest.raises(UserError, match="carries no branch ids"):
        _ = arrived.branch_ids


def test_a_random_layout_is_named_by_its_arguments() -> None:
    first, again, other = random_layout(3, 1000), random_layout(3, 1000), random_layout(4, 1000)
    assert torch.equal(first.token_ids, again.token_ids)
    assert not torch.equal(first.token_ids, other.token_ids)
    layout = first.layout()
    assert layout.num_tokens == 1000
    assert layout.violations() == ()
    assert (layout.branch_ids > 0).sum() == 850
    assert layout.branch_ids.max() == 5


@pytest.mark.parametrize("arrays", [torch.zeros(4, 3, dtype=torch.int32), torch.zeros(5, 3)])
def test_a_tensor_that_is_no_layout_is_refused(arrays: torch.Tensor) -> None:
    with pytest.raises(UserError, match=re.escape("int32 [5, T]")):
        BranchLayout.from_tensor(arrays)


def test_visible_pairs_and_density_count_the_mask() -> None:
    layout = random_layout(1, 500, gap=0).layout()
    assert layout.visible_pairs() == int(layout.visible().sum())
    assert layout.density() == pytest.approx(layout.visible().float().mean().item())
