"""A model folder is there whole or not at all; its shards hold every tensor once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_npr.hf.huggingface import HuggingFaceWeights, read_model_config
from megatron_npr.hf.model_folder import plan_shards, whole_folder, write_tensors
from megatron_npr.sharding.catalog import catalog
from npr_ext.errors import UserError
from tests.support.families import save_family


@given(sizes=st.lists(st.integers(0, 50)), limit=st.integers(1, 60))
def test_shards_hold_every_tensor_once_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{index}": size for index, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    assert all(len(shard) == 1 or sum(named[name] for name in shard) <= limit for shard in shards)
    assert all(sum(named[name] for name in one) + named[other[0]] > limit for one, other in pairwise(shards))


def test_a_model_in_several_files_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_family("llama", tmp_path / "one"))
    state = model.state_dict()
    many = tmp_path / "many"
    with whole_folder(many, replace=False) as folder:
        (folder / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
        write_tensors(folder, {name: t.nbytes for name, t in state.items()}, state.__getitem__, limit=60_000)
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 3
    for name, weight in AutoModelForCausalLM.from_pretrained(many).state_dict().items():
        assert torch.equal(weight, state[name])
    config = read_model_config(many)
    with HuggingFaceWeights(tmp_path / "one", config) as one, HuggingFaceWeights(many, config) as other:
        for name in catalog(config):
            assert torch.equal(one.full(name), other.full(name))


def test_an_error_while_writing_leaves_the_old_model_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target, replace=False) as folder:
        (folder / "config.json").write_text("old")

    def fail(error: BaseException) -> None:
        with whole_folder(target, replace=True) as folder:
            (folder / "config.json").write_text("new")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        fail(OSError(28, "No space left on device"))
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "v1", replace=False) as folder:
        (folder / "config.json").write_text("old")
    (tmp_path / "latest").symlink_to("v1")
    with whole_folder(tmp_path / "latest", replace=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1" / "config.json").read_text() == "new"
