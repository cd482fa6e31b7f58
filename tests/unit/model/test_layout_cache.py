"""What attention derives from a row's layout is derived once for all its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_npr.model import layers
from megatron_npr.model.layers import LayoutCache, RowLayout
from megatron_npr.runtime.process_world import World
from tests.support.families import save_family
from tests.support.training import branching_samples, new_trainer, step


def test_layers_and_their_recompute_share_what_is_derived_from_a_row(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived: list[RowLayout] = []
    original = layers._row_layout

    def counted(layout_5T: Tensor, cp_group: None) -> RowLayout:
        derived.append(original(layout_5T, cp_group))
        return derived[-1]

    monkeypatch.setattr(layers, "_row_layout", counted)
    trainer = new_trainer(world, save_family("qwen3 tied", tmp_path), recompute="full")
    rows = trainer.pack(branching_samples(), branching=True).rows
    step(trainer)
    assert trainer.policy.config.num_layers > 1
    assert len(derived) == len(rows) > 1


def plain_layout(length: int) -> Tensor:
    """int32 [5, T] of one plain sequence."""
    return torch.arange(length, dtype=torch.int32).repeat(5, 1)


def test_the_cache_holds_the_last_few() -> None:
    cache = LayoutCache(capacity=2)
    tensors = [plain_layout(length) for length in (3, 4, 5)]
    first, second, third = (cache.get(each, None) for each in tensors)
    assert cache.get(tensors[1], None) is second and cache.get(tensors[2], None) is third
    assert cache.get(tensors[0], None) is not first
