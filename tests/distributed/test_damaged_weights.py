"""Ranks read their own weights: what one of them cannot use ends the run on all, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.families import save_family
from tests.support.launch import run_worker


def test_a_nan_that_the_last_stage_alone_reads_is_told_by_every_rank(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    said = json.loads(run_worker("damaged", [folder], 2))
    remedy = said[0].rpartition(": ")[2]
    assert said == [f"{folder}: model.layers.3.mlp.down_proj.weight holds NaN: {remedy}"] * 2
