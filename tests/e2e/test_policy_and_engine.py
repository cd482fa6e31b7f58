"""The colocated engine and the trainer are one model: same log-probs, same storage, new weights after a step."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from numpy.typing import NDArray

from megatron_npr.config import Stage3Config, load_config
from megatron_npr.data.packing import PackedRow, TrainSample
from megatron_npr.data.rounds import Turn
from megatron_npr.demo.base import FOLDER
from megatron_npr.rl.agreement import Agreement, Segment
from megatron_npr.rl.losses import papo_loss, sft_loss
from megatron_npr.rollout.collect import collect, train_sample
from megatron_npr.run_folder.manifest import read_manifest, write_manifest
from megatron_npr.runtime.process_world import check_sizes, close_world
from megatron_npr.stages.prompt_sets import training_prompts
from megatron_npr.training.learner import Learner
from megatron_npr.training.session import open_session
from megatron_npr.training.step_report import StepReport
from npr_engine.backend import Backend
from npr_engine.rollout import Rollout
from npr_ext import BranchLayout, branch_layout
from npr_ext.errors import UserError
from tests.support.logits.transformers import log_prob_noise
from tests.support.places import CONFIGS

DEMO = CONFIGS / "demo" / "stage3.toml"


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Stage3Config]:
    overrides = ["--run.dir", str(tmp_path), "--model.path", str(FOLDER), "--run.threads", "1"]
    overrides += [
        "--rollout.prompts_per_step",
        "16",
        "--rollout.samples_per_prompt",
        "4",
        "--optimizer.warmup_steps",
        "0",
    ]
    yield load_config(Stage3Config, DEMO, overrides)
    close_world()


def learner_and_engine(config: Stage3Config) -> tuple[Learner, Backend]:
    session = open_session(config)
    learner = Learner(session, config, num_updates=4)
    return learner, learner.build_engine(config.rollout)


def rollouts_of(learner: Learner, engine: Backend, config: Stage3Config) -> list[Rollout]:
    prompts = training_prompts(learner.session, config.data)[: config.rollout.prompts_per_step]
    turns = [Turn(prompt) for prompt in prompts]
    groups = collect(engine, learner.session.world, turns, config.rollout, identity=("test",))
    return [rollout for group in groups for rollout in group]


def noise(rollouts: list[Rollout]) -> float:
    """How far two float32 computations of a log-prob may be apart, by the longest rollout."""
    longest = max(rollouts, key=lambda rollout: len(rollout.token_ids))
    return log_prob_noise(
        FOLDER, torch.from_numpy(np.concatenate([longest.prompt_ids, longest.token_ids])).long()
    )


def compared_tokens(learner: Learner, rollout: Rollout) -> NDArray[np.bool_]:
    """The sampled tokens up to the first tag that may not stand where it does: behind it no layout says which branch is which,
    and stage 3 drops the response."""
    broken = learner.session.grammar.read(rollout.token_ids).structural
    within = len(rollout.token_ids) if broken is None else broken.token_index
    return ~rollout.forced & (np.arange(len(rollout.token_ids)) < within)


def test_trainer_gives_the_engines_log_probs_for_every_sampled_token(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    rollouts = rollouts_of(learner, engine, config)
    log_probs = learner.trainer.log_probs(
        [train_sample(rollout, 0.0) for rollout in rollouts], branching=True
    )
    forks, joins, allowed = 0, 0, noise(rollouts)
    for rollout, ours in zip(rollouts, log_probs, strict=True):
        sampled = compared_tokens(learner, rollout)
        np.testing.assert_allclose(ours[sampled], rollout.logprobs[sampled], rtol=0, atol=allowed)
        first_sampled = np.flatnonzero(sampled & np.concatenate([[False], rollout.forced[:-1]]))
        forks += int((rollout.branch_ids[first_sampled] > 0).sum())
        joins += int((rollout.branch_ids[first_sampled] == 0).sum())
    assert forks > 20 and joins > 5, f"{forks} tokens right after a fork, {joins} after a join were compared"


def test_a_position_that_is_off_behind_a_join_shows_there_and_else_there_is_rounding(
    config: Stage3Config,
) -> None:
    learner, engine = learner_and_engine(config)
    rollouts = rollouts_of(learner, engine, config)
    samples = [
        replace(train_sample(rollout, 0.0), loss_mask=compared_tokens(learner, rollout))
        for rollout in rollouts
    ]
    rows = learner.trainer.pack(samples, branching=True).rows
    good = agreement_of(learner, rows)
    assert good.largest <= noise(rollouts)
    planted = []
    for row in rows:
        layout = row.layout.clone()
        joined = row.targets[row.segments == Segment.JOINED]
        layout[0, BranchLayout.from_tensor(row.layout).predecessor[joined].long()] += 1
        planted.append(replace(row, layout=layout))
    bad = agreement_of(learner, planted)
    mean, _ = bad.segments[Segment.JOINED]
    assert mean > 1000 * good.mean
    assert all(mean > other for segment, (other, _) in bad.segments.items() if segment != Segment.JOINED)


def agreement_of(learner: Learner, rows: list[PackedRow]) -> Agreement:
    totals = learner.trainer.accumulate(rows, lambda lp, row: papo_loss(lp, row.advantages))
    return Agreement.of(totals)


def test_shared_prompts_give_the_same_log_probs(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    rollouts = rollouts_of(learner, engine, config)
    samples, allowed = [train_sample(rollout, 0.0) for rollout in rollouts], noise(rollouts)
    shared = learner.trainer.log_probs(samples, branching=True)
    learner.trainer.batch = config.batch.model_copy(update={"share_prompts": False})
    for one, other in zip(shared, learner.trainer.log_probs(samples, branching=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=allowed)


def test_the_engine_reads_the_trainers_own_tensors_and_sees_an_update(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    parameters = {weight.untyped_storage().data_ptr() for weight in learner.trainer.policy.parameters()}
    assert all(
        weight.untyped_storage().data_ptr() in parameters for weight in learner.weights.tensors.values()
    )
    before = rollouts_of(learner, engine, config)
    samples = [train_sample(rollout, (-1.0) ** index) for index, rollout in enumerate(before)]
    learner.trainer.step(samples, lambda lp, row: papo_loss(lp, row.advantages), branching=True)
    report = learner.update_engine(engine)
    assert report.sent == report.received == report.copied == 0
    assert report.in_place == sum(weight.nbytes for weight in learner.weights.tensors.values())
    after = rollouts_of(learner, engine, config)
    assert after[0].weights_version == before[0].weights_version + 1
    samples, allowed = [train_sample(rollout, 0.0) for rollout in after], noise(after)
    for rollout, ours in zip(after, learner.trainer.log_probs(samples, branching=True), strict=True):
        sampled = compared_tokens(learner, rollout)
        np.testing.assert_allclose(ours[sampled], rollout.logprobs[sampled], rtol=0, atol=allowed)
    assert any(
        len(a.token_ids) != len(b.token_ids) or (a.token_ids != b.token_ids).any()
        for a, b in zip(before, after)
    )


def test_weights_that_are_nan_stop_the_run_and_leave_the_engine_usable(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    norm = learner.weights.tensors["decoder.final_layernorm.weight"]
    kept = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"64 of 64 responses failed: .* NaN or infinite"):
        rollouts_of(learner, engine, config)
    norm.data.copy_(kept)
    assert any(rollout.finish_reason == "eos" for rollout in rollouts_of(learner, engine, config))


def test_another_text_in_one_branch_moves_no_logit_of_its_siblings(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    policy, tags = learner.trainer.policy.eval(), learner.session.vocabulary.tags
    rollout = next(
        r
        for r in rollouts_of(learner, engine, config)
        if r.branch_ids.max() >= 2 and r.finish_reason == "eos"
    )
    prompt = len(rollout.prompt_ids)
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.token_ids])).long()
    branches = torch.from_numpy(np.concatenate([np.zeros(prompt, np.int32), rollout.branch_ids]))
    layout = branch_layout(ids, tags=tags, prompt_lengths=prompt).as_tensor()
    changed = ids.clone()
    text = torch.nonzero(
        (branches == 1) & torch.from_numpy(np.concatenate([np.zeros(prompt, bool), ~rollout.forced]))
    )[:-2, 0]
    changed[text] = ids[text].roll(1)
    assert (changed != ids).any()
    with torch.no_grad():
        one, other = (policy.logits(tokens[None], layout)[0] for tokens in (ids, changed))
    assert torch.equal(one[branches > 1], other[branches > 1]), (
        "siblings see nothing of each other: exactly 0"
    )
    assert not torch.equal(one[branches == 1], other[branches == 1])


def test_sft_overfits_eight_samples(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    rollouts = [
        rollout for rollout in rollouts_of(learner, engine, config) if rollout.finish_reason == "eos"
    ][:8]
    assert len(rollouts) == 8
    samples = [
        TrainSample(
            r.prompt_ids, r.token_ids, np.ones(r.num_tokens, np.bool_), np.zeros(r.num_tokens, np.float32)
        )
        for r in rollouts
    ]
    settings = config.optimizer.model_copy(update={"lr": 3e-3, "schedule": "constant", "min_lr": 0.0})
    overfit = Learner(learner.session, config.model_copy(update={"optimizer": settings}), num_updates=150)
    for _ in range(150):
        report = overfit.trainer.step(samples, lambda lp, row: sft_loss(lp), branching=True)
    assert report.loss < 0.05


def test_a_fresh_process_resumes_bit_for_bit(config: Stage3Config) -> None:
    learner, engine = learner_and_engine(config)
    samples = [
        train_sample(rollout, (-1.0) ** i) for i, rollout in enumerate(rollouts_of(learner, engine, config))
    ]

    def step(one: Learner) -> float:
        return one.trainer.step(
            samples, lambda lp, row: papo_loss(lp, row.advantages), branching=True
        ).grad_norm

    step(learner)
    learner.checkpoints.save(1, learner.trainer, {})
    uninterrupted = [step(learner) for _ in range(2)]
    resumed, _ = learner_and_engine(
        config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
    )
    assert resumed.first_step == 1
    assert [step(resumed) for _ in range(2)] == uninterrupted
    for one, other in zip(
        learner.trainer.policy.parameters(), resumed.trainer.policy.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_an_optimizer_that_has_not_stepped_can_be_saved_and_its_weights_stay(config: Stage3Config) -> None:
    learner, _ = learner_and_engine(config)
    before = [weight.clone() for weight in learner.trainer.policy.parameters()]
    learner.checkpoints.save(0, learner.trainer, {})
    for one, other in zip(before, learner.trainer.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_save_that_waits_leaves_no_process_behind(
    config: Stage3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None)  # what an asynchronous save may have left
    learner, _ = learner_and_engine(config)
    before = multiprocessing.active_children()
    learner.checkpoints.save(0, learner.trainer, {})
    assert multiprocessing.active_children() == before


def test_a_checkpoint_of_another_model_is_one_clear_line(config: Stage3Config) -> None:
    learner, _ = learner_and_engine(config)
    path = learner.checkpoints.save(1, learner.trainer, {})
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, model={**manifest.model, "hidden_size": 64}))
    with pytest.raises(UserError, match="hidden_size is 64 there and 96 here"):
        learner.checkpoints.load(path, learner.trainer)


def test_a_world_that_does_not_fit_the_layout_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="world size 3 does not fit tp 2 x pp 1 x cp 1 = 2"):
        check_sizes(3, tp=2, pp=1, cp=1)


def test_an_entropy_bonus_raises_the_entropy_that_idle_tokens_do_not_dilute(config: Stage3Config) -> None:
    plain, engine = learner_and_engine(config)
    samples = [train_sample(rollout, 0.0) for rollout in rollouts_of(plain, engine, config)[:4]]
    optimizer = config.optimizer.model_copy(update={"lr": 1e-4, "schedule": "constant", "min_lr": 0.0})
    faster = config.model_copy(update={"optimizer": optimizer})
    paid = Learner(plain.session, faster, num_updates=3, entropy_coefficient=0.5)

    def step(learner: Learner, idle: int) -> StepReport:
        return learner.trainer.step(
            samples, lambda lp, row: papo_loss(lp, row.advantages), branching=True, idle_targets=idle
        )

    assert math.isnan(step(plain, 0).entropy)
    count = sum(int(sample.loss_mask.sum()) for sample in samples)
    reports = [step(paid, 3 * count), step(paid, 0), step(paid, 0)]
    assert 0 < reports[0].entropy < reports[1].entropy < reports[2].entropy < math.log(1e6)
    # Without advantages the loss is the bonus alone, over four times as many tokens in the first step.
    assert reports[0].loss == pytest.approx(-0.5 * reports[0].entropy / 4, rel=1e-5)
    assert reports[1].loss == pytest.approx(-0.5 * reports[1].entropy, rel=1e-5)
