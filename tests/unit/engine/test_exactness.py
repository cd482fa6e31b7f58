"""What the engine decodes is what the plain model says, whatever else happens in the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from npr_engine.engine import Engine, EngineConfig
from npr_engine.language.grammar import Response
from npr_engine.model.transformer import InferenceModel, KVCache, Step
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.testing import GRAMMAR, VOCABULARY
from npr_ext import branch_layout
from tests.support.errors import allowed_error, largest_error
from tests.unit.engine.conftest import CONFIG, PROMPTS, Plain, fused

GREEDY = SamplingParams(max_tokens=300, temperature=0.0)
TIGHT = {"num_kv_slots": 336, "block_size": 4, "max_batch_tokens": 24}
SIZES: dict[str, dict[str, int]] = {
    "one at a time": {"max_running_requests": 1},
    "blocks of one slot": {"block_size": 1},
    "blocks of 64 slots": {"block_size": 64},
    "chunks of 9 tokens": {"max_batch_tokens": 9},
    "too little memory": TIGHT,
}


def same(one: Rollout, other: Rollout) -> None:
    """Equal tokens and log-probs."""
    assert one.token_ids.tolist() == other.token_ids.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
    assert one.finish_reason == other.finish_reason


def test_greedy_output_is_the_plain_models_choice_at_every_token(
    plain: Plain, new_engine: Callable[..., Engine]
) -> None:
    for rollout in new_engine().generate(PROMPTS, GREEDY):
        assert isinstance(GRAMMAR.parse(rollout.token_ids), Response), rollout.finish_reason
        with torch.no_grad():
            logits, _ = plain.logits(rollout.prompt_ids.tolist(), rollout.token_ids.tolist())
        best = logits.argmax(-1).numpy()
        assert (best == rollout.token_ids)[~rollout.forced].all()
        assert rollout.forced.sum() >= 3 * 5 + 3


@pytest.mark.parametrize("size", SIZES)
def test_greedy_output_does_not_depend_on_the_engines_sizes(
    size: str, new_engine: Callable[..., Engine]
) -> None:
    engine = new_engine(**SIZES[size])
    for one, other in zip(
        engine.generate(PROMPTS, GREEDY), new_engine().generate(PROMPTS, GREEDY), strict=True
    ):
        same(one, other)
    engine.check_integrity()
    assert (engine.stats().preemptions > 0) == (size == "too little memory")


@pytest.mark.parametrize("size", ["roomy", *SIZES])
def test_float32_differs_only_where_two_tokens_are_as_good(size: str, plain: Plain) -> None:
    """Against the float64 reference: the greedy token, but where rounding may exchange the two best logits (counted), and
    log-probs. A logit may err twice as far as one of transformers' own float32 model."""
    weights = {name: weight.float() for name, weight in fused(plain.model, CONFIG).items()}
    config = EngineConfig(**{"num_kv_slots": 4096, **SIZES.get(size, {})})
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, config)
    rounded = Plain(copy.deepcopy(plain.model).float())
    undecided = sampled = 0
    for rollout in engine.generate(PROMPTS, GREEDY):
        with torch.no_grad():
            logits, theirs = (
                model.logits(rollout.prompt_ids.tolist(), rollout.token_ids.tolist())[0]
                for model in (plain, rounded)
            )
        allowed = allowed_error(theirs, logits)
        best, second = logits.topk(2).values.T.numpy()
        close = best - second <= 2 * allowed
        mine = ~rollout.forced
        assert (logits.argmax(-1).numpy() == rollout.token_ids)[mine & ~close].all()
        assert largest_error(rollout.logprobs[mine], plain.logprobs(rollout)[mine]) <= 2 * allowed
        undecided, sampled = undecided + int((mine & close).sum()), sampled + int(mine.sum())
    assert sampled > 200
    assert undecided <= sampled // 100


@pytest.mark.parametrize("sizes", [{}, TIGHT], ids=["roomy", "too little memory"])
def test_samples_do_not_depend_on_what_else_is_in_the_batch(
    sizes: dict[str, int], new_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=200, temperature=1.5, seed=3)
    ids = [f"request {index}" for index in range(12)]
    together = new_engine(**sizes).generate(PROMPTS * 2, params, ids)
    alone = new_engine()
    for index in (0, 5, 7):
        same(together[index], alone.generate([(PROMPTS * 2)[index]], params, [ids[index]])[0])
    assert together[0].token_ids.tolist() != together[6].token_ids.tolist(), "equal prompts, other ids"


@pytest.mark.parametrize("branching", [True, False])
def test_log_probs_are_the_plain_models(
    branching: bool, plain: Plain, new_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=250, branching=branching, temperature=1.3, top_p=0.9)
    for rollout in new_engine(**TIGHT).generate(PROMPTS * 3, params):
        expected = plain.logprobs(rollout)
        assert np.isnan(rollout.logprobs[rollout.forced]).all()
        np.testing.assert_allclose(rollout.logprobs[~rollout.forced], expected[~rollout.forced], atol=1e-5)


