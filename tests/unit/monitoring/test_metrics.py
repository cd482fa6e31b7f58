import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.monitoring.metrics import MetricsLog, read_metrics


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


def test_wandb_works_offline_where_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsLog(tmp_path, "wandb", True) as log:
        log.log(0, loss=1.5)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads(log.path.read_text())["loss"] == 1.5


def wandb_records(path: Path) -> list[Any]:
    """The records of a run's file: LevelDB's log behind a header of 7 bytes, each here in one piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, records = path.read_bytes(), 7, []
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1
        records.append(Record())
        records[-1].ParseFromString(content[place + 7 : place + 7 + length])
        place += 7 + length
    return records


def wandb_run(folder: Path) -> tuple[str, dict[str, Any], list[tuple[int, float]]]:
    """(id, configuration, [(step, loss)]) of a recorded offline run."""
    records = wandb_records(next(folder.glob("*.wandb")))
    identity = next(record.run.run_id for record in records if record.run.run_id)
    config = {
        item.key: json.loads(item.value_json) for record in records for item in record.run.config.update
    }
    history = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    return identity, config, [(int(line["_step"]), line["loss"]) for line in history if "loss" in line]


def test_wandb_continues_one_run_and_knows_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real package, offline: what it would send is in its files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    recorded: dict[Path, Any] = {}
    for name, first in (("run", 0), ("run", 2), ("other", 0)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text('[run]\nseed = 7\n[optimizer]\nlr = 0.5\nschedule = "cosine"\n')
        with MetricsLog(folder, "wandb", True, first_step=first) as log:
            log.log(first, loss=0.5 * first)
        time.sleep(1.0)  # the folder's name is the second of its start
        new = set(folder.glob("wandb/offline-run-*")) - set(recorded)
        recorded |= {found: wandb_run(found) for found in new}
    begun, continued, other = recorded.values()
    assert begun[0] == continued[0] == (tmp_path / "run" / "wandb_id").read_text().strip() != other[0]
    assert (begun[2], continued[2]) == ([(0, 0.0)], [(2, 1.0)])
    for _, config, _ in recorded.values():
        assert config["run"] == {"seed": 7}
        assert config["optimizer"] == {"lr": 0.5, "schedule": "cosine"}
