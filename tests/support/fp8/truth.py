"""FP8 products in float64 by the definition of the formats: what `megatron_npr.model.fp8_matmul` is held against.

Numbers are rounded by looking for the nearest in the list of all that a format has, not by a cast of PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """All finite numbers that are not negative, ascending; even ones have an even last bit of the mantissa."""

    numbers: Array
    mantissa_bits: int

    @property
    def largest(self) -> float:
        return float(self.numbers[-1])

    def nearest(self, x: Array) -> Array:
        """Ties to even."""
        size = np.minimum(np.abs(x), self.largest)
        above = np.searchsorted(self.numbers, size).clip(1)
        low, high = self.numbers[above - 1], self.numbers[above]
        up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
        return np.asarray(np.copysign(np.where(up, high, low), x))

    def error(self, x: Array) -> Array:
        """What rounding changes each number by at most, under a tensor's scale: half a step of its binade, or of the
        subnormal numbers'."""
        smallest_step = self.numbers[1] * scale_of(x, self)
        return np.asarray(
            np.maximum(np.abs(x) * 2.0 ** -(self.mantissa_bits + 1), smallest_step / 2) * (1 + 1e-6)
        )


def _format(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Format:
    """Exponent 0 has the subnormal numbers (OCP 8-bit floating point specification, 2023)."""
    steps = 2**mantissa_bits
    numbers = [
        (fraction / steps + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        for exponent in range(2**exponent_bits)
        for fraction in range(steps)
    ]
    return Format(np.array([number for number in numbers if number <= largest]), mantissa_bits)


E4M3 = _format(4, 3, 7, 448.0)
E5M2 = _format(5, 2, 15, 57_344.0)


def scale_of(x: Array, form: Format) -> float:
    """float32, as it is passed to the GEMM; 1 for zeros."""
    largest = np.float32(np.abs(x).max(initial=0.0))
    return float(largest / np.float32(form.largest)) or 1.0


def quantised(x: Array, form: Format) -> Array:
    """The numbers that the GEMM multiplies, with their scale; the division is float32."""
    scale = scale_of(x, form)
    return form.nearest(np.float64(np.float32(x) / np.float32(scale))) * scale
