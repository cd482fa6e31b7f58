"""What one model did in one mode of decoding: arrays over problems and samples, from rounds of problems, and their figures.

Shape legend: P problems, S samples of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.statistics import mean_pass_at_k, mean_with_interval
from megatron_npr.rollout.scoring import Scored, outcomes
from npr_engine.trace import ran_in_parallel

ARRAYS = {
    "correct": np.bool_,
    "valid": np.bool_,
    "parallel": np.bool_,
    "num_tokens": np.int64,
    "critical_path": np.int64,
}


@dataclass(frozen=True)
class Evaluation:
    """Arrays [P, S], how many responses ended for which reason, `scoring.outcomes`, and the seconds of generation alone."""

    correct: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    parallel: NDArray[np.bool_]
    num_tokens: NDArray[np.int64]
    critical_path: NDArray[np.int64]
    reasons: dict[str, int]
    outcomes: dict[str, Share]
    seconds: float

    @staticmethod
    def of(scored: Sequence[Scored], num_samples: int, seconds: float) -> Evaluation:
        """The judged responses to P problems, `num_samples` of each side by side."""
        shape = (-1, num_samples)
        return Evaluation(
            correct=np.array([item.correct for item in scored]).reshape(shape),
            valid=np.array([item.valid for item in scored]).reshape(shape),
            parallel=np.array([item.valid and ran_in_parallel(item.rollout) for item in scored]).reshape(
                shape
            ),
            num_tokens=np.array([item.rollout.num_tokens for item in scored]).reshape(shape),
            critical_path=np.array([item.rollout.critical_path for item in scored]).reshape(shape),
            reasons=dict(Counter(item.rollout.finish_reason for item in scored)),
            outcomes=outcomes(scored),
            seconds=seconds,
        )

    @staticmethod
    def joined(rounds: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of the problems of all rounds, in their order."""
        reasons: Counter[str] = Counter()
        for part in rounds:
            reasons.update(part.reasons)
        return Evaluation(
            **{name: np.concatenate([getattr(part, name) for part in rounds]) for name in ARRAYS},
            reasons=dict(reasons.most_common()),
            outcomes={
                name: Share(
                    sum(part.outcomes[name].count for part in rounds),
                    sum(part.outcomes[name].total for part in rounds),
                )
                for name in rounds[0].outcomes
            },
            seconds=sum(part.seconds for part in rounds),
        )

    @staticmethod
    def from_record(record: dict[str, Any]) -> Evaluation:
        """The inverse of `to_record`."""
        arrays: dict[str, Any] = {name: np.array(record[name], dtype=kind) for name, kind in ARRAYS.items()}
        total = arrays["correct"].size
        shares = {name: Share(count, total) for name, count in record["outcomes"].items()}
        return Evaluation(**arrays, reasons=record["reasons"], outcomes=shares, seconds=record["seconds"])

    def to_record(self) -> dict[str, Any]:
        """As JSON data."""
        arrays = {name: getattr(self, name).astype(int).tolist() for name in ARRAYS}
        counts = {name: share.count for name, share in self.outcomes.items()}
        return {**arrays, "reasons": self.reasons, "outcomes": counts, "seconds": self.seconds}

    @property
    def tokens_per_second(self) -> float:
        return float(self.num_tokens.sum()) / self.seconds

    def figures(self) -> dict[str, Any]:
        """The numbers that eval.json holds for one mode."""
        estimate = mean_with_interval(self.correct)
        samples = self.correct.shape[1]
        return {
            "problems": self.correct.shape[0],
            "samples_per_problem": samples,
            "accuracy": estimate.value,
            "accuracy_ci95": [estimate.low, estimate.high],
            f"best_at_{samples}": mean_pass_at_k(self.correct, samples),
            "format_valid": float(self.valid.mean()),
            "parallel_rate": float(self.parallel.mean()),
            "mean_total_tokens": float(self.num_tokens.mean()),
            "mean_critical_path": float(self.critical_path.mean()),
            "tokens_per_second": self.tokens_per_second,
            "finish_reasons": self.reasons,
            "outcomes": {name: share.count for name, share in self.outcomes.items()},
        }
