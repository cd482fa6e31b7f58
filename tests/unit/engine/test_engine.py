"""Budgets, ends, mistakes and faults of the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_engine.sampling import SamplingParams
from npr_engine.testing import EOS, GRAMMAR, PIECES
from npr_ext.errors import UserError
from tests.unit.engine.conftest import CONFIG, PROMPTS, Plain, fused

GREEDY = SamplingParams(max_tokens=300, temperature=0.0)


def test_the_engine_reads_the_very_tensors_it_was_given(plain: Plain) -> None:
    weights = {name: tensor.clone() for name, tensor in fused(plain.model, CONFIG).items()}
    engine = Engine(InferenceModel(CONFIG, weights), GRAMMAR, EngineConfig(num_kv_slots=1024))
    before = engine.generate(PROMPTS[:1], GREEDY)[0]
    weights["decoder.final_layernorm.weight"].zero_()  # all logits equal: the first token wins
    engine.weights_updated(1)
    after = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=3, temperature=0.0))[0]
    assert before.finish_reason == "eos" and after.token_ids.tolist() == [0, 0, 0]


@pytest.mark.parametrize("max_tokens", [1, 5, 24, 30, 37, 44, 52, 61, 70])
def test_max_tokens_is_never_exceeded(max_tokens: int, new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    for rollout in engine.generate(PROMPTS, SamplingParams(max_tokens=max_tokens, temperature=0.0)):
        assert rollout.num_tokens <= max_tokens and rollout.finish_reason in ("length", "budget")
    engine.check_integrity()


@pytest.mark.parametrize("path", [1, 30, 36, 40, 45, 48, 56])
def test_the_critical_path_is_never_exceeded(path: int, new_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=300, max_critical_path=path, temperature=0.0)
    for rollout in new_engine().generate(PROMPTS, params):
        assert rollout.critical_path <= path and rollout.finish_reason in ("length", "budget")
        assert rollout.num_tokens > path or path < 36


def test_a_fork_beyond_the_budget_is_not_opened(new_engine: Callable[..., Engine]) -> None:
    (full,) = new_engine().generate(PROMPTS[:1], GREEDY)
    opened = int((full.branch_ids > 0).argmax())
    forced = 3 * 5
    for max_tokens, reason in ((opened + forced + 2, "budget"), (opened + forced + 3, "length")):
        (cut,) = new_engine().generate(PROMPTS[:1], SamplingParams(max_tokens=max_tokens, temperature=0.0))
        assert cut.finish_reason == reason
        assert cut.branch_ids.any() == (reason == "length")
        assert cut.token_ids.tolist() == full.token_ids.tolist()[: len(cut.token_ids)] or reason == "length"


@pytest.mark.parametrize("limit", [{"max_branches": 2}, {"max_blocks": 1}, {"max_blocks": 0}])
def test_too_many_branches_or_blocks_end_by_budget(
    limit: dict[str, int], new_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=300, temperature=0.0, **limit)
    (rollout,) = new_engine().generate(PROMPTS[:1], params)
    assert rollout.finish_reason == "budget" and PIECES[rollout.token_ids[-1]] == "</guideline>"


def test_a_response_that_breaks_the_language_says_how(new_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=400, temperature=3.0)
    reasons = {rollout.finish_reason for rollout in new_engine().generate(PROMPTS * 20, params)}
    assert {"malformed(STRAY_TAG)", "malformed(NESTED_TAG)"} <= reasons


def test_tags_mean_nothing_without_branching(new_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=400, temperature=3.0, branching=False)
    for rollout in new_engine().generate(PROMPTS * 4, params):
        assert rollout.finish_reason in ("eos", "length") and not rollout.forced.any()
        assert (rollout.token_ids[-1] == EOS) == (rollout.finish_reason == "eos")


def test_abort_keeps_what_was_decoded(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    lengths = [1, 300, 300]
    params = [SamplingParams(max_tokens=length, temperature=0.0) for length in lengths]
    rollouts = engine.generate(PROMPTS[:3], params, on_progress=lambda *_: engine.abort("1"))
    assert [rollout.finish_reason for rollout in rollouts] == ["length", "aborted", "eos"]
    assert rollouts[1].num_tokens == 1
    assert not engine.abort("unknown")
    engine.check_integrity()


def test_a_failing_step_leaves_the_engine_as_new(
    inference_model: InferenceModel, new_engine: Callable[..., Engine]
) -> None:
    engine = new_engine()
    expected = engine.generate(PROMPTS, GREEDY)

    def interrupt(finished: int, total: int) -> None:
        raise RuntimeError("the caller fails")

    with pytest.raises(RuntimeError, match="the caller fails"):
        engine.generate(PROMPTS, GREEDY, on_progress=interrupt)
    engine.check_integrity()
    again = engine.generate(PROMPTS, GREEDY)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in expected]


def test_memory_can_be_released_and_resumed(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    engine.generate(PROMPTS[:1], GREEDY)
    engine.release_memory()
    with pytest.raises(UserError, match="resume_memory"):
        engine.generate(PROMPTS[:1], GREEDY)
    engine.resume_memory()
    assert engine.generate(PROMPTS[:1], GREEDY)[0].finish_reason == "eos"


def test_mistakes_are_named(new_engine: Callable[..., Engine], plain: Plain) -> None:
    engine = new_engine(num_kv_slots=64)
    for prompts, params, ids, text in (
        ([[]], GREEDY, None, "prompt is empty"),
        ([[1]], GREEDY, None, "raise num_kv_slots"),
        ([[len(PIECES)]], GREEDY, None, "token ids in"),
        ([[1], [2]], SamplingParams(max_tokens=1), ["a", "a"], "'a' is given twice"),
        ([[1], [2]], [GREEDY], None, "1 sampling parameters"),
    ):
        with pytest.raises(UserError, match=text):
            engine.generate(prompts, params, ids)
        assert engine.generate([], GREEDY) == []
    with pytest.raises(UserError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(UserError, match="branching=False"):
        SamplingParams(max_tokens=1, ignore_eos=True)
    with pytest.raises(UserError, match=r"lack 'decoder\.layers\.0"):
        InferenceModel(CONFIG, {"embedding.word_embeddings.weight": plain.model.lm_head.weight})


def test_a_sample_id_draws_as_the_request_id_of_that_name(new_engine: Callable[..., Engine]) -> None:
    def drawn(name: str, sample_id: str | None) -> list[int]:
        params = SamplingParams(max_tokens=60, temperature=1.5, seed=4, branching=False, sample_id=sample_id)
        return new_engine().generate(PROMPTS[:1], params, [name])[0].token_ids.tolist()

    assert drawn("b", "a") == drawn("c", "a") == drawn("a", None) != drawn("b", None)


def test_statistics_tell_who_runs_and_who_waits(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(max_running_requests=2)
    for name in "abc":
        engine.submit(engine.request(PROMPTS[0], SamplingParams(max_tokens=20), name))
    assert (engine.stats().running, engine.stats().waiting) == (0, 3)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)


def test_numbers_beyond_all_tokens_and_all_memory_are_no_limit(new_engine: Callable[..., Engine]) -> None:
    prompts = PROMPTS[:4]
    usual = new_engine().generate(prompts, SamplingParams(max_tokens=30))
    vast = SamplingParams(max_tokens=30, top_k=10**12, max_branches=8, max_blocks=10**12)
    engine = new_engine(max_running_requests=10**12, max_batch_tokens=10**12)
    for one, other in zip(engine.generate(prompts, vast), usual, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
