"""Rotary position embedding (Su et al. 2021): frequencies, as they are or stretched, and the table of angles.

Everything is float32 and in transformers' order of operations, so that a model gets the very angles that it
was trained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npr_engine.model.architecture import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians by which each pair of a head's dimensions turns from one position to the next, [H / 2]."""
    exponents_h = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    waves_h = config.rope_theta**exponents_h
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / waves_h
    if scaling.kind == "linear":
        return 1.0 / waves_h / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(1.0 / waves_h, scaling)
    assert scaling.kind == "yarn"
    return _yarn(waves_h, config.rope_theta, scaling)


def _llama3(plain_h: Tensor, scaling: RopeScaling) -> Tensor:
    """Blends between plain and stretched by the turns that a wave makes in the first context (Llama 3.1)."""
    turns_h = scaling.positions / (2 * math.pi / plain_h)
    share_h = (turns_h - scaling.slow) / (scaling.fast - scaling.slow)
    blended_h = (1 - share_h) * plain_h / scaling.factor + share_h * plain_h
    ended_h = torch.where(turns_h < scaling.slow, plain_h / scaling.factor, plain_h)
    return torch.where((turns_h >= scaling.slow) & (turns_h <= scaling.fast), blended_h, ended_h)


def _yarn(waves_h: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Blends by dimension, between those whose waves make `fast` and `slow` turns (Peng et al. 2023)."""
    pairs = len(waves_h)

    def dimension(turns: float) -> float:
        return 2 * pairs * math.log(scaling.positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.fast), dimension(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    places_h = torch.arange(pairs, dtype=torch.float32, device=waves_h.device)
    kept_h = 1 - ((places_h - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * waves_h) * (1 - kept_h) + 1.0 / waves_h * kept_h


class Rotary:
    """Cosines and sines by position, [P, H / 2], times the attention factor. Angles are float32 whatever the
    model's type, as in training (transformers and Megatron), so that both sides rotate alike."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies_h = frequencies(config, device)
        self._factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
        self._dtype = dtype
        self.tables = self._make(1)

    def need(self, num_positions: int) -> None:
        """Makes (cos, sin) long enough; a no-op where they are."""
        if num_positions > len(self.tables[0]):
            self.tables = self._make(num_positions)

    def _make(self, num_positions: int) -> tuple[Tensor, Tensor]:
        positions_P = torch.arange(num_positions, dtype=torch.float32, device=self._frequencies_h.device)
        angles_Ph = torch.outer(positions_P, self._frequencies_h)
        cos_Ph, sin_Ph = angles_Ph.cos() * self._factor, angles_Ph.sin() * self._factor
        return cos_Ph.to(self._dtype), sin_Ph.to(self._dtype)
