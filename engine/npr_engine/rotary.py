"""Rotary position embedding (Su et al. 2021): the table of angles."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines by position, [P, H / 2]. Angles are float32 whatever the model's type, as in training
    (transformers and Megatron), so that both sides rotate alike. The table grows on demand."""

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> None:
        exponents_h = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies_h = 1.0 / theta**exponents_h
        self._dtype = dtype
        self._tables = self._make(256)

    def tables(self, highest_position: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) that hold `highest_position`."""
        if highest_position >= len(self._tables[0]):
            self._tables = self._make(2 * highest_position)
        return self._tables

    def _make(self, num_positions: int) -> tuple[Tensor, Tensor]:
        positions_P = torch.arange(num_positions, dtype=torch.float32, device=self._frequencies_h.device)
        angles_Ph = torch.outer(positions_P, self._frequencies_h)
        return angles_Ph.cos().to(self._dtype), angles_Ph.sin().to(self._dtype)
