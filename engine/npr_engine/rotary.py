"""Rotary position embedding (Su et al. 2021): the table of angles."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines by position, [P, H / 2]. Angles are float32 whatever the model's type, as in training
    (transformers and Megatron), so that both sides rotate alike."""

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> None:
        exponents_h = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies_h = 1.0 / theta**exponents_h
        self._dtype = dtype
        self.tables = self._make(1)

    def need(self, num_positions: int) -> None:
        """Makes (cos, sin) long enough; a no-op where they are."""
        if num_positions > len(self.tables[0]):
            self.tables = self._make(num_positions)

    def _make(self, num_positions: int) -> tuple[Tensor, Tensor]:
        positions_P = torch.arange(num_positions, dtype=torch.float32, device=self._frequencies_h.device)
        angles_Ph = torch.outer(positions_P, self._frequencies_h)
        return angles_Ph.cos().to(self._dtype), angles_Ph.sin().to(self._dtype)
