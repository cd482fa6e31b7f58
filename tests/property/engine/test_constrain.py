"""With constrain=True a response cannot be malformed, whatever the model says."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.testing import encode
from npr_ext.layout.violations import Violation
from tests.support.random_model import GRAMMAR, random_model

PROMPTS = [encode(text) for text in ("a", "ab=?", "<plan>a</plan>")]
# What a parse says of a response that merely ends too early.
CUT = {
    Violation.UNCLOSED_GUIDELINE,
    Violation.UNCLOSED_PLAN,
    Violation.UNCLOSED_STEP,
    Violation.UNCLOSED_TAKEAWAY,
    Violation.UNFINISHED_BLOCK,
    Violation.MISSING_TAKEAWAY,
    Violation.NO_BOXED_ANSWER,
    Violation.EMPTY_BOXED_ANSWER,
    Violation.NO_EOS,
}
ROOMY = EngineConfig(num_kv_slots=20_000)
TIGHT = EngineConfig(num_kv_slots=400, block_size=4, max_batch_tokens=16)


@cache
def model(seed: int) -> InferenceModel:
    return random_model(seed)


def faults(rollout: Rollout) -> set[Violation]:
    """Violations anywhere in it. A block whose branches were cut is complete only up to the open branches, so each
    branch is read alone."""
    ids, branches = rollout.token_ids, rollout.branch_ids
    reading = GRAMMAR.read(ids)
    if reading.structural is None or not branches[-1:].any():
        return {defect.violation for defect in (*reading.defects, reading.structural) if defect} - CUT
    start = int(np.flatnonzero(branches == 0)[-1]) + 1  # the response ends inside this block
    trunk = GRAMMAR.parser()
    trunk.extend(ids[:start])
    found = {defect.violation for defect in trunk.defects}
    for number in np.unique(branches[start:]).tolist():
        branch = trunk.branch(number)
        branch.extend(ids[start:][branches[start:] == number])
        found |= {defect.violation for defect in (*branch.defects, branch.structural) if defect}
    return found - CUT


@given(
    seed=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0, 50.0]),
    max_tokens=st.integers(1, 150),
    path=st.one_of(st.none(), st.integers(1, 60)),
    config=st.sampled_from([ROOMY, TIGHT]),
    top_k=st.sampled_from([0, 0, 2]),
)
@settings(deadline=None, max_examples=150)
def test_a_constrained_response_is_valid_or_cut_by_its_budget(
    seed: int, temperature: float, max_tokens: int, path: int | None, config: EngineConfig, top_k: int
) -> None:
    engine = Engine(model(seed % 5), GRAMMAR, config)
    params = SamplingParams(
        max_tokens=max_tokens,
        max_critical_path=path,
        temperature=temperature,
        top_k=top_k,
        constrain=True,
        seed=seed,
    )
    for rollout in engine.generate(PROMPTS * 3, params):
        assert rollout.constrained
        assert rollout.finish_reason in ("eos", "length", "budget")
        if rollout.finish_reason == "eos":
            assert GRAMMAR.read(rollout.token_ids).defect is None
        assert not faults(rollout), GRAMMAR.vocabulary.text(rollout.token_ids.tolist())
        sampled = ~rollout.forced
        assert np.isfinite(rollout.logprobs[sampled]).all()
    engine.check_integrity()


def test_the_same_models_break_every_rule_without_the_constraint() -> None:
    found: set[Violation] = set()
    blocks = 0
    for seed in range(3):
        engine = Engine(model(seed), GRAMMAR, ROOMY)
        for constrain in (False, True):
            params = SamplingParams(max_tokens=300, constrain=constrain, seed=seed)
            for rollout in engine.generate(PROMPTS * 60, params):
                blocks += len(GRAMMAR.read(rollout.token_ids).response.blocks) * constrain
                if not constrain and rollout.finish_reason.startswith("malformed"):
                    found.add(Violation[rollout.finish_reason[len("malformed(") : -1]])
    assert {
        Violation.NESTED_TAG,
        Violation.MISMATCHED_TAG,
        Violation.STRAY_TAG,
        Violation.GUIDELINE_WITHOUT_PLAN,
        Violation.UNCLOSED_GUIDELINE,
    } <= found
    assert blocks >= 100
