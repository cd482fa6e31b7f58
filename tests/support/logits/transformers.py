"""Logits of transformers over one sequence: in float32, and all of them in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.support.errors import allowed_error


class InFloat64(TorchFunctionMode):
    """What names float32 gets float64: transformers computes RoPE, norms, softmax and routers in float32 in any model."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def transformers_logits(folder: Path, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' logits of a model in this type, [T, V]; but for products, much of a float64 one is computed in float32."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits


def exact_logits(folder: Path, token_ids: Tensor) -> Tensor:
    """float64 throughout, [T, V]."""
    with InFloat64():
        return transformers_logits(folder, token_ids, torch.float64)


def log_prob_noise(folder: Path, token_ids: Tensor) -> float:
    """How far two float32 computations of this model's log-probs may be apart: each is within twice what the logits may err."""
    return 4 * allowed_error(transformers_logits(folder, token_ids), exact_logits(folder, token_ids))
