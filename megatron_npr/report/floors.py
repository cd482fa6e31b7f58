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
class Floor:
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


def check(report: Report) -> list[Floor]:
    """All floors with what was measured, in the order of the report."""
    return [*_size(report), *_format(report), *_accuracy(report), *_work(report)]


def floors(report: Report) -> list[str]:
    """One line for each floor that is missed; NaN misses."""
    return [str(floor) for floor in check(report) if not floor.held]


def _size(report: Report) -> Iterator[Floor]:
    details = report["details"]
    yield Floor("held-out problems", details["num_problems"], ">=", 512)
    yield Floor("samples per problem", details["samples_per_problem"], ">=", 4)


def _format(report: Report) -> Iterator[Floor]:
    stages = report["stages"]
    yield Floor("format_valid of base", stages["base"]["format_valid"], "<=", 0.60)
    for name, bound in (("zero", 0.90), ("beta", 0.97), ("npr", 0.97)):
        yield Floor(f"format_valid of {name}", stages[name]["format_valid"], ">=", bound)
    yield Floor("parallel_rate of npr", stages["npr"]["parallel_rate"], ">=", 0.99)


def _accuracy(report: Report) -> Iterator[Floor]:
    stages, gain = report["stages"], report["npr_minus_beta"]
    yield Floor("accuracy npr - beta", gain["delta"], ">=", 0.03)
    yield Floor("lower end of the 95 % interval of npr - beta", gain["ci95"][0], ">", 0.0)
    for base in ("base", "base_sequential"):
        difference = stages["npr"]["accuracy"] - stages[base]["accuracy"]
        yield Floor(f"accuracy npr - {base}", difference, ">=", 0.15)
    for key, title in (("accuracy_greedy", "greedy"), ("accuracy_top_p_0.7", "top_p 0.7")):
        yield Floor(f"{title} accuracy npr - beta", stages["npr"][key] - stages["beta"][key], ">=", -0.02)


def _work(report: Report) -> Iterator[Floor]:
    ideal, fewer = report["speedup_wall"]["ideal"], report["fewer_steps"]
    yield Floor("ideal speedup (total / critical-path tokens)", ideal, ">=", 1.8, "x")
    for batch in (1, 32):
        share = fewer[f"batch_{batch}"] / ideal
        yield Floor(
            f"engine steps that branches save at batch {batch}, as a share of the ideal", share, ">=", 0.85
        )
    yield Floor("median tokens of a step", report["details"]["median_step_tokens"], "<=", 40)
