"""A checkpoint of one layout resumes under another: loss, gradient norm and rate are those of the run that was not stopped.

A byte flipped in the shards that any rank wrote is found.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_npr.run_folder.manifest import find_damage, read_manifest
from tests.support.families import save_family
from tests.support.launch import run_worker


@dataclass(frozen=True)
class Layout:
    """A world of processes and its [parallel] table; what the table leaves is data parallelism."""

    processes: int
    parallel: dict[str, int | bool]


ONE = Layout(1, {})
DP2 = Layout(2, {})
TP2 = Layout(2, {"tp": 2})
PP2 = Layout(2, {"pp": 2})
CP2 = Layout(2, {"cp": 2})
EP2 = Layout(2, {"ep": 2})
TP2_SP = Layout(2, {"tp": 2, "sequence_parallel": True})
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
    "pp2 to interleaved stages": Case("qwen3 untied", PP2, (PP2_VPP2,)),
    "experts, ep2 to one process, pp2 and ep2": Case("qwen3_moe", EP2, (ONE, PP2, EP2)),
    "experts, one process to ep2 and tp2": Case("qwen3_moe", ONE, (EP2, TP2_SP)),
    "experts, tp2 to one process, ep2 and tp2": Case("qwen3_moe", TP2_SP, (ONE, EP2, TP2_SP)),
}


@dataclass(frozen=True)
class Saved:
    """A model, the checkpoints of a run of it, and the figures of that run after the last one."""

    model: Path
    checkpoints: Path
    uninterrupted: list[list[float]]


def run(layout: Layout, model: Path, checkpoints: Path) -> list[list[float]]:
    """Figures of two steps, from the newest checkpoint; where there is none three steps come first, and one is saved."""
    arguments = (json.dumps(layout.parallel), model, checkpoints)
    figures: list[list[float]] = json.loads(run_worker("checkpoint", arguments, layout.processes))
    return figures


def save(family: str, layout: Layout, folder: Path) -> Saved:
    model, checkpoints = save_family(family, folder / "model"), folder / "checkpoints"
    saved = Saved(model, checkpoints, run(layout, model, checkpoints))
    (loss, *_), (next_loss, *_) = saved.uninterrupted
    assert abs(next_loss - loss) > 1e-3, "steps that change nothing would show nothing"
    return saved


def assert_resumes(saved: Saved, layout: Layout) -> None:
    resumed = run(layout, saved.model, saved.checkpoints)
    np.testing.assert_allclose(resumed, saved.uninterrupted, rtol=1e-6, err_msg=str(layout))


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save("qwen3 tied", TP2, tmp_path_factory.mktemp("tp2"))


def test_a_checkpoint_of_tp2_resumes_under_dp2(saved_by_two: Saved) -> None:
    assert_resumes(saved_by_two, DP2)


def test_a_flipped_byte_in_the_shards_of_any_rank_is_found(saved_by_two: Saved) -> None:
    checkpoint = saved_by_two.checkpoints / "step_000003"
    manifest = read_manifest(checkpoint)
    shards = sorted(checkpoint.glob("*.distcp"))
    assert {shard.name.split("_")[2] for shard in shards} == {"0", "1"}, "both ranks wrote"
    for shard in shards:
        whole = shard.read_bytes()
        for offset in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[offset] ^= 0xFF
            shard.write_bytes(damaged)
            found = find_damage(checkpoint, manifest, sorted(manifest.files))
            assert found == f"{shard.name} has changed since it was written (SHA-256 differs)"
        shard.write_bytes(whole)
    assert find_damage(checkpoint, manifest, sorted(manifest.files)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_a_checkpoint_resumes_elsewhere(name: str, tmp_path: Path) -> None:
    case = SLOW_CASES[name]
    saved = save(case.family, case.saves, tmp_path)
    for layout in case.resume:
        assert_resumes(saved, layout)
