"""The text of events is the text of the rollout, whatever the tokens are cut into."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.server.text.delta import TextDelta, joined
from megatron_npr.server.text.transcript import Transcript
from npr_engine.engine import Engine, EngineConfig, StepOutput
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.streaming import TokenEvent
from npr_engine.testing import EOS
from npr_ext import TagIds
from tests.support.random_model import GRAMMAR, random_model

BYTES = Vocabulary(
    [*(bytes((byte,)) for byte in range(256)), *(f"<{n}>" for n in range(9))], 256, TagIds(*range(257, 265))
)


def event(branch: int, ids: list[int], forced: bool = False) -> TokenEvent:
    logprob = np.nan if forced else -1.0
    return TokenEvent(
        "r",
        branch,
        np.array(ids, np.int32),
        np.full(len(ids), forced),
        np.full(len(ids), logprob, np.float32),
    )


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.fixture(scope="module")
def responses() -> list[tuple[list[TokenEvent], Rollout]]:
    """Many responses of a model that likes tags, with pieces that are parts of characters, and the events of each."""
    engine = Engine(random_model(3), GRAMMAR, EngineConfig(num_kv_slots=4096, block_size=4))
    for index in range(300):
        params = SamplingParams(max_tokens=150, temperature=1.0, seed=index, constrain=index % 4 > 0)
        engine.submit(engine.request([10, 11], params, str(index)))
    outputs: list[StepOutput] = []
    while engine.num_unfinished:
        outputs.append(engine.step())
    rollouts = {rollout.request_id: rollout for output in outputs for rollout in output.rollouts}
    events = [item for output in outputs for item in output.events]
    assert sum(rollout.branch_ids.max() > 1 for rollout in rollouts.values()) > 5, "the test needs branches"
    return [([e for e in events if e.request_id == name], rollout) for name, rollout in rollouts.items()]


def test_the_text_and_counts_of_a_transcript_are_those_of_the_rollout(
    responses: list[tuple[list[TokenEvent], Rollout]],
) -> None:
    for events, rollout in responses:
        transcript = Transcript(GRAMMAR.vocabulary, silent=frozenset((EOS,)))
        deltas = [delta for item in events for delta in transcript.push(item)] + transcript.end()
        ids = [token for token in rollout.token_ids.tolist() if token != EOS]
        assert text_of(deltas) == GRAMMAR.vocabulary.text(ids)
        tokens = [token for delta in deltas for token in delta.tokens]
        assert [token.token_id for token in tokens] == ids
        counts = transcript.counts
        assert counts.tokens == rollout.num_tokens
        assert counts.forced == rollout.forced.sum()
        assert counts.critical_path == rollout.critical_path


def test_interleaved_branches_have_the_same_texts(
    responses: list[tuple[list[TokenEvent], Rollout]],
) -> None:
    for events, _ in responses:
        texts: list[dict[int, str]] = []
        for interleave in (False, True):
            transcript = Transcript(GRAMMAR.vocabulary, interleave=interleave)
            deltas = [delta for item in events for delta in transcript.push(item)] + transcript.end()
            texts.append({})
            for delta in deltas:
                texts[-1][delta.branch] = texts[-1].get(delta.branch, "") + delta.text
        assert texts[0] == texts[1]


def test_the_first_open_branch_is_read_at_once_and_its_siblings_after_it() -> None:
    close = BYTES.tags.step_end
    transcript = Transcript(BYTES)
    read = [
        text_of(transcript.push(item))
        for item in (
            event(0, [*b"p"]),
            event(2, [*b"x"]),
            event(1, [*b"a"]),
            event(2, [*b"y", close]),
            event(1, [*b"b", close]),
            event(3, [*b"m"]),
            event(3, [*b"n", close]),
            event(0, [*b"q"]),
        )
    ]
    end = "<6>"
    assert read == ["p", "", "a", "", f"b{end}xy{end}", "m", f"n{end}", "q"]


@given(st.text(max_size=8), st.data())
def test_characters_are_never_cut(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8", "ignore")
    transcript = Transcript(BYTES)
    out: list[TextDelta] = []
    while raw:
        length = data.draw(st.integers(1, len(raw)))
        out += transcript.push(event(0, list(raw[:length])))
        raw = raw[length:]
    whole = text.encode("utf-8", "ignore").decode()
    assert text_of(out + transcript.end()) == whole
    assert "\ufffd" in whole or all("\ufffd" not in delta.text for delta in out)


def test_stop_strings_are_looked_for_in_the_trunk_alone() -> None:
    transcript = Transcript(BYTES, stops=["stop"])
    close = BYTES.tags.step_end
    out = transcript.push(event(0, list(b"st")))
    assert out == []
    out += transcript.push(event(1, [*b"op stop", close]))
    assert text_of(out) == "stop stop<6>"
    assert not transcript.stopped
    out += transcript.push(event(0, list(b" s"))) + transcript.push(event(0, list(b"top!")))
    assert text_of(out) == "stop stop<6> "
    assert transcript.stopped
    assert transcript.counts.tokens == 2 + 8 + 2 + 3


def test_forced_text_is_marked_and_has_no_log_probability() -> None:
    transcript = Transcript(BYTES, stops=["zz"])
    out = transcript.push(event(0, list(b"az"), forced=True)) + transcript.push(event(0, list(b"bz")))
    out += transcript.end()
    assert [(delta.text, delta.forced) for delta in joined(out)] == [("az", True), ("bz", False)]
    assert [token.logprob for delta in out for token in delta.tokens] == [None, None, -1.0, -1.0]
