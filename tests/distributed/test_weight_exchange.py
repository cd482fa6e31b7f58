"""Four gloo processes reshard small numbered models; what a rank of the engine holds afterwards is known exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_npr.weight_sync.exchange import checksum
from megatron_npr.weight_sync.plan import for_replica, plan
from megatron_npr.weight_sync.schedule import wire_bytes
from tests.distributed.workers.exchange import CASES, WORLDS
from tests.support.launch import worker_environment, worker_module
from tests.support.patience import SECONDS

WORLD = 4


@dataclass(frozen=True)
class Outcome:
    """What the processes did: exit codes, figures of the walk through the cases, of the same for an engine in FP8, of updates
    with a damaged bit each, and figures after rank 1 was lost."""

    codes: list[int]
    walked: dict[int, Any]
    in_fp8: dict[int, Any]
    damaged: dict[int, Any]
    lost: dict[int, Any]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_world(WORLD, tmp_path_factory.mktemp("outcome"))


def run_world(size: int, folder: Path) -> Outcome:
    # Not torchrun, which ends the others when one of them dies.
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", worker_module("exchange"), str(rank), str(size), str(folder)],
            env=worker_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    messages = [process.communicate(timeout=SECONDS)[1] for process in processes]

    def read(name: str) -> dict[int, Any]:
        paths = {rank: folder / f"{name}{rank}.json" for rank in range(size)}
        return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}

    walked = read("walk")
    assert len(walked) == size, messages[0][-3000:]
    codes = [process.returncode for process in processes]
    return Outcome(codes, walked, read("fp8_"), read("damaged"), read("lost"))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_the_engine_holds_the_trainers_numbers_after_each_update(
    case: str, outcome: Outcome
) -> None:
    for rank in range(WORLD):
        assert outcome.walked[rank][case]["errors"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_moved_are_those_of_the_plan(case: str, outcome: Outcome) -> None:
    planned = plan(*CASES[case])
    replicas = [for_replica(planned, replica) for replica in range(planned.num_replicas)]
    sent, received, copied, in_place = (
        sum(column)
        for column in zip(*(outcome.walked[rank][case]["moved"] for rank in range(WORLD)), strict=True)
    )
    assert sent == received == 4 * sum(each.elements_sent for each in replicas)
    everything = 4 * sum(each.elements_copied + each.elements_aliased for each in replicas)
    assert copied + in_place == everything
    assert (sent + copied == 0) == (in_place > 0) == (case == "zero copy")


@pytest.mark.parametrize("case", CASES)
def test_an_engine_in_fp8_gets_bit_for_bit_what_it_makes_of_its_whole_shard(
    case: str, outcome: Outcome
) -> None:
    for rank in range(WORLD):
        found = outcome.in_fp8[rank][case]
        assert found["wrong"] == 0
        assert bool(found["projections"]) == (case != "zero copy")
        assert all(name.endswith((".weight",)) and ".linear_" in name for name in found["projections"])


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_moved_in_fp8_are_a_quarter_and_the_scales(case: str, outcome: Outcome) -> None:
    planned = plan(*CASES[case])
    transfers = [for_replica(planned, replica).transfers for replica in range(planned.num_replicas)]
    sent, received, copied, in_place = (
        sum(column)
        for column in zip(*(outcome.in_fp8[rank][case]["moved"] for rank in range(WORLD)), strict=True)
    )
    assert sent == received == sum(wire_bytes(planned, each, 4, fp8=True) for each in transfers)
    wide = sum(wire_bytes(planned, each, 4) for each in transfers)
    assert (sent + copied == 0) == (in_place > 0) == (case == "zero copy")
    assert sent < wide or sent == 0


@pytest.mark.parametrize("case", CASES)
def test_stale_and_torn_versions_are_refused(case: str, outcome: Outcome) -> None:
    for rank in range(WORLD):
        stale, torn = outcome.walked[rank][case]["refused"]
        assert stale == "weights of version 5 are stale: the engine has version 5"
        assert torn == "torn update: ranks bring versions 6 to 9 to engines at 5 to 5"
        assert outcome.walked[rank][case]["version"] == 5


def test_one_damaged_bit_at_one_rank_is_refused_by_all(outcome: Outcome) -> None:
    for rank in range(WORLD):
        found = outcome.damaged[rank]
        assert found["refused"] == found["faults"] > 5 and found["changed"] == 0


def test_a_sender_that_dies_in_an_update_leaves_the_engine_on_the_old_version(outcome: Outcome) -> None:
    assert outcome.codes == [0, 17, 0, 0] and set(outcome.lost) == {0, 2, 3}
    for found in outcome.lost.values():
        assert found["version"] == 1 and found["difference"] == 0.0
        assert "update 2 broke off, version 1 stays" in found["error"]


@pytest.mark.slow
def test_eight_processes_walk_through_every_combination_of_layouts(tmp_path: Path) -> None:
    outcome = run_world(8, tmp_path)
    assert outcome.codes == [0] * 8 and len(WORLDS[8]) == 81
    for rank in range(8):
        assert {case: found["errors"] for case, found in outcome.walked[rank].items()} == {
            case: [0.0, 0.0, 0.0] for case in WORLDS[8]
        }
        assert {case for case, found in outcome.in_fp8[rank].items() if found["wrong"]} == set()


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_checksum_sees_every_flipped_bit_and_every_swap(data: bytes, draw: st.DataObject) -> None:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = flat.clone()
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert checksum(flipped) != checksum(flat)
    words = torch.tensor([5, -7, 0], dtype=torch.int32)
    assert checksum(words) != checksum(words.flip(0))
