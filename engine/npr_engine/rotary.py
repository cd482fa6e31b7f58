"""Rotary position embedding, half rotation (Qwen3, Llama): dimension i turns with dimension i + H/2."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines by position. Angles are float32 whatever the model's type, as in training
    (transformers and Megatron), so that both sides rotate alike. The table grows on demand."""

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> None:
        exponents_h = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies_h = 1.0 / theta**exponents_h
        self._dtype = dtype
        self._cos_PH, self._sin_PH = self._table(256)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each [T, 1, 1, H], for positions [T] on any device."""
        highest = int(positions.max())
        if highest >= len(self._cos_PH):
            self._cos_PH, self._sin_PH = self._table(2 * highest)
        cos_TH, sin_TH = self._cos_PH.index_select(0, positions), self._sin_PH.index_select(0, positions)
        return cos_TH[:, None, None], sin_TH[:, None, None]

    def _table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines whose first half is negated so that `rotate` needs no concatenation."""
        positions_P = torch.arange(num_positions, dtype=torch.float32, device=self._frequencies_h.device)
        angles_Ph = torch.outer(positions_P, self._frequencies_h)
        cos_Ph, sin_Ph = angles_Ph.cos(), angles_Ph.sin()
        cos_PH, sin_PH = torch.cat((cos_Ph, cos_Ph), -1), torch.cat((-sin_Ph, sin_Ph), -1)
        return cos_PH.to(self._dtype), sin_PH.to(self._dtype)


def rotate(x_TGNH: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> Tensor:
    """x rotated by the angles of its tokens."""
    swapped = x_TGNH.roll(x_TGNH.shape[-1] // 2, -1)
    return torch.addcmul(x_TGNH * cos_T11H, swapped, sin_T11H)
