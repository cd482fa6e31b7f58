"""How a response is sampled and how long it may grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from npr_ext.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and budgets of one response.

    Attributes:
        temperature: 0 is greedy.
        top_p, top_k, min_p: truncation of the distribution; 1, 0 and 0 keep all of it.
        repetition_penalty: inside steps only, over the tokens of that step; 1 is none (strictly on-policy).
        max_tokens: budget of tokens over all branches, forced ones included.
        max_critical_path: budget of tokens on the longest path; None is max_tokens.
        max_branches, max_blocks: a fork beyond them ends the response with reason "budget".
        branching: False decodes one plain sequence; tags then mean nothing.
        ignore_eos: decode exactly max_tokens tokens (needs branching=False).
        constrain: mask every token that would make the response malformed (needs branching). A response that ends
        with reason "eos" is then strictly valid; log-probs are those of the masked distribution.
        stop_token_ids: sampling one of them, in the trunk or a branch, ends the response with reason "stopped".
        seed: with `sample_id`, the branch and the position it fixes every draw.
        sample_id: the request id where None; for callers whose request ids are not the same again.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_critical_path: int | None = None
    max_branches: int = 8
    max_blocks: int = 16
    branching: bool = True
    ignore_eos: bool = False
    constrain: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    sample_id: str | None = None

    def __post_init__(self) -> None:
        _check(
            "temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, ">= 0"
        )
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0 (0: all tokens)")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, math.isfinite(penalty) and penalty > 0, "> 0 (1: none)")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1")
        path = self.max_critical_path
        _check("max_critical_path", path, path is None or path >= 1, ">= 1")
        _check("max_branches", self.max_branches, self.max_branches >= 1, ">= 1")
        _check("max_blocks", self.max_blocks, self.max_blocks >= 0, ">= 0")
        if self.ignore_eos and self.branching:
            raise UserError("ignore_eos=True decodes past the end of a response: it needs branching=False")
        if self.constrain and not self.branching:
            raise UserError("constrain=True follows the tags as they fork and join: it needs branching=True")


def _check(name: str, value: float | None, good: bool, rule: str) -> None:
    if not good:
        raise UserError(f"sampling: {name} is {value}, it must be {rule}")
