"""Weights of a folder as people have it: the right files are read, and what is wrong is one line that names the tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_npr.cli import main
from megatron_npr.demo.base import FOLDER
from megatron_npr.hf.convert import convert_folder
from megatron_npr.hf.huggingface import HuggingFaceWeights, read_engine_weights, read_model_config
from megatron_npr.hf.model_folder import write_tensors
from megatron_npr.hf.tensor_files import INDEX, WHOLE
from npr_ext.errors import UserError
from tests.support.families import save_family
from tests.support.places import CONFIGS

NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied and an untied model, each in one file."""
    place = tmp_path_factory.mktemp("models")
    return {kind: save_family(f"qwen3 {kind}", place / kind) for kind in ("tied", "untied")}


@pytest.fixture
def tied(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["tied"], tmp_path / "tied"))


@pytest.fixture
def untied(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["untied"], tmp_path / "untied"))


def in_shards(folder: Path) -> dict[str, Tensor]:
    """Write a folder's model anew in several files with an index; gives its tensors."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    write_tensors(folder, {name: t.nbytes for name, t in tensors.items()}, tensors.__getitem__, limit=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor, as each loader reads it."""
    with HuggingFaceWeights(folder, read_model_config(folder)) as weights:
        return {name: weights.read(name) for name in weights.names}


def change(folder: Path, how: Change) -> None:
    """Replace tensors of a model in one file."""
    tensors = load_file(folder / WHOLE)
    how(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WHOLE)


@pytest.mark.parametrize("stray", [WHOLE, "adapter_model.safetensors", "consolidated.safetensors"])
def test_files_that_the_index_does_not_name_are_never_read(
    stray: str, untied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = in_shards(untied)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, untied / stray)
    found = read(untied)
    assert set(found) == set(tensors) and all(torch.equal(found[n], t) for n, t in tensors.items())
    said = capsys.readouterr().err
    assert (f"{WHOLE} is not read: {INDEX} does not name it" in said) == (stray == WHOLE)
    assert said.count("\n") == (stray == WHOLE)


