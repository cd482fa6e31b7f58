"""Training with Transformer Engine: its real Python and Megatron's real wrappers, over a stand-in of its GPU kernels.

See `tests.fakes.te_on_cpu`. Without FP8 its layers train as ours do; with FP8 they train nearly as fp32, by every recipe;
checkpoints carry the scales of delayed scaling from layout to layout; the engine reads its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_npr.config import Fp8Settings
from megatron_npr.model import linears
from megatron_npr.runtime.process_world import World
from tests.fakes import te_on_cpu
from tests.support.families import save_family
from tests.support.training import new_trainer, step
from tests.support.transformer_engine.runs import Figures, Run, measure

DENSE, BIASED, EXPERTS = "qwen3 tied", "qwen2", "qwen3_moe"
FAMILIES = (DENSE, BIASED, EXPERTS)
RECOMPUTE = ("none", "selective", "full")
RECIPES = ("delayed", "tensorwise", "blockwise")
QUANTISER = {
    "delayed": "Float8Quantizer",
    "tensorwise": "Float8CurrentScalingQuantizer",
    "blockwise": "Float8BlockQuantizer",
}


@dataclass(frozen=True)
class Noise:
    """How far the first update's loss and gradient norm, and the next loss, may be from those of another sum order: FP8 moves a
    number to the next FP8 number here and there, and that spreads from layer to layer (test_fp8_tensor_parallel.py)."""

    loss: float = 5e-3
    norm: float = 0.05
    next_loss: float = 0.02


USUAL_NOISE = Noise()
NOISE_OF_EXPERTS = Noise(norm=0.1, next_loss=0.05)  # a token also goes to another expert then
NOISE_OF_BIASES = Noise(
    next_loss=0.05
)  # Adam makes the keys' bias, whose gradient is rounding alone, move as far as any weight
NEAR_FP32 = 0.03
"""How far a loss under FP8 may be from that in fp32, or by another recipe."""

Runs = dict[str, Run]

LAYOUTS = {
    "tp2": (DENSE, {"tp": 2}),
    "tp2 with sp": (DENSE, {"tp": 2, "sequence_parallel": True}),
    "dp2": (DENSE, {}),
    "ep2": (EXPERTS, {"ep": 2}),
}
USUAL = [("delayed", "delayed"), ("own", "fp32")]
"""Checkpoints of the default run: what saves, and what goes on."""
OTHERS = [
    ("fp32", "fp32"), ("tensorwise", "tensorwise"), ("blockwise", "blockwise"), ("fp32", "own"), ("delayed", "tensorwise"),
    ("tensorwise", "delayed"), ("delayed", "own"), ("own", "delayed"),
]  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that one world of processes takes, when the first of them is asked for."""

    processes: int
    runs: Runs

    @cached_property
    def figures(self) -> dict[str, Figures]:
        return measure(self.runs, self.processes)


