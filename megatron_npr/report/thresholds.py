"""The figures that a demo has to reach, checked on report.json alone.

Learning, validity, parallelism and work: what the machine does beside the demo changes none of them. Seconds are shown in the
report and judged nowhere; speed is what `npr bench` measures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]

TOLERANCE = 1e-9  # 0.75 + 0.15 is not above 0.90 by rounding


@dataclass(frozen=True)
class Threshold:
    """One requirement: what was measured, and the bound on it."""

    name: str
    measured: float
    relation: str  # ">=", "<=" or ">"
    bound: float
    unit: str = ""

    @property
    def held(self) -> bool:
        if self.relation == ">":
            return self.measured > self.bound
        if self.relation == ">=":
            return self.measured >= self.bound - TOLERANCE
        return self.measured <= self.bound + TOLERANCE

    def __str__(self) -> str:
        return f"{self.name} is {self.measured:.4g}{self.unit}, must be {self.relation} {self.bound:.4g}{self.unit}"


def check(report: Report) -> list[Threshold]:
    """All thresholds with what was measured, in the order of the report."""
    return [*_size(report), *_format(report), *_accuracy(report), *_work(report)]


def missed_thresholds(report: Report) -> list[str]:
    """One line for each threshold that is missed; NaN misses."""
    return [str(threshold) for threshold in check(report) if not threshold.held]


def _size(report: Report) -> Iterator[Threshold]:
    details = report["details"]
    yield Threshold("held-out problems", details["num_problems"], ">=", 512)
    yield Threshold("samples per problem", details["samples_per_problem"], ">=", 4)


def _format(report: Report) -> Iterator[Threshold]:
    stages = report["stages"]
    yield Threshold("format_valid of base", stages["base"]["format_valid"], "<=", 0.60)
    for name, bound in (("zero", 0.90), ("beta", 0.97), ("npr", 0.97)):
        yield Threshold(f"format_valid of {name}", stages[name]["format_valid"], ">=", bound)
    yield Threshold("parallel_rate of npr", stages["npr"]["parallel_rate"], ">=", 0.99)


def _accuracy(report: Report) -> Iterator[Threshold]:
    stages, gain = report["stages"], report["npr_minus_beta"]
    yield Threshold("accuracy npr - beta", gain["delta"], ">=", 0.03)
    yield Threshold("lower end of the 95 % interval of npr - beta", gain["ci95"][0], ">", 0.0)
    for base in ("base", "base_sequential"):
        difference = stages["npr"]["accuracy"] - stages[base]["accuracy"]
        yield Threshold(f"accuracy npr - {base}", difference, ">=", 0.15)
    for key, title in (("accuracy_greedy", "greedy"), ("accuracy_top_p_0.7", "top_p 0.7")):
        yield Threshold(f"{title} accuracy npr - beta", stages["npr"][key] - stages["beta"][key], ">=", -0.02)


def _work(report: Report) -> Iterator[Threshold]:
    ideal, fewer = report["speedup_wall"]["ideal"], report["fewer_steps"]
    yield Threshold("ideal speedup (total / critical-path tokens)", ideal, ">=", 1.8, "x")
    for batch in (1, 32):
        share = fewer[f"batch_{batch}"] / ideal
        yield Threshold(
            f"engine steps that branches save at batch {batch}, as a share of the ideal", share, ">=", 0.85
        )
    yield Threshold("median tokens of a step", report["details"]["median_step_tokens"], "<=", 40)
