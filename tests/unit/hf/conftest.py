"""A tiny Llama as a GGUF file (random weights, bytes and a few merges as tokens)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npr_engine.language.vocabulary import _byte_level_table

HEADS, KV_HEADS, HIDDEN, FFN, LAYERS = 4, 2, 64, 96, 2
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<spare_{n}>" for n in range(10))]
MERGES = ["Ġ t", "h e", "Ġt he", "< s", "e p", "Ġ Ġ", "Ċ Ċ", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|><spare_1>{% endfor %}"


def tiny_metadata() -> dict[str, Any]:
    tokens = [*CONTROLS, *sorted(_byte_level_table()), *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(tokens) - len(CONTROLS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def tiny_tensors(vocabulary: int, *, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FFN),
        }
    if not tied:
        shapes["output.weight"] = (vocabulary, HIDDEN)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    quantised: str = "F32",
) -> Path:
    """The file, matrices stored in the named type."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra smollm2)")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_array(key, value)
    kind = gguf.GGMLQuantizationType[quantised]
    for name, values in tensors.items():
        if values.ndim == 1 or quantised == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def new_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Makes tiny files; keyword arguments replace metadata (None removes), `tensors` replaces tensors likewise."""

    def make(
        changed: dict[str, Any] | None = None,
        *,
        tensors: dict[str, np.ndarray | None] | None = None,
        tied: bool = True,
        **options: str,
    ) -> Path:
        metadata = {k: v for k, v in (tiny_metadata() | (changed or {})).items() if v is not None}
        weights: dict[str, Any] = {
            **tiny_tensors(len(tiny_metadata()["tokenizer.ggml.tokens"]), tied=tied),
            **(tensors or {}),
        }
        kept = {name: values for name, values in weights.items() if values is not None}
        return write_gguf(tmp_path / "tiny.gguf", metadata, kept, **options)

    return make
