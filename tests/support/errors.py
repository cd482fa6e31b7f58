"""How exact a float32 result has to be: as exact as a peer's of the same computation, both measured against float64.

Another processor, library or order of sums moves every float32 result; it moves the peer's as well. So no number that one
machine happened to meet is a tolerance here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPSILON = float(np.finfo(np.float32).eps)


def largest_error(values: Any, truth: Any) -> float:
    """The largest |value - truth|, in float64; both are tensors, arrays or lists of one shape."""
    found, exact = _wide(values), _wide(truth)
    assert found.shape == exact.shape, f"shapes {found.shape} and {exact.shape}"
    return float(np.abs(found - exact).max(initial=0.0))


def allowed_error(peer: Any, truth: Any, factor: float = 2.0) -> float:
    """`factor` times the peer's own error, and the last bit of the largest number: the peer may have hit the truth."""
    return factor * largest_error(peer, truth) + EPSILON * float(np.abs(_wide(truth)).max(initial=0.0))


def assert_as_exact_as(ours: Any, peer: Any, truth: Any, factor: float = 2.0) -> None:
    """`ours` errs by at most `factor` times what `peer` does. `truth` is computed in float64."""
    error, allowed = largest_error(ours, truth), allowed_error(peer, truth, factor)
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} is allowed"


def assert_log_probs_as_exact_as(ours: Any, truth: Any, peer_logits: Any, exact_logits: Any) -> None:
    """Log-probs [M] of some tokens, their truth, and the logits [T, V] of peer and truth from which they could come.

    A log-prob is a logit less the log of the sum of all, and that moves no farther than the logit that moves most.
    """
    error, allowed = largest_error(ours, truth), 2 * allowed_error(peer_logits, exact_logits)
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} is allowed"


def product_bound(x_TC: Tensor, weight_DC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far x @ weight.T + bias may be off, [T, D], whatever the order of its sums: each of its C products and sums rounds
    what has come together so far, by half an epsilon (Higham 2002, 3.1). A bias is taken to be at most 4."""
    terms = x_TC.shape[1] + 2
    return terms / 2 * torch.finfo(dtype).eps * (x_TC.double().abs() @ weight_DC.double().abs().T + 4)


def _wide(values: Any) -> NDArray[np.float64]:
    return np.asarray(values.detach() if hasattr(values, "detach") else values, np.float64)
