"""Weights that Transformer Engine holds in FP8 (`fp8.parameters`): read and filled like any others.

    filled: the optimizer's fp32 weights begin with the unrounded values
    read: what the policy computes with, the FP8 numbers times their scales, in the model's number format

Where Transformer Engine is not installed no weight is of this kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def plain_or_fp8(weight: torch.nn.Parameter) -> Tensor:
    """A parameter to read and fill: its plain tensor, or itself where it is held in FP8."""
    return weight if is_float8tensor(weight) else weight.data


def fill(weight: Tensor, value: Tensor) -> None:
    """Overwrite a weight of either kind."""
    if is_float8tensor(weight):
        _begin_with(weight, value)
    weight.copy_(value)


def _begin_with(weight: Any, value: Tensor) -> None:
    """For the optimizer. And by delayed scaling, what the weight was made with is no part of the history of largest values."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    quantizer = weight._get_quantizer()
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.zero_()
    weight.get_high_precision_init_val().copy_(value)


def in_fp8(weights: Mapping[str, Tensor]) -> bool:
    """Whether any of them is held in FP8."""
    return any(map(is_float8tensor, weights.values()))


class PlainWeights(Mapping[str, Tensor]):
    """Weights by name as plain tensors; what is held in FP8 is multiplied out when it is read, and the latest one kept until
    `forget`: call it when the weights have changed."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._latest: tuple[str, Tensor] | None = None

    def forget(self) -> None:
        """Read anew what is read next."""
        self._latest = None

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if not is_float8tensor(weight):
            return weight
        if self._latest is None or self._latest[0] != name:
            self._latest = name, dequantize_fp8_tensor(weight)
        return self._latest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
