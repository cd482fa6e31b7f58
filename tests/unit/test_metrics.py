import json
from pathlib import Path

import pytest

from megatron_npr.metrics import MetricsLog, read_metrics


def test_a_step_is_one_json_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "none", True) as log:
        log.log(0, loss=0.5, **{"rollout/valid": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 0.5, "rollout/valid": 1}\n'


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "none", True) as log:
        log.log(0, loss=float("nan"))
    assert read_metrics(log.path) == [{"step": 0, "loss": None}]


def test_a_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "none", True) as log:
        for step in range(5):
            log.log(step, loss=float(step))
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    with MetricsLog(tmp_path, "none", True, first_step=3) as log:
        log.log(3, loss=30.0)
    assert [(record["step"], record["loss"]) for record in read_metrics(log.path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path, "none", True) as log:
            log.log(0, loss=1.0)
    assert len(read_metrics(log.path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", "tensorboard", False) as log:
        log.log(0, loss=1.0)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "tensorboard", True) as log:
        log.log(0, loss=1.5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.5)]


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsLog(tmp_path, "wandb", True) as log:
        log.log(0, loss=1.5)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads(log.path.read_text())["loss"] == 1.5
