"""What a GPU is fed, as far as a CPU can tell: the table on the device, runs of chunks, padded decode steps, FP8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npr_engine.engine import Engine, EngineConfig
from npr_engine.executor.device_forward import (
    DECODE_BUCKETS,
    MIXED_BUCKETS,
    NO_SLOT,
    Bucket,
    bucket_of,
    decodes_only,
    padded_arrays,
    padded_step,
    runs_of,
)
from npr_engine.executor.device_table import DeviceTable
from npr_engine.executor.runner import Runner
from npr_engine.language.constraint import Constraint
from npr_engine.model.architecture import is_projection
from npr_engine.model.fp8 import FP8, Fp8Weight, fp8_linear
from npr_engine.model.linear import Weight
from npr_engine.model.transformer import InferenceModel
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.batch import Batch, Sampled, SampleInputs
from npr_ext.errors import UserError
from npr_ext.ops.fp8 import quantize_rows
from npr_ext.sizes import RUN_TOKENS
from tests.support.errors import product_bound
from tests.support.random_model import CONFIG, GRAMMAR, random_weights


class TableReader(Runner):
    """Keeps a device table beside the run and holds it against the host's before every step."""

    def __init__(self, model: InferenceModel, num_slots: int, constraint: Constraint) -> None:
        super().__init__(model, num_slots, constraint)
        self.table = DeviceTable(torch.device("cpu"))
        self.batches: list[Batch] = []

    def run(self, batch: Batch, inputs: SampleInputs) -> Sampled:
        on_device = self.table.update(batch).numpy()
        for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
            assert np.array_equal(on_device[row, :length], batch.block_tables[row, :length]), (row, length)
        self.batches.append(batch)
        return super().run(batch, inputs)


def test_the_table_on_the_device_follows_forks_joins_preemption_and_new_weights() -> None:
    model = InferenceModel(CONFIG, random_weights(3))
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=420, block_size=4, max_batch_tokens=64))
    reader = TableReader(model, 420, engine._scheduler.constraint)
    engine._runner = reader
    sampling = SamplingParams(max_tokens=90, seed=1, constrain=True)
    for version in range(2):
        engine.generate(
            [[3, 4, 5 + i % 3] for i in range(24)], sampling, [f"{version}-{i}" for i in range(24)]
        )
        engine.weights_updated(version + 1)
    stats = engine.stats()
    assert stats.forks > 5 and stats.joins > 0 and stats.preemptions > 0, stats
    assert any(decodes_only(batch) for batch in reader.batches)
    assert not all(decodes_only(batch) for batch in reader.batches)
    moved = sum(len(batch.rows) for batch in reader.batches)
    assert moved > 1000


def test_a_decode_step_moves_one_number_a_row() -> None:
    tables = np.arange(80, dtype=np.int32).reshape(4, 20)
    generations = np.array([1, 2, 3, 4])
    table = DeviceTable(torch.device("cpu"))
    table.update(batch_of(tables, generations, rows=[0, 2], lengths=[7, 12]))
    tables[0, 7], tables[2, 12] = 500, 501
    new = batch_of(tables, generations, rows=[0, 2], lengths=[8, 13])
    assert table._new_entries(new).tolist() == [7, 2 * 20 + 12]
    generations[2] = 9
    again = batch_of(tables, generations, rows=[2], lengths=[3])
    assert table._new_entries(again).tolist() == [40, 41, 42]


