"""What the benches compare with is right, and what they measure is there."""

import functools
from collections.abc import Callable

import pytest
import torch

from megatron_npr import cli
from megatron_npr.bench.cpu import attention, layout, weight_sync
from megatron_npr.bench.timing import peak_bytes
from megatron_npr.sharding.architecture import KNOWN
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.weight_sync.plan import for_replica, plan
from megatron_npr.weight_sync.schedule import wire_bytes
from npr_ext.testing import random_layout


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_the_naive_dense_mask_is_the_layouts_visibility(gap: int) -> None:
    sample = random_layout(gap, 1024, gap=gap)
    assert torch.equal(layout.dense_mask(sample), sample.layout().visible())


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    assert layout.exponent([(n, 3e-9 * n**1.25) for n in (10, 100, 5000)]) == pytest.approx(1.25)


def allocate(megabytes: int) -> Callable[[], object]:
    return functools.partial(torch.ones, megabytes << 18)


def test_peak_memory_is_that_of_the_work_alone() -> None:
    assert peak_bytes(functools.partial(allocate, 64)) == pytest.approx(64 << 20, rel=0.1)


def test_sharing_a_prompt_saves_the_pairs_that_it_should() -> None:
    shared, unshared = attention.group_layouts()
    assert shared.num_tokens == 512 + 16 * 256
    assert unshared.num_tokens == 16 * 768
    assert unshared.visible_pairs() / shared.visible_pairs() == pytest.approx(1.76, abs=0.02)


def test_the_weight_sync_bench_counts_zero_bytes_where_layouts_agree() -> None:
    found = weight_sync.zero_copy()
    assert found["transfers"] == found["bytes_sent"] == 0
    assert found["bytes_read_in_place"] >= 4 * 2 * KNOWN["Qwen3-4B"].num_parameters


def test_in_fp8_the_weight_sync_bench_counts_half_the_bytes_of_projections_and_two_numbers_a_row() -> None:
    planned = plan(KNOWN["Qwen3-4B"], TrainerLayout(split_layers(36, pp=2), pp=2), EngineLayout())
    to_first = for_replica(planned, 0).transfers  # layers 18 to 35 and the last norm, from the other stage
    matrices = [(6144, 2560), (2560, 4096), (2 * 9728, 2560), (2560, 9728)]
    elements, rows = (18 * sum(sizes) for sizes in ([r * c for r, c in matrices], [r for r, _ in matrices]))
    norms = 18 * (2 * 2560 + 2 * 128) + 2560
    assert wire_bytes(planned, to_first, 2) == 2 * (elements + norms)
    assert wire_bytes(planned, to_first, 2, fp8=True) == elements + 8 * rows + 2 * norms


def test_an_unknown_bench_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "lay"]) == 2
    assert "invalid choice: 'lay'" in capsys.readouterr().err
