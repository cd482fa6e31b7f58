"""What the engine yields and the trainer trains: one decoded response."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rollout:
    """One response in packed order (trunk, branches 1..n of a block, trunk, ...); R tokens.

    Attributes:
        prompt_ids: int32 [P].
        token_ids: int32 [R], EOS included where it was sampled.
        logprobs: float32 [R] under the policy (softmax over the tokenizer's ids, temperature 1, before penalty and truncation);
        NaN where forced.
        sampler_logprobs: float32 [R] under the distribution that was sampled from; NaN where forced.
        forced: bool [R], tokens that the engine wrote.
        branch_ids: int32 [R], 0 for trunk, i for branch i of its block.
        decode_steps: int32 [R], the engine step in which the token came to be.
        positions: int32 [R], the position the engine fed the token at.
        finish_reason: "eos", "stopped", "length", "budget", "malformed(<VIOLATION>)", "aborted" or "error(<cause>)".
        branching: whether tags could fork.
        constrained: whether illegal tokens were masked; both log-probs are then of the masked distribution.
        weights_version: of the weights that sampled it.
    """

    request_id: str
    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampler_logprobs: NDArray[np.float32]
    forced: NDArray[np.bool_]
    branch_ids: NDArray[np.int32]
    decode_steps: NDArray[np.int32]
    positions: NDArray[np.int32]
    finish_reason: str
    branching: bool
    constrained: bool
    weights_version: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def critical_path(self) -> int:
        """Tokens on the longest path: trunk plus the longest branch of each block."""
        if len(self.positions) == 0:
            return 0
        return int(self.positions.max()) + 1 - len(self.prompt_ids)