def batch_of(tables: np.ndarray, generations: np.ndarray, rows: list[int], lengths: list[int]) -> Batch:
    count = len(rows)
    zeros = np.zeros(count, np.int32)
    return Batch(
        token_ids=zeros + 5,
        positions=np.array(lengths, np.int32) - 1,
        slots=tables[rows, np.array(lengths) - 1],
        rows=np.array(rows, np.int32),
        lengths=np.array(lengths, np.int32),
        block_tables=tables,
        generations=generations,
        sample_index=np.arange(count),
        sample_rows=np.array(rows, np.int32),
        num_decode=count,
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_runs_cover_every_token_once_and_stay_in_their_row(lengths: list[int]) -> None:
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    covered = []
    for first, count in runs_of(rows).tolist():
        assert 1 <= count <= RUN_TOKENS
        assert len(set(rows[first : first + count].tolist())) == 1
        covered += range(first, first + count)
    assert covered == list(range(len(rows)))
    assert len(runs_of(rows)) == sum(-(-length // RUN_TOKENS) for length in lengths)


@given(st.integers(1, 600), st.booleans())
def test_a_bucket_is_the_least_that_holds_the_tokens(count: int, mixed: bool) -> None:
    tables = np.arange(1200, dtype=np.int32).reshape(600, 2)
    batch = batch_of(tables, np.ones(600, np.int64), rows=list(range(count)), lengths=[1] * count)
    if mixed:
        batch = replace(batch, num_decode=count - 1)
    holding = [size for size in (MIXED_BUCKETS if mixed else DECODE_BUCKETS) if size >= count]
    assert bucket_of(batch) == (Bucket(min(holding), mixed) if holding else None)


def test_padding_rows_see_no_key_and_leave_none() -> None:
    tables = np.arange(80, dtype=np.int32).reshape(4, 20)
    batch = batch_of(tables, np.ones(4, np.int64), rows=[0, 2, 3], lengths=[7, 12, 1])
    arrays = padded_arrays(batch, Bucket(4, mixed=False))
    assert arrays[:, :3].tolist() == [
        batch.token_ids.tolist(),
        batch.positions.tolist(),
        batch.slots.tolist(),
        batch.rows.tolist(),
        batch.lengths.tolist(),
    ]
    assert arrays[:, 3].tolist() == [0, 0, NO_SLOT, 0, 0]


def test_a_mixed_bucket_computes_the_tokens_of_a_row_together_and_padding_alone() -> None:
    tables = np.arange(120, dtype=np.int32).reshape(4, 30)
    rows, lengths = [1] + [2] * 20 + [0], [5, *range(3, 23), 9]
    batch = replace(batch_of(tables, np.ones(4, np.int64), rows, lengths), num_decode=1)
    bucket = bucket_of(batch)
    assert bucket == Bucket(32, mixed=True)
    step = padded_step(torch.from_numpy(padded_arrays(batch, bucket)), torch.from_numpy(tables))
    assert step.runs is not None
    runs = [tuple(run) for run in step.runs.tolist() if run[1]]
    assert runs == [(0, 1), (1, 16), (17, 4), (21, 1), (22, 10)]
    assert step.lengths.tolist() == lengths + [0] * 10 and set(step.slots[22:].tolist()) == {NO_SLOT}
    assert step.rows.tolist() == rows + [0] * 10


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_fp8_keeps_three_bits_of_every_number(seed: int, size: float) -> None:
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * size
    rows[2] = 0.0
    values, scales = quantize_rows(rows, FP8)
    back = values.float() * scales[:, None]
    smallest_normal = 2.0**-6
    error = (back - rows).abs()
    assert (error <= torch.maximum(rows.abs() / 16, scales[:, None] * smallest_normal / 16) * 1.0001).all()
    assert torch.equal(back[2], rows[2])


def test_an_fp8_product_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 48), (32, 48), (32,)))
    (x_values, x_scales), fp8 = quantize_rows(x, FP8), Fp8Weight.of(weight)
    rounded, weights = x_values.double() * x_scales[:, None], fp8.values_DC.double() * fp8.scales_D[:, None]
    bound = product_bound(rounded, weights)
    assert ((fp8_linear(x, fp8, bias).double() - (rounded @ weights.T + bias)).abs() <= bound).all()


def test_an_engine_in_fp8_decodes_and_follows_new_weights() -> None:
    weights = random_weights(0, torch.float32)
    plain, fp8 = InferenceModel(CONFIG, weights), InferenceModel(CONFIG, weights, fp8=True)
    logits = [first_logits(model) for model in (plain, fp8)]
    assert 0 < (logits[0] - logits[1]).norm() < 0.1 * logits[0].norm()
    engine = Engine(fp8, GRAMMAR, EngineConfig(num_kv_slots=1024))
    engine.update_weights(random_weights(5, torch.float32), 1)
    new = InferenceModel(CONFIG, random_weights(5, torch.float32), fp8=True)
    assert torch.equal(first_logits(fp8), first_logits(new))


def in_fp8(seed: int) -> dict[str, Weight]:
    """Random weights whose projections are given in FP8."""
    weights = random_weights(seed, torch.float32)
    return {name: Fp8Weight.of(w) if is_projection(name) else w for name, w in weights.items()}


def test_weights_given_in_fp8_are_those_that_the_engine_makes_and_are_kept_where_they_lie() -> None:
    given, made = in_fp8(0), InferenceModel(CONFIG, random_weights(0, torch.float32), fp8=True)
    model = InferenceModel(CONFIG, given, fp8=True)
    assert torch.equal(first_logits(model), first_logits(made))
    assert not model._quantized and len(made._quantized) == len(
        [w for w in given.values() if isinstance(w, Fp8Weight)]
    )
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=1024))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    place = given[name].values_DC.data_ptr()
    engine.update_weights(in_fp8(5), 1)
    assert given[name].values_DC.data_ptr() == place
    new = InferenceModel(CONFIG, random_weights(5, torch.float32), fp8=True)
    assert torch.equal(first_logits(model), first_logits(new))
    for wrong in (random_weights(5, torch.float32)[name], in_fp8(5)[name].values_DC):
        with pytest.raises(UserError, match=r"linear_fc1\.weight is"):
            engine.update_weights({name: wrong}, 2)


def first_logits(model: InferenceModel) -> torch.Tensor:
    """float32 [V] after three tokens."""
    runner = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=64))._runner
    batch = batch_of(
        np.arange(64, dtype=np.int32)[None], np.ones(1, np.int64), rows=[0] * 3, lengths=[1, 2, 3]
    )
    assert runner._cache is not None
    with torch.inference_mode():
        return model.forward(runner._step(batch), runner._cache)[-1]


def test_fp8_refuses_shapes_that_the_product_cannot_take() -> None:
    weights = random_weights(0, torch.float32)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    weights[name] = weights[name][:, :8]
    weights["decoder.layers.0.mlp.linear_fc1.weight"] = weights["decoder.layers.0.mlp.linear_fc1.weight"][:16]
    with pytest.raises(UserError, match=r"fc2\.weight is 16 x 8 .* multiples of 16"):
        InferenceModel(CONFIG, weights, fp8=True)
