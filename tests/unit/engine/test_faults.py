"""What goes wrong ends what it concerns, and nothing else: NaN, exceptions, aborts in every state, bad weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.step_commit import NO_DISTRIBUTION
from npr_engine.testing import GRAMMAR, PIECES, VOCABULARY, encode
from npr_ext.errors import UserError
from tests.support import random_model
from tests.unit.engine.conftest import CONFIG, PROMPTS, Plain, fused

GREEDY = SamplingParams(max_tokens=300, temperature=0.0)
TIGHT = {"num_kv_slots": 336, "block_size": 4, "max_batch_tokens": 24}


class PoisonedModel(InferenceModel):
    """The model, but after the token `poison` (from position `since` on) its logits are NaN."""

    poison, since = -1, 0

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        logits = super().forward(step, cache)
        poisoned = (step.token_ids == self.poison) & (step.positions >= self.since)
        logits[poisoned[step.sample_index]] = torch.nan
        return logits


@pytest.mark.parametrize("sizes", [{}, TIGHT], ids=["roomy", "too little memory"])
def test_nan_in_a_branch_ends_that_request_and_no_other(sizes: dict[str, int], plain: Plain) -> None:
    model = PoisonedModel(CONFIG, fused(plain.model, CONFIG))
    engine = Engine(model, GRAMMAR, EngineConfig(**{"num_kv_slots": 4096, **sizes}))
    sound = engine.generate(PROMPTS, GREEDY)
    # It is in a plan and a branch of the second block; two of the prompts have none.
    model.poison = PIECES.index("h")
    branch = (sound[0].token_ids == model.poison) & (sound[0].branch_ids > 0)
    model.since = int(sound[0].positions[branch][0])
    poisoned = engine.generate(PROMPTS, GREEDY)
    engine.check_integrity()
    for before, after in zip(sound, poisoned, strict=True):
        hit = np.flatnonzero((before.token_ids == model.poison) & (before.positions >= model.since))
        if len(hit) == 0:
            assert after.token_ids.tolist() == before.token_ids.tolist()
            assert after.finish_reason == "eos"
        else:
            assert before.branch_ids[hit[0]] > 0
            assert after.finish_reason == NO_DISTRIBUTION
            assert after.token_ids[-1] != VOCABULARY.eos_id and 20 < after.num_tokens < before.num_tokens
            assert np.isfinite(after.logprobs[~after.forced]).all()
    assert {rollout.finish_reason for rollout in poisoned} == {"eos", NO_DISTRIBUTION}
    assert engine.stats().free_blocks > 0
    model.poison = -1
    again = engine.generate(PROMPTS, GREEDY)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in sound]


def test_nan_in_the_kv_of_a_prompt_reaches_nobody_who_takes_over_its_slots() -> None:
    weights = random_model.random_weights(0)
    poison, (good, bad) = PIECES.index("h"), (encode("abcdefg" * 3), encode("abcdefh" * 3))
    weights["output_layer.weight"][poison, 0] = -100.0  # nobody samples it
    model = InferenceModel(random_model.CONFIG, weights)
    params = SamplingParams(max_tokens=60, constrain=True)
    config = EngineConfig(num_kv_slots=160, block_size=4, max_batch_tokens=16)
    expected = Engine(model, random_model.GRAMMAR, config).generate([good] * 6, params, list("abcdef"))
    weights["embedding.word_embeddings.weight"][poison] = torch.nan
    engine = Engine(model, random_model.GRAMMAR, config)
    found = engine.generate([bad, good, good, bad, good, bad, good, good, good], params, list("xabyczdef"))
    by_name = {rollout.request_id: rollout for rollout in found}
    for name in "xyz":
        assert by_name[name].finish_reason == NO_DISTRIBUTION and by_name[name].num_tokens == 0
    for rollout in expected:
        assert by_name[rollout.request_id].token_ids.tolist() == rollout.token_ids.tolist()
    engine.check_integrity()


def test_the_prompts_kv_of_a_failed_request_is_computed_anew(plain: Plain) -> None:
    model = PoisonedModel(CONFIG, fused(plain.model, CONFIG))
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=1024))
    model.poison = PROMPTS[0][-1]
    assert engine.generate(PROMPTS[:1], GREEDY)[0].finish_reason == NO_DISTRIBUTION
    assert engine.stats().free_blocks == engine.stats().num_blocks
    fed = engine.stats().computed_tokens
    model.poison = -1
    (rollout,) = engine.generate(PROMPTS[:1], GREEDY)
    assert rollout.finish_reason == "eos"
    assert engine.stats().computed_tokens - fed == len(PROMPTS[0]) + rollout.num_tokens - 1


class FailingModel(InferenceModel):
    """The model, but its forward fails in step `at` after it has written KV."""

    at, step_number = -1, 0

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        logits = super().forward(step, cache)
        self.step_number += 1
        if self.step_number == self.at:
            raise RuntimeError("out of memory")
        return logits


@pytest.mark.parametrize("at", [1, 2, 30, 50, 70])
def test_an_exception_of_the_model_leaves_the_engine_as_new(at: int, plain: Plain) -> None:
    model = FailingModel(CONFIG, fused(plain.model, CONFIG))
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=400, block_size=4))
    expected = engine.generate(PROMPTS, GREEDY)
    model.step_number, model.at = 0, at
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(PROMPTS, GREEDY)
    engine.check_integrity()
    assert engine.num_unfinished == 0
    again = engine.generate(PROMPTS, GREEDY)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in expected]


def waiting(engine: Engine) -> bool:
    """Request "0" has not started: the engine runs one at a time and "1" came first."""
    return engine.stats().steps == 3


def prefilling(engine: Engine) -> bool:
    return 0 < engine.stats().computed_tokens < 40


def in_the_trunk(engine: Engine) -> bool:
    return engine.stats().sampled_tokens == 5


def in_branches(engine: Engine) -> bool:
    return engine.stats().forks == 1 and engine.stats().joins == 0


def just_closed(engine: Engine) -> bool:
    """The step before the join: all branches have closed, the takeaway is not fed."""
    return engine.stats().sampled_tokens > 0 and engine.stats().steps == JOIN_STEP[0]


def preempted(engine: Engine) -> bool:
    return engine.stats().preemptions > 0


JOIN_STEP: list[int] = []
LONG = encode("12=?" * 20)
CASES: dict[str, tuple[Callable[[Engine], bool], list[list[int]], dict[str, int]]] = {
    "waiting": (waiting, [PROMPTS[1], PROMPTS[0]], {"max_running_requests": 1}),
    "prefilling": (prefilling, [PROMPTS[1], LONG], {"max_batch_tokens": 9}),
    "in the trunk": (in_the_trunk, [PROMPTS[0]], {}),
    "in branches": (in_branches, [PROMPTS[0]], {}),
    "at the join": (just_closed, [PROMPTS[0]], {}),
    "preempted": (preempted, [PROMPTS[index] for index in (1, 2, 3, 4, 0)], TIGHT),
}


@pytest.mark.parametrize("case", CASES)
def test_abort_in_every_state_leaves_nothing_behind(case: str, new_engine: Callable[..., Engine]) -> None:
    reached, prompts, sizes = CASES[case]
    if case == "at the join":
        probe = new_engine()
        probe.submit(probe.request(PROMPTS[0], GREEDY, "probe"))
        while probe.stats().joins == 0:
            probe.step()
        JOIN_STEP[:] = [probe.stats().steps - 1]
    engine = new_engine(**sizes)
    names = [*map(str, range(1, len(prompts))), "0"]  # "0" is the youngest
    for prompt, name in zip(prompts, names, strict=True):
        engine.submit(engine.request(prompt, GREEDY, name))
    rollouts: dict[str, Rollout] = {}
    told: list[int] = []
    while not reached(engine):
        output = engine.step()
        told += [t for e in output.events if e.request_id == "0" for t in e.token_ids.tolist()]
        rollouts |= {rollout.request_id: rollout for rollout in output.rollouts}
    assert engine.abort("0") and not engine.abort("0")
    engine.check_integrity()
    output = engine.take_output()
    told += [t for e in output.events for t in e.token_ids.tolist()]
    (aborted,) = output.rollouts
    assert aborted.request_id == "0" and aborted.finish_reason == "aborted"
    assert sorted(told) == sorted(aborted.token_ids.tolist())
    assert (aborted.num_tokens > 0) == (case not in ("waiting", "prefilling"))
    while engine.num_unfinished:
        rollouts |= {rollout.request_id: rollout for rollout in engine.step().rollouts}
        engine.check_integrity()
    alone = new_engine()
    for prompt, name in zip(prompts[:-1], names[:-1], strict=True):
        (expected,) = alone.generate([prompt], GREEDY)
        assert rollouts[name].token_ids.tolist() == expected.token_ids.tolist()
    engine.weights_updated(1)
    assert engine.stats().free_blocks == engine.stats().num_blocks


def test_a_stop_token_ends_the_response_in_trunk_and_branch(new_engine: Callable[..., Engine]) -> None:
    (full,) = new_engine().generate(PROMPTS[:1], GREEDY)
    stops = {"trunk": VOCABULARY.tags.guideline_end, "branch": PIECES.index("h"), "plain": PIECES.index("+")}
    for name, stop in stops.items():
        params = SamplingParams(max_tokens=300, temperature=0.0, stop_token_ids=(stop, 0))
        engine = new_engine()
        rollout, other = engine.generate([PROMPTS[0], PROMPTS[0]], [params, GREEDY])
        engine.check_integrity()
        assert rollout.finish_reason == "stopped" and other.finish_reason == "eos"
        assert other.token_ids.tolist() == full.token_ids.tolist()
        sampled = rollout.token_ids[~rollout.forced]
        assert (sampled == stop).sum() == 1, name
        if name != "branch":
            assert rollout.token_ids.tolist() == full.token_ids.tolist()[: rollout.num_tokens]
            assert rollout.token_ids[-1] == stop
    assert new_engine().generate(PROMPTS[:1], GREEDY)[0].finish_reason == "eos"


def test_the_oldest_request_takes_as_many_steps_as_alone(new_engine: Callable[..., Engine]) -> None:
    steps = []
    for num_others in (0, 20):
        engine = new_engine(max_batch_tokens=16)
        engine.submit(engine.request(PROMPTS[0], GREEDY, "old"))
        old: list[Rollout] = []
        submitted = 0
        while not old:
            while engine.num_unfinished <= num_others:
                short = SamplingParams(max_tokens=5 + submitted % 11, branching=False, ignore_eos=True)
                engine.submit(engine.request(PROMPTS[1], short, f"young {submitted}"))
                submitted += 1
            old = [rollout for rollout in engine.step().rollouts if rollout.request_id == "old"]
        assert old[0].branch_ids.max() == 3, "it has to fork: branches resume together"
        steps.append(engine.stats().steps)
    assert steps[1] == steps[0]


def test_update_weights_copies_in_place_and_voids_the_kv(plain: Plain) -> None:
    weights = {name: tensor.clone() for name, tensor in fused(plain.model, CONFIG).items()}
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, EngineConfig(num_kv_slots=1024))
    before = engine.generate(PROMPTS[:1], GREEDY)[0]
    zero = {"decoder.final_layernorm.weight": torch.zeros(CONFIG.hidden_size, dtype=torch.float64)}
    place = weights["decoder.final_layernorm.weight"].data_ptr()
    engine.update_weights(zero, 4)
    assert weights["decoder.final_layernorm.weight"].data_ptr() == place, "in place"
    assert engine.stats().free_blocks == engine.stats().num_blocks
    params = SamplingParams(max_tokens=3, temperature=0.0)
    after = engine.generate(PROMPTS[:1], params)[0]
    assert after.token_ids.tolist() == [0, 0, 0] and (before.weights_version, after.weights_version) == (0, 4)
    zero["decoder.final_layernorm.weight"].fill_(7.0)  # the caller's tensor is not the model's
    assert engine.generate(PROMPTS[:1], params)[0].token_ids.tolist() == [0, 0, 0]


def test_update_weights_changes_all_or_nothing(plain: Plain) -> None:
    weights = {name: tensor.clone() for name, tensor in fused(plain.model, CONFIG).items()}
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, EngineConfig(num_kv_slots=1024))
    engine.update_weights({}, 2)
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    good = {"decoder.final_layernorm.weight": torch.zeros(CONFIG.hidden_size, dtype=torch.float64)}
    fc2 = "decoder.layers.1.mlp.linear_fc2.weight"
    for bad, version, text in (
        ({"decoder.layers.7.mlp.linear_fc2.weight": kept[fc2]}, 3, "has no weight"),
        ({fc2: kept[fc2].T.contiguous()}, 3, r"the model's is torch.float64 \(64, 96\)"),
        ({fc2: kept[fc2].float()}, 3, "torch.float32"),
        ({}, 2, "version 2 is not newer than 2"),
        ({}, 1, "not newer"),
    ):
        with pytest.raises(UserError, match=text):
            engine.update_weights(good | bad, version)
        assert all(torch.equal(weights[name], kept[name]) for name in kept)
        assert engine.weights_version == 2
    assert engine.generate(PROMPTS[:1], GREEDY)[0].finish_reason == "eos"


def test_constrained_greedy_output_is_that_of_a_model_that_keeps_to_the_language(
    new_engine: Callable[..., Engine],
) -> None:
    params = SamplingParams(max_tokens=300, temperature=0.0, constrain=True)
    constrained = new_engine(**TIGHT).generate(PROMPTS, params)
    for one, other in zip(constrained, new_engine().generate(PROMPTS, GREEDY), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.finish_reason == "eos"
        assert one.constrained and not other.constrained
        numbers = one.forced & ~other.forced  # `N:` of each plan
        assert GRAMMAR.vocabulary.text(one.token_ids[numbers].tolist()) in ("1:2:3:1:2:", "1:2:3:")


def test_kv_utilisation_is_counted_when_memory_runs_out(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(num_kv_slots=1024, block_size=1)
    engine.generate(PROMPTS[:2], GREEDY)
    assert engine.stats().kv_utilisation is None
    for block_size, least in ((1, 0.99), (16, 0.85)):
        engine = new_engine(num_kv_slots=1024, block_size=block_size)
        params = SamplingParams(max_tokens=400, branching=False, ignore_eos=True)
        engine.generate(PROMPTS, params)
        utilisation = engine.stats().kv_utilisation
        assert utilisation is not None and least <= utilisation <= 1.0, block_size
