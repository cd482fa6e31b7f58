"""One engine step as plain arrays: what the scheduler plans and the runner executes without deciding anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """T tokens to compute, S of which are sampled after.

    Attributes:
        token_ids, positions, slots: int32 [T]; the KV of token t goes to slots[t].
        rows: int32 [T], batch row of each token.
        lengths: int32 [T], token t sees the KV slots block_tables[rows[t], :lengths[t]] (its own included).
        block_tables: int32 [rows, width], KV slots in order, for all batch rows of the engine.
        generations: int64 [rows], tells the successive owners of a batch row apart.
        sample_index: int64 [S], places in T whose logits are sampled from.
        sample_rows: int32 [S], their batch rows.
        num_decode: the first so many tokens are steady decoding, the rest prompts, forced tokens and recomputation.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    rows: NDArray[np.int32]
    lengths: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    generations: NDArray[np.int64]
    sample_index: NDArray[np.int64]
    sample_rows: NDArray[np.int32]
    num_decode: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class SampleInputs:
    """What the sampler needs about the S sampled rows.

    Attributes:
        uniforms: float64 [S] in [0, 1).
        temperature, top_p, top_k, min_p, penalty: [S].
        penalised: int32 [S, L], tokens that the penalty applies to, padded with -1; L = 0 where no row has one.
        masks: int32 [S], rows of Constraint.forbidden: what may not be sampled; 0 where anything may.
    """

    uniforms: NDArray[np.float64]
    temperature: NDArray[np.float32]
    top_p: NDArray[np.float32]
    top_k: NDArray[np.int32]
    min_p: NDArray[np.float32]
    penalty: NDArray[np.float32]
    penalised: NDArray[np.int32]
    masks: NDArray[np.int32]


@dataclass(frozen=True)
class Sampled:
    """The outcome of a step, [S]: token ids, their log-probs under the policy and under the sampler, and
    whether the row's logits are no distribution (NaN or infinite): its token then means nothing."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampler_logprobs: NDArray[np.float32]
    invalid: NDArray[np.bool_]