def test_without_an_index_one_file_counts_and_no_other(untied: Path) -> None:
    tensors = load_file(untied / WHOLE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, untied / "a.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, untied / "z.safetensors")
    assert all(torch.equal(found, tensors[name]) for name, found in read(untied).items())


SHARD_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        lambda f: (f / "model-00002-of-00011.safetensors").unlink(),
        r"lacks model-00002-of-00011\.safetensors, which model\.safetensors\.index\.json names for \S+\.weight",
    ),
    "many shards are missing": (
        lambda f: [path.unlink() for path in f.glob("model-*")],
        r"lacks model-00001\S+, model-00002\S+, model-00003\S+ and \d more",
    ),
    "a shard is another's": (
        lambda f: shutil.copy(f / "model-00001-of-00011.safetensors", f / "model-00002-of-00011.safetensors"),
        r"lacks model\..*: model-00002-of-00011\.safetensors is not the file that",
    ),
    "the index is missing": (
        lambda f: (f / INDEX).unlink(),
        "neither model.safetensors nor .*copy the index too",
    ),
    "the index is cut off": (
        lambda f: (f / INDEX).write_text('{"weight_map": {'),
        r"index\.json:1: not valid JSON",
    ),
    "the index is a list": (lambda f: (f / INDEX).write_text("[]"), "holds a list, expected a JSON object"),
    "the index is empty": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "the index is a pointer": (
        lambda f: (f / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        r"index\.json is a git-lfs pointer, not the file: run `git lfs pull`",
    ),
    "the index leads elsewhere": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}})),
        r"names \.\./other\.safetensors: files have to lie beside it",
    ),
    "the index forgets tensors": (
        lambda f: (f / INDEX).write_text(
            json.dumps({"weight_map": {EMBEDDING: "model-00001-of-00011.safetensors"}})
        ),
        r"lacks model\.layers\.0\S+, .* and \d+ more: files are missing",
    ),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_shards_that_are_not_all_there_are_refused_by_name(fault: str, untied: Path, tmp_path: Path) -> None:
    damage, message = SHARD_FAULTS[fault]
    in_shards(untied)
    assert (untied / "model-00002-of-00011.safetensors").exists()
    damage(untied)
    with pytest.raises(UserError, match=message):
        read(untied)
    with pytest.raises(UserError, match=message):
        convert_folder(untied, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (
        lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:-100]),
        r"is damaged .*: copy it again",
    ),
    "cut off in its header": (
        lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:40]),
        r"is damaged .*: copy it again",
    ),
    "empty": (lambda f: (f / WHOLE).write_bytes(b""), r"is damaged .*: copy it again"),
    "a web page": (lambda f: (f / WHOLE).write_text("<html>404</html>" * 9), r"is damaged .*: copy it again"),
    "a folder": (lambda f: ((f / WHOLE).unlink(), (f / WHOLE).mkdir()), r"cannot be read \(Is a directory\)"),
    "a pointer": (
        lambda f: (f / WHOLE).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
        ),
        "is a git-lfs pointer, not the file",
    ),
    "pickled": (
        lambda f: (f / WHOLE).rename(f / "pytorch_model.bin"),
        r"has pytorch_model\.bin and pickled weights, which are never read: save the model as safetensors",
    ),
    "GGUF": (
        lambda f: (f / WHOLE).rename(f / "model-Q4.gguf"),
        r"has model-Q4\.gguf .*npr convert --from-gguf",
    ),
    "gone": (lambda f: (f / WHOLE).unlink(), r"has no \*\.safetensors"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_file_that_is_no_weights_is_one_line(fault: str, tied: Path, tmp_path: Path) -> None:
    damage, message = FILE_FAULTS[fault]
    damage(tied)
    with pytest.raises(UserError, match=message) as caught:
        convert_folder(tied, tmp_path / "converted")
    assert "\n" not in str(caught.value) and not (tmp_path / "converted").exists()


TENSOR_FAULTS: dict[str, tuple[str, Change, str]] = {
    "untied without its output": (
        "untied",
        lambda t: t.pop("lm_head.weight"),
        r"lacks lm_head\.weight: copy the file that has it, or set tie_word_embeddings to true",
    ),
    "a tensor is missing": ("tied", lambda t: t.pop(NORM), rf"lacks {NORM}: files are missing"),
    "a layer is missing": (
        "tied",
        lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name],
        r"lacks model\.layers\.3\.\S+, \S+, \S+ and 8 more",
    ),
    "a layer too many": (
        "tied",
        lambda t: t.update({NORM.replace(".1.", ".4."): t[NORM]}),
        r"holds model\.layers\.4\.input_layernorm\.weight, which config\.json's model has no place for",
    ),
    "biases": (
        "tied",
        lambda t: t.update({QUERY.replace("weight", "bias"): torch.ones(64)}),
        "q_proj.bias, which",
    ),
    "quantised": (
        "tied",
        lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}),
        "q_proj.weight is stored as I8",
    ),
    "in FP8": ("tied", lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
    "transposed": (
        "tied",
        lambda t: t.update({EMBEDDING: t[EMBEDDING].t()}),
        r"shape \(64, 97\), .* asks for \(97, 64\)",
    ),
    "of equal size": (
        "tied",
        lambda t: t.update({QUERY: t[QUERY].reshape(32, 128)}),
        r"q_proj\.weight has shape \(32, 128\), config\.json asks for \(64, 64\)",
    ),
    "fewer rows than the vocabulary": (
        "untied",
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:90]}),
        r"lm_head\.weight has shape \(90, 64\), config\.json asks for \(97, 64\)",
    ),
    "tied with another output": (
        "tied",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}),
        r"tie_word_embeddings is true in config\.json, but lm_head\.weight is not model\.embed_tokens\.weight: set it",
    ),
    "tied with an output of another shape": (
        "tied",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING][:90]}),
        r"lm_head\.weight has shape \(90, 64\)",
    ),
    "NaN": (
        "tied",
        lambda t: t[NORM].__setitem__(3, torch.nan),
        rf"{NORM} holds NaN: the weights are damaged",
    ),
    "infinite": (
        "tied",
        lambda t: t[QUERY][5].__setitem__(1, torch.inf),
        "q_proj.weight holds infinite values",
    ),
    "minus infinite": (
        "untied",
        lambda t: t["lm_head.weight"][96].__setitem__(63, -torch.inf),
        "lm_head.weight holds infinite values",
    ),
    "NaN and infinite": (
        "tied",
        lambda t: t[QUERY][5, :2].copy_(torch.tensor([torch.inf, torch.nan])),
        "holds NaN",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    fault: str, models: dict[str, Path], tmp_path: Path
) -> None:
    kind, damage, message = TENSOR_FAULTS[fault]
    folder = Path(shutil.copytree(models[kind], tmp_path / "model"))
    change(folder, damage)
    config = read_model_config(folder)
    with pytest.raises(UserError, match=message):
        read_engine_weights(folder, config, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        convert_folder(folder, tmp_path / "converted", force=True)
    assert not (tmp_path / "converted").exists()


def test_a_tied_output_that_is_the_embedding_and_old_tables_of_angles_count_for_nothing(tied: Path) -> None:
    before = load_file(tied / WHOLE)
    change(
        tied,
        lambda t: t.update(
            {"lm_head.weight": t[EMBEDDING], "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    found = read(tied)
    assert set(found) == set(before) and all(torch.equal(found[name], t) for name, t in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_no_number_is_found_in_every_format(
    value: float, dtype: torch.dtype, tied: Path
) -> None:
    change(tied, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert all(tensor.dtype is dtype for tensor in read(tied).values())
    change(tied, lambda t: t[EMBEDDING][-1].__setitem__(-1, value))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight holds"):
        read(tied)


def test_values_that_a_narrower_type_cannot_hold_are_named_and_nothing_is_written(
    tied: Path, tmp_path: Path
) -> None:
    change(tied, lambda t: t[QUERY][0].__setitem__(0, 70_000.0))
    convert_folder(tied, tmp_path / "wide", dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"q_proj\.weight in float16 holds infinite values: nothing was written"
    ):
        convert_folder(tied, tmp_path / "narrow", dtype=torch.float16)
    assert not (tmp_path / "narrow").exists()


@pytest.mark.parametrize(
    "command",
    [
        "convert --from MODEL --to OUT",
        "plan MODEL --nodes 1",
        "serve MODEL --port 0",
        "eval eval.toml --model.path MODEL --run.dir OUT",
        "sample sample.toml --model.path MODEL --run.dir OUT",
        "stage1 stage1.toml --model.path MODEL --run.dir OUT",
        "stage3 stage3.toml --model.path MODEL --run.dir OUT",
    ],
)
def test_every_command_that_reads_a_model_refuses_one_with_a_layer_missing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    change(model, lambda t: [t.pop(name) for name in list(t) if ".layers.7." in name])
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    words = [
        str(CONFIGS / "demo" / word) if word.endswith(".toml") else places.get(word, word)
        for word in command.split()
    ]
    assert main(words) == 2
    assert "lacks model.layers.7." in capsys.readouterr().err
