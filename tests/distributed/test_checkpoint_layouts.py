"""A checkpoint of one layout resumes under another: loss, gradient norm and rate are those of the run that was not stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import run_worker
from tests.families import save_family


@dataclass(frozen=True)
class Layout:
    """A world of processes and its [parallel] table; what the table leaves is data parallelism."""

    processes: int
    parallel: dict[str, int]


ONE = Layout(1, {})
DP2 = Layout(2, {})
TP2 = Layout(2, {"tp": 2})
PP2 = Layout(2, {"pp": 2})
CP2 = Layout(2, {"cp": 2})
EP2 = Layout(2, {"ep": 2})
TP2_PP2 = Layout(4, {"tp": 2, "pp": 2})
PP2_VPP2 = Layout(2, {"pp": 2, "vpp": 2})


@dataclass(frozen=True)
class Case:
    """A run of a model, the layout that saves, and those that resume."""

    family: str
    saves: Layout
    resume: tuple[Layout, ...]


SLOW_CASES = {
    "tied, tp2 x pp2 to dp2 and pp2": Case("qwen3 tied", TP2_PP2, (DP2, PP2)),
    "untied, tp2 x pp2 to dp2 and pp2": Case("qwen3 untied", TP2_PP2, (DP2, PP2)),
    "with biases, tp2 x pp2 to dp2 and pp2": Case("qwen2", TP2_PP2, (DP2, PP2)),
    "tp2 to cp2": Case("qwen3 tied", TP2, (CP2,)),
    "cp2 to one process, tp2 and cp2": Case("qwen3 untied", CP2, (ONE, TP2, CP2)),
    "interleaved stages to one process, pp2, tp2 and dp2": Case("qwen3 tied", PP2_VPP2, (ONE, PP2, TP2, DP2)),
    "experts, ep2 to one process, pp2 and ep2": Case("qwen3_moe", EP2, (ONE, PP2, EP2)),
    "experts, one process to ep2": Case("qwen3_moe", ONE, (EP2,)),
}


def check(case: Case, folder: Path) -> None:
    """Each case has a folder for its checkpoints: the first layout finds none and saves."""
    model = save_family(case.family, folder / "model")

    def run(layout: Layout) -> list[list[float]]:
        arguments = (json.dumps(layout.parallel), model, folder / "checkpoints")
        figures: list[list[float]] = json.loads(run_worker("checkpoint_worker", arguments, layout.processes))
        return figures

    uninterrupted = run(case.saves)
    (loss, *_), (next_loss, *_) = uninterrupted
    assert abs(next_loss - loss) > 1e-3, "steps that change nothing would show nothing"
    for layout in case.resume:
        np.testing.assert_allclose(run(layout), uninterrupted, rtol=1e-6, err_msg=str(layout))


def test_a_checkpoint_of_tp2_resumes_under_dp2(tmp_path: Path) -> None:
    check(Case("qwen3 tied", TP2, (DP2,)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_a_checkpoint_resumes_elsewhere(name: str, tmp_path: Path) -> None:
    check(SLOW_CASES[name], tmp_path)