def test_log_probs_right_after_each_fork_and_join_are_the_plain_models(
    plain: Plain, new_engine: Callable[..., Engine]
) -> None:
    (rollout,) = new_engine().generate(PROMPTS[:1], GREEDY)
    expected = plain.logprobs(rollout)
    first_sampled = np.flatnonzero(~rollout.forced[1:] & rollout.forced[:-1]) + 1
    assert len(first_sampled) == 7, "five branches, two joins"
    np.testing.assert_allclose(rollout.logprobs[first_sampled], expected[first_sampled], atol=1e-6)


def test_positions_and_branch_ids_are_those_of_the_layout(new_engine: Callable[..., Engine]) -> None:
    for rollout in new_engine().generate(PROMPTS, SamplingParams(max_tokens=120, seed=1)):
        prompt = len(rollout.prompt_ids)
        tokens = torch.from_numpy(np.concatenate((rollout.prompt_ids, rollout.token_ids)))
        layout = branch_layout(tokens, tags=VOCABULARY.tags, prompt_lengths=prompt)
        assert layout.position_ids[prompt:].tolist() == rollout.positions.tolist()
        assert layout.branch_ids[prompt:].tolist() == rollout.branch_ids.tolist()
        assert rollout.critical_path == int(layout.position_ids.max()) + 1 - prompt


def test_forks_feed_each_token_once(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    (rollout,) = engine.generate(PROMPTS[:1], GREEDY)
    fed = len(PROMPTS[0]) + rollout.num_tokens - 1  # the last token is never fed
    assert engine.stats().computed_tokens == fed


def test_a_group_computes_its_prompt_once_and_the_next_round_begins_anew(
    new_engine: Callable[..., Engine],
) -> None:
    engine, prompt = new_engine(), PROMPTS[0] * 20
    params = SamplingParams(max_tokens=1, branching=False)
    engine.generate([prompt] * 8, params)
    assert engine.stats().computed_tokens == len(prompt) - 1 + 8
    engine.generate([prompt], params)  # as after a restart, which knows no prompt
    assert engine.stats().computed_tokens == 2 * (len(prompt) - 1) + 9


def test_requests_one_after_the_other_compute_their_prompt_once_until_the_weights_change(
    new_engine: Callable[..., Engine],
) -> None:
    engine, prompt = new_engine(), PROMPTS[0] * 20

    def serve(name: str) -> None:
        engine.submit(engine.request(prompt, SamplingParams(max_tokens=1, branching=False), name))
        while engine.num_unfinished:
            engine.step()

    serve("first")
    serve("second")
    assert engine.stats().computed_tokens == len(prompt) - 1 + 2
    engine.weights_updated(1)
    serve("third")
    assert engine.stats().computed_tokens == 2 * (len(prompt) - 1) + 3


def test_ignoring_eos_decodes_exactly_max_tokens(new_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=150, branching=False, ignore_eos=True)
    for rollout in new_engine().generate(PROMPTS, params):
        assert rollout.num_tokens == rollout.critical_path == 150 and rollout.finish_reason == "length"
        assert not rollout.forced.any() and not rollout.branch_ids.any()


@pytest.mark.parametrize("branching", [True, False])
def test_the_repetition_penalty_acts_inside_steps_only(
    branching: bool, new_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=250, repetition_penalty=1.5, branching=branching)
    steps_penalised = 0
    for rollout in new_engine(**TIGHT).generate(PROMPTS * 2, params):
        inside = np.zeros(rollout.num_tokens, np.bool_)
        for start in np.flatnonzero(rollout.token_ids == VOCABULARY.tags.step):
            ends = np.flatnonzero(rollout.token_ids[start:] == VOCABULARY.tags.step_end)
            inside[start : start + ends[0] + 1 if len(ends) else None] = True
        sampled = ~rollout.forced
        changed = rollout.logprobs != rollout.sampler_logprobs
        assert not changed[sampled & ~inside].any()
        steps_penalised += int(changed[sampled & inside].any())
    assert steps_penalised >= 6


@pytest.mark.parametrize(("branching", "updates"), [(True, True), (False, True), (True, False)])
def test_what_was_decoded_before_changes_no_bit(
    branching: bool, updates: bool, new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has a new engine where the uninterrupted one goes on with its old one: with new weights in a stage,
    with the same ones in `npr sample` and `npr eval`. Kernels may sum in another order where a row stands elsewhere in a
    batch or in memory, so the batches themselves are the same."""

    def sampled(engine: Engine, seed: int) -> tuple[list[Rollout], list[list[np.ndarray]]]:
        batches: list[list[np.ndarray]] = []
        forward = engine.model.forward

        def recorded(step: Step, cache: KVCache) -> torch.Tensor:
            inputs = (step.token_ids, step.positions, step.slots, step.lengths, step.sample_index)
            batches.append([part.numpy().copy() for part in inputs])
            return forward(step, cache)

        params = SamplingParams(max_tokens=120, seed=seed, branching=branching)
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", recorded)
            return engine.generate(PROMPTS * 4, params), batches

    old = new_engine()
    for seed in (1, 2):
        sampled(old, seed)
    if updates:
        old.weights_updated(1)
    (ours, our_batches), (theirs, their_batches) = sampled(old, 3), sampled(new_engine(), 3)
    assert len(our_batches) == len(their_batches) > 10
    for one, other in zip(our_batches, their_batches, strict=True):
        for mine, its in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, its)
    for rollout, same_rollout in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(rollout.logprobs, same_rollout.logprobs)
