import json
from pathlib import Path

import numpy as np
import pytest

from megatron_npr.cli import main
from megatron_npr.rollout.rollout_file import write_rollouts
from npr_engine.rollout import Rollout
from tests.support.report_sample import rollout
from tests.unit.rollout.test_rollout_file import vocabulary


def traced(folder: Path, *rollouts: Rollout) -> list[str]:
    write_rollouts(folder / "rollouts.jsonl", rollouts, vocabulary())
    return ["trace", str(folder / "rollouts.jsonl"), "--out", str(folder / "trace.json")]


def test_concurrent_branches_are_counted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, pieces = rollout()
    assert main(traced(tmp_path, made, made)) == 0
    assert "2 rollouts, 2 with a block whose branches decoded in the same steps" in capsys.readouterr().out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    drawn = "".join(
        event["name"] for event in events if event["ph"] == "X" and event["tid"] == 2 and event["pid"] == 0
    )
    assert drawn == "".join(
        piece for piece, branch in zip(pieces, made.branch_ids, strict=True) if branch == 2
    )


def hand_made(**steps: list[int]) -> Rollout:
    """`a</guideline>` then two branches of three tokens, the first one forced, then a forced join and an end.

    Steps 0 1 | 2 3 4 | 2 3 4 | 5 6 are what an engine does; `steps` replaces those of trunk, one, two or join.
    """
    made = {"trunk": [0, 1], "one": [2, 3, 4], "two": [2, 3, 4], "join": [5, 6], **steps}
    decode_steps = np.concatenate([made[name] for name in ("trunk", "one", "two", "join")]).astype(np.int32)
    forced = np.array([0, 0, 1, 0, 0, 1, 0, 0, 1, 0], np.bool_)
    logprobs = np.where(forced, np.nan, -1).astype(np.float32)
    return Rollout(
        request_id="hand/0",
        prompt_ids=np.arange(3, dtype=np.int32),
        token_ids=np.arange(10, dtype=np.int32),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        forced=forced,
        branch_ids=np.array([0, 0, 1, 1, 1, 2, 2, 2, 0, 0], np.int32),
        decode_steps=decode_steps,
        positions=np.array([3, 4, 5, 6, 7, 5, 6, 7, 8, 9], np.int32),
        finish_reason="eos",
        branching=True,
        weights_version=0,
        constrained=False,
    )


def test_the_figures_of_a_hand_made_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*traced(tmp_path, hand_made()), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["num_rollouts"], verdict["num_parallel"], verdict["faults"]) == (1, 1, [])
    assert verdict["concurrency"] == 7 / 7  # seven sampled tokens in steps 0 to 6
    assert verdict["critical_path"] == 5  # two of the trunk, two of a branch, one after the join
    # The steps in which only forced tokens came to be are lost.
    assert verdict["parallel_efficiency"] == 5 / 7


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ({"two": [1, 3, 4]}, "fork at token 5: step 1 is not after step 1 of token 1"),
        ({"one": [2, 3, 6], "two": [2, 3, 4]}, "join at token 8: step 5 is not after step 6 of token 4"),
        ({"one": [2, 3, 3]}, "token 4: step 3 does not follow step 3"),
        (
            {"two": [5, 6, 7], "join": [8, 9]},
            "siblings at token 2: branch 1 of 2 decoded in steps 3..4, none of them together with a sibling",
        ),
    ],
)
def test_a_hand_made_wrong_trace_is_caught_and_named(
    steps: dict[str, list[int]], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(traced(tmp_path, hand_made(), hand_made(**steps))) == 1
    printed = capsys.readouterr().out
    assert f"hand/0: {named}" in printed
    assert "2 rollouts, 1 with a block" in printed


def test_a_run_folder_stands_for_its_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, *out = traced(tmp_path, hand_made())
    assert main(["trace", str(tmp_path), *out]) == 0
    demo = tmp_path / "demo"
    (demo / "first" / "measured").mkdir(parents=True)
    (demo / "latest").write_text("first\n")
    (tmp_path / "rollouts.jsonl").rename(demo / "first" / "measured" / "npr.jsonl")
    assert main(["trace", str(demo), *out]) == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("")
    capsys.readouterr()
    assert main(["trace", str(tmp_path / "empty"), *out]) == 2
    assert "has no rollouts (rollouts.jsonl" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "blank.jsonl"), *out]) == 2
    assert "is empty" in capsys.readouterr().err
