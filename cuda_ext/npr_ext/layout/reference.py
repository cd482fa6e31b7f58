"""Who sees whom, as cuda_ext/README.md defines it, in plain Python and PyTorch: token by token, for comparison,
not for speed.

Independent of the C++ core: the tag structure is a table, visibility is a question asked of every pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_ext.layout.tags import TagIds
from npr_ext.layout.violations import Violation

OPENING = ("guideline", "plan", "step", "takeaway")


@dataclass(frozen=True)
class Place:
    """Where one token stands: in which block, in which unit of it."""

    block: int = 0
    branch: int = 0  # 0: trunk
    position: int = 0
    predecessor: int = -1


def _violation_of(state: str, tag: str, plans: int, steps: int) -> Violation:
    """What is wrong with `tag` in `state`, OK if nothing is. States are named after the open tag or the next one."""
    allowed = {
        "trunk": ("guideline",),
        "guideline": ("plan", "guideline_end"),
        "plan": ("plan_end",),
        "before_step": ("step",),
        "step": ("step_end",),
        "before_takeaway": ("takeaway",),
        "takeaway": ("takeaway_end",),
    }
    if tag in allowed[state]:
        return Violation.GUIDELINE_WITHOUT_PLAN if tag == "guideline_end" and plans == 0 else Violation.OK
    special = {
        ("before_step", "takeaway"): Violation.MISSING_STEP,
        ("before_step", "guideline"): Violation.UNFINISHED_BLOCK,
        ("before_takeaway", "step"): Violation.EXTRA_STEP,
        ("before_takeaway", "guideline"): Violation.MISSING_TAKEAWAY,
    }
    if (state, tag) in special:
        return special[state, tag]
    if state in OPENING:
        return Violation.NESTED_TAG if tag in OPENING else Violation.MISMATCHED_TAG
    return Violation.STRAY_TAG


def _state_after(state: str, tag: str, plans: int, steps: int) -> str:
    """The state behind a tag that was allowed; `plans` and `steps` count it already."""
    if tag in OPENING:
        return tag
    if tag == "plan_end":
        return "guideline"
    if tag == "guideline_end":
        return "before_step"
    if tag == "step_end":
        return "before_step" if steps < plans else "before_takeaway"
    return "trunk"


VIOLATION_AT_END = {
    "trunk": Violation.OK,
    "guideline": Violation.UNCLOSED_GUIDELINE,
    "plan": Violation.UNCLOSED_PLAN,
    "before_step": Violation.UNFINISHED_BLOCK,
    "step": Violation.UNCLOSED_STEP,
    "before_takeaway": Violation.MISSING_TAKEAWAY,
    "takeaway": Violation.UNCLOSED_TAKEAWAY,
}


def reference_places(
    token_ids: Sequence[int], tags: TagIds, prompt_length: int, *, branching: bool = True
) -> tuple[list[Place], Violation, int]:
    """Places of the tokens of ONE unshared sequence, its violation, and the index of the violating token (-1: none)."""
    names = dict(zip(tags.as_tuple(), vars(tags), strict=True))
    places: list[Place] = []
    state, block, plans, steps = "trunk", 0, 0, 0
    broken, violation, violation_index = False, Violation.OK, -1
    fork = Place()
    fork_index = -1
    for index, token in enumerate(token_ids):
        previous = places[-1] if places else None
        parsing = branching and index >= prompt_length and not broken
        tag = names.get(token) if parsing else None
        was_in_block_branches = state in ("before_step", "step")
        wrong = _violation_of(state, tag, plans, steps) if tag else Violation.OK
        in_branches = was_in_block_branches and wrong == Violation.OK and not broken

        if in_branches:
            branch = steps + 1
            first = previous is None or previous.branch != branch or previous.block != block
            position = fork.position + 1 if first or previous is None else previous.position + 1
            place = Place(block, branch, position, fork_index if first else index - 1)
        elif previous is None:
            place = Place()
        else:
            longest = max((p.position for p in places if p.block == block and p.branch > 0), default=-1)
            # An early join is sampled right after this branch.
            cut = wrong != Violation.OK and was_in_block_branches
            joining = cut or previous.branch > 0
            position = max(longest, fork.position) + 1 if joining else previous.position + 1
            predecessor = -1 if joining and not cut else index - 1
            place = Place(block, 0, position, predecessor)
        places.append(place)

        if wrong != Violation.OK:
            broken, violation, violation_index, state = True, wrong, index, "trunk"
        elif tag:
            if tag == "guideline":
                block, plans, steps = block + 1, 0, 0
                places[-1] = Place(block, 0, place.position, place.predecessor)
            plans += tag == "plan_end"
            steps += tag == "step_end"
            if tag == "guideline_end":
                fork, fork_index = places[-1], index
            state = _state_after(state, tag, plans, steps)
    if not broken and VIOLATION_AT_END[state] != Violation.OK:
        violation, violation_index = VIOLATION_AT_END[state], len(token_ids)
    return places, violation, violation_index


def reference_visible(places: Sequence[Place]) -> Tensor:
    """bool [T, T] of one sequence: every earlier token, except those of sibling branches of the same block."""
    block_T = torch.tensor([place.block for place in places], dtype=torch.int64)
    branch_T = torch.tensor([place.branch for place in places], dtype=torch.int64)
    in_branches = (branch_T[:, None] > 0) & (branch_T > 0)
    siblings = in_branches & (block_T[:, None] == block_T) & (branch_T[:, None] != branch_T)
    return torch.ones(len(places), len(places), dtype=torch.bool).tril() & ~siblings


def reference_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, visible_TT: Tensor, scale: float
) -> Tensor:
    """Dense masked softmax attention with grouped heads, differentiable, in the precision of its inputs. [T, N, H]."""
    group = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = (each.repeat_interleave(group, dim=1) for each in (k_TKH, v_TKH))
    scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) * scale
    weights_NTT = scores_NTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knh->qnh", weights_NTT, v_TNH)


def reference_paged_attention(
    q_TNH: Tensor,
    k_cache_SKH: Tensor,
    v_cache_SKH: Tensor,
    block_tables: Tensor,
    row_of_token: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """Token by token: q[t] attends to the slots block_tables[row_of_token[t], :lengths[t]]. [T, N, H]."""
    outputs = []
    for q_NH, row, length in zip(q_TNH, row_of_token.tolist(), lengths.tolist(), strict=True):
        slots = block_tables[row, :length].long()
        everything = torch.ones(1, length, dtype=torch.bool)
        outputs.append(
            reference_attention(q_NH[None], k_cache_SKH[slots], v_cache_SKH[slots], everything, scale)
        )
    return torch.cat(outputs) if outputs else torch.empty_like(q_TNH)
