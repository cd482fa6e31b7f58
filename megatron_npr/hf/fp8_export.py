"""FP8 of a model folder for serving: e4m3 weights with a scale a 128 x 128 block, activations quantized as they come.

weight [R, C] ──► nvidia-modelopt ──► e4m3 [R, C] and `weight_scale_inv` [R / 128, C / 128] float32

The layout is that of DeepSeek-V3 and of Qwen's own FP8 releases (quant_method "fp8"), which transformers, vLLM and SGLang
load; without a GPU transformers multiplies the scales back in. modelopt's per-tensor format (quant_method "modelopt") needs
calibration data and is none of transformers'.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from megatron_npr.hf.tensor_names import huggingface_names
from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.catalog import catalog
from npr_engine.model.architecture import is_projection
from npr_ext.errors import UserError
from npr_ext.ops.fp8 import E4M3, scale_of

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def quantized_names(architecture: Architecture) -> set[str]:
    """The tensors of a model folder that become FP8: the parts of Megatron's projections."""
    return {part for name in catalog(architecture) if is_projection(name) for part in huggingface_names(name)}


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a weight's rows and columns; UserError for a part of a block, which readers take for something else."""
    rows, columns = shape
    if rows % BLOCK or columns % BLOCK:
        raise UserError(
            f"{name} is {rows} x {columns}, FP8 is stored in blocks of {BLOCK} x {BLOCK}: this model cannot be written so"
        )
    return rows // BLOCK, columns // BLOCK


def quantize_blocks(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as e4m3 [R, C] and its scales (float32, one a block), by nvidia-modelopt.

    weight = e4m3 * scale, the scale that training and engine take, too. UserError where modelopt is not installed.
    """
    tensors, utils = _modelopt()
    blocks = {-1: BLOCK, -2: BLOCK}
    wide = weight_RC.float()
    scales = scale_of(utils.reduce_block_amax(wide, blocks), E4M3)
    packed, scales = tensors.FP8QTensor.quantize(wide, scales=scales, block_sizes=blocks)
    return packed._quantized_data.contiguous(), scales.contiguous()


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """The entry of config.json for a model of these tensors, in which linear layers that stay as they are are named."""
    kept = {
        name.removesuffix(".weight") for name in names if name.endswith((".gate.weight", "lm_head.weight"))
    }
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(kept | {"lm_head"}),
    }


def require_modelopt() -> None:
    """UserError where FP8 cannot be written here."""
    _modelopt()


def _modelopt() -> tuple[Any, Any]:
    try:
        # It greets with warnings about every optional package that it does not find.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return (
                importlib.import_module("modelopt.torch.quantization.qtensor"),
                importlib.import_module("modelopt.torch.quantization.utils"),
            )
    except ImportError as error:
        raise UserError(
            f"--fp8 needs nvidia-modelopt ({error}): pip install --no-deps the packages of the extra modelopt in pyproject.toml"
        ) from None