@dataclass(frozen=True)
class Answers:
    """Figures of runs by name; what only slow tests ask for has worlds of its own."""

    groups: tuple[Group, ...]

    def __getitem__(self, name: str) -> Figures:
        return next(group for group in self.groups if name in group.runs).figures[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models by family."""
    return {family: str(save_family(family, tmp_path_factory.mktemp("model"))) for family in FAMILIES}


@pytest.fixture(scope="module")
def answers(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    te_on_cpu.skip_where_absent()

    def folder() -> str:
        return str(tmp_path_factory.mktemp("checkpoints"))

    return Answers(
        (
            Group(1, runs_alone(models) | checkpoint_runs(models, USUAL, folder)),
            Group(1, slow_runs_alone(models) | checkpoint_runs(models, OTHERS, folder)),
            Group(
                2,
                layout_runs(models, [("tp2 with sp", "delayed"), ("ep2", "fp32")], folder)
                | expert_runs(models, folder()),
            ),
            Group(2, layout_runs(models, list(product(LAYOUTS, ("fp32", "delayed", "tensorwise"))), folder)),
        )
    )


def training(model: str, by: str, **kwargs: Any) -> Run:
    """With our own layers in fp32 ("own"), Transformer Engine's in fp32, or those by a recipe."""
    return Run(model, fp8={"recipe": by} if by in RECIPES else None, own_layers=by == "own", **kwargs)


def runs_alone(models: dict[str, str]) -> Runs:
    runs = {
        f"{family}, fp32, {recompute}": Run(models[family], recompute=recompute)
        for family in FAMILIES
        for recompute in RECOMPUTE
    }
    for family in (DENSE, EXPERTS):
        runs[f"{family}, engine"] = Run(models[family], "compare_with_engine")
        runs |= {f"{family}, {recipe}": training(models[family], recipe) for recipe in RECIPES}
    runs["e4m3"] = Run(models[DENSE], fp8={"format": "e4m3"})
    runs["ends"] = Run(models[DENSE], fp8={"first_layers_bf16": 1, "last_layers_bf16": 1})
    runs["tensorwise, watched"] = Run(models[EXPERTS], "watch_log_probs", fp8={"recipe": "tensorwise"})
    return runs


def slow_runs_alone(models: dict[str, str]) -> Runs:
    runs = {f"{BIASED}, {recipe}": training(models[BIASED], recipe) for recipe in RECIPES}
    for recipe in ("delayed", "blockwise"):
        runs[f"{recipe}, watched"] = Run(models[EXPERTS], "watch_log_probs", fp8={"recipe": recipe})
    return runs


def checkpoint_runs(
    models: dict[str, str], pairs: Sequence[tuple[str, str]], folder: Callable[[], str]
) -> Runs:
    """Runs that write a checkpoint and go on ("FAMILY, BY, saves"), and those that begin from it ("FAMILY, BY to BY")."""
    runs: Runs = {}
    for family in (DENSE, EXPERTS):
        for saves in dict(pairs):
            runs[f"{family}, {saves}, saves"] = training(models[family], saves, updates=2, save=folder())
        for saves, resumes in pairs:
            begin = runs[f"{family}, {saves}, saves"].save
            runs[f"{family}, {saves} to {resumes}"] = training(
                models[family], resumes, updates=1, resume=begin
            )
    return runs


def layout_runs(models: dict[str, str], cases: Sequence[tuple[str, str]], folder: Callable[[], str]) -> Runs:
    """Under layouts of two processes ("LAYOUT, BY"); those by delayed scaling also resume without these ("LAYOUT to dp2")."""
    runs, resumed = {}, {}
    for layout, by in cases:
        family, parallel = LAYOUTS[layout]
        save = folder() if by == "delayed" else None
        run = runs[f"{layout}, {by}"] = training(models[family], by, parallel=parallel, save=save)
        if save is not None:
            resumed[f"{layout} to dp2"] = replace(run, parallel={}, save=None, resume=save, updates=1)
    return runs | resumed


def expert_runs(models: dict[str, str], folder: str) -> Runs:
    marked = training(models[EXPERTS], "delayed", measure="mark_experts", parallel={"ep": 2}, save=folder)
    return {
        "marked": marked,
        "read": replace(marked, measure="read_experts", parallel={}, save=None, resume=folder),
    }


Own = Callable[..., list[tuple[float, float]]]


@pytest.fixture(scope="module")
def own(world: World, models: dict[str, str]) -> Own:
    """Losses and gradient norms of three updates with our own layers and torch's Adam, in this process."""

    @cache
    def figures(
        family: str, layers: linears.LinearModules, fp8: str | None = None
    ) -> list[tuple[float, float]]:
        settings = None if fp8 is None else Fp8Settings.model_validate_json(fp8)
        trainer = new_trainer(world, Path(models[family]), linears=layers, fp8=settings)
        return [step(trainer)[:2] for _ in range(3)]

    return figures


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_train_as_ours_do(family: str, recompute: str, answers: Answers, own: Own) -> None:
    theirs = answers[f"{family}, fp32, {recompute}"]
    assert theirs.rounded == {}
    found, ours = np.transpose([theirs.losses, theirs.norms]), np.array(own(family, linears.OWN))
    np.testing.assert_allclose(found[0], ours[0], rtol=1e-5)
    # Adam's first updates make a gradient that is mostly rounding error (the bias of keys) as large as any other.
    np.testing.assert_allclose(found, ours, rtol=1e-4)


@pytest.mark.parametrize("family", [DENSE, EXPERTS])
def test_the_engine_reads_its_weights_in_place(family: str, answers: Answers) -> None:
    (found,) = answers[f"{family}, engine"].found
    assert max(found["differences"]) < 1e-4  # log-probs of trainer and engine, before and after an update
    assert found["moved"] == 0
    assert found["shared"] == found["tensors"] > 30


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", [DENSE, EXPERTS, pytest.param(BIASED, marks=pytest.mark.slow)])
def test_it_trains_in_fp8_nearly_as_in_fp32(family: str, recipe: str, answers: Answers, own: Own) -> None:
    theirs = answers[f"{family}, {recipe}"]
    assert list(theirs.rounded) == [QUANTISER[recipe]]
    exact = own(family, linears.OWN)[0][0]
    assert 1e-5 * exact < abs(theirs.losses[0] - exact) < NEAR_FP32 * exact
    assert theirs.losses[2] < theirs.losses[1] < theirs.losses[0] - 0.5


@pytest.mark.parametrize("family", [DENSE, EXPERTS, pytest.param(BIASED, marks=pytest.mark.slow)])
def test_its_current_scaling_is_that_of_our_scaled_products(family: str, answers: Answers, own: Own) -> None:
    noise = NOISE_OF_BIASES if family == BIASED else USUAL_NOISE
    assert_alike(answers[f"{family}, tensorwise"], own(family, linears.SCALED_MM, "{}"), noise)


def test_format_and_layers_in_bf16_are_those_of_our_scaled_products(answers: Answers, own: Own) -> None:
    all_layers, ends, e4m3 = (answers[name] for name in (f"{DENSE}, tensorwise", "ends", "e4m3"))
    (whole,), (half,) = all_layers.rounded.values(), ends.rounded.values()
    assert half == whole / 2  # of four layers
    ours = own(DENSE, linears.SCALED_MM, '{"first_layers_bf16": 1, "last_layers_bf16": 1}')
    assert_alike(ends, ours)
    assert_alike(e4m3, own(DENSE, linears.SCALED_MM, '{"format": "e4m3"}'))
    assert e4m3.losses[0] == all_layers.losses[0]
    assert e4m3.norms[0] != all_layers.norms[0]  # gradients alone are rounded otherwise


def assert_alike(theirs: Figures, ours: list[tuple[float, float]], noise: Noise = USUAL_NOISE) -> None:
    assert theirs.losses[0] == pytest.approx(ours[0][0], rel=noise.loss)
    assert theirs.norms[0] == pytest.approx(ours[0][1], rel=noise.norm)
    assert theirs.losses[1] == pytest.approx(ours[1][0], rel=noise.next_loss)


@pytest.mark.parametrize(
    "recipe",
    [
        "tensorwise",
        pytest.param("blockwise", marks=pytest.mark.slow),
        pytest.param("delayed", marks=pytest.mark.slow),
    ],
)
def test_log_probs_between_updates_are_those_of_the_newest_weights(recipe: str, answers: Answers) -> None:
    """Rounded weights are kept for the micro-batches of an update, and no longer."""
    watched = answers[f"{recipe}, watched"]
    # Delayed scaling has new scales with every micro-batch of an update, so there the two are rounded differently; old weights
    # would be off by what the update gained.
    tolerance = NEAR_FP32 if recipe == "delayed" else 1e-5
    assert tolerance * watched.losses[0] < (watched.losses[0] - watched.losses[1]) / 3
    (found,) = watched.found
    np.testing.assert_allclose(found["means"], np.negative(watched.losses), rtol=tolerance)
    assert watched.losses[1] < watched.losses[0] - 0.5


def marked_slow(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Parameters, of which those that the default run does not measure are slow."""
    return [pytest.param(*pair, marks=[] if pair in USUAL else [pytest.mark.slow]) for pair in pairs]


@pytest.mark.parametrize(
    "saves, resumes", marked_slow([pair for pair in (*USUAL, *OTHERS) if len(set(pair)) == 1])
)
@pytest.mark.parametrize("family", [DENSE, EXPERTS])
def test_a_run_resumes_bit_for_bit(family: str, saves: str, resumes: str, answers: Answers) -> None:
    whole, rest = answers[f"{family}, {saves}, saves"], answers[f"{family}, {saves} to {resumes}"]
    assert (rest.losses, rest.norms) == (whole.losses[1:], whole.norms[1:])


@pytest.mark.parametrize("saves, resumes", marked_slow([("own", "fp32"), ("fp32", "own")]))
@pytest.mark.parametrize("family", [DENSE, EXPERTS])
def test_a_run_changes_to_other_linear_layers(
    family: str, saves: str, resumes: str, answers: Answers
) -> None:
    whole, rest = answers[f"{family}, {saves}, saves"], answers[f"{family}, {saves} to {resumes}"]
    np.testing.assert_allclose((rest.losses, rest.norms), (whole.losses[1:], whole.norms[1:]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("saves, resumes", OTHERS[4:])
@pytest.mark.parametrize("family", [DENSE, EXPERTS])
def test_a_run_changes_its_recipe(family: str, saves: str, resumes: str, answers: Answers) -> None:
    whole, rest = answers[f"{family}, {saves}, saves"], answers[f"{family}, {saves} to {resumes}"]
    assert rest.losses[0] == pytest.approx(whole.losses[1], rel=NEAR_FP32)


@pytest.mark.parametrize(
    "layout", ["ep2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "tp2 with sp", "dp2"))]
)
def test_two_processes_train_as_one_does(layout: str, answers: Answers) -> None:
    pair, one = answers[f"{layout}, fp32"], answers[f"{LAYOUTS[layout][0]}, fp32, none"]
    np.testing.assert_allclose((pair.losses, pair.norms), (one.losses, one.norms), rtol=1e-5)


@pytest.mark.parametrize(
    "layout, recipe",
    [
        ("tp2 with sp", "delayed"),
        *(
            pytest.param(layout, recipe, marks=pytest.mark.slow)
            for layout, recipe in product(LAYOUTS, ("delayed", "tensorwise"))
            if (layout, recipe) != ("tp2 with sp", "delayed")
        ),
    ],
)
def test_two_processes_round_nearly_as_one_does(layout: str, recipe: str, answers: Answers) -> None:
    """Not just as: other than in our layers, a scale is that of a rank's part of a tensor."""
    family, _ = LAYOUTS[layout]
    one = answers[f"{family}, {recipe}"]
    assert_alike(
        answers[f"{layout}, {recipe}"],
        list(zip(one.losses, one.norms, strict=True)),
        NOISE_OF_EXPERTS if family == EXPERTS else USUAL_NOISE,
    )


@pytest.mark.parametrize(
    "layout", ["tp2 with sp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "ep2"))]
)
def test_delayed_scaling_resumes_under_another_layout(layout: str, answers: Answers) -> None:
    whole, rest = answers[f"{layout}, delayed"], answers[f"{layout} to dp2"]
    assert rest.losses[0] == pytest.approx(whole.losses[1], rel=USUAL_NOISE.loss)


def test_the_scales_of_an_expert_find_it_on_another_rank(answers: Answers) -> None:
    # Four layers of two projections, eight experts each, with three quantisers in use.
    assert answers["read"].found == [{"count": 4 * 2 * 8 * 3, "wrong": []}] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("answers")  # skips
def test_the_scales_of_experts_of_two_ranks_come_together_in_one_process(
    models: dict[str, str], tmp_path: Path
) -> None:
    runs = expert_runs(models, str(tmp_path))
    measure({"marked": runs["marked"]}, 2)
    read = measure({"read": runs["read"]}, 1)["read"]
    assert read.found == [{"count": 4 * 2 * 8 * 3, "wrong": []}]
