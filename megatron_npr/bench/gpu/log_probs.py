"""What log-probs over a vocabulary of 152k cost, forward and backward, at growing lengths: memory must not grow with them."""

from __future__ import annotations

import torch

from megatron_npr.bench.gpu.result import LogProbFigures
from megatron_npr.bench.gpu.timing import added_bytes, median_seconds
from megatron_npr.model.log_probs import token_log_probs
from megatron_npr.sharding.architecture import KNOWN


def measure(device: torch.device, *, tiny: bool) -> LogProbFigures:
    """Qwen3-4B's output matrix in bf16."""
    if tiny:
        return figures(device, 500, 16, (64, 128), torch.float32)
    shape = KNOWN["Qwen3-4B"]
    return figures(
        device, shape.vocab_size, shape.hidden_size, (8192, 16_384, 32_768, 65_536), torch.bfloat16
    )


def figures(
    device: torch.device, vocab_size: int, hidden_size: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> LogProbFigures:
    """By length."""
    weight_VD = torch.randn(vocab_size, hidden_size, device=device).mul_(0.02).to(dtype).requires_grad_()
    added, milliseconds = {}, {}
    for length in lengths:
        hidden_TD = torch.randn(length, hidden_size, device=device).to(dtype).requires_grad_()
        targets_T = torch.randint(0, vocab_size, (length,), device=device)

        def work(
            hidden_TD: torch.Tensor = hidden_TD, targets_T: torch.Tensor = targets_T
        ) -> tuple[torch.Tensor, ...]:
            log_probs_T, _ = token_log_probs(hidden_TD, weight_VD, targets_T)
            return torch.autograd.grad(log_probs_T.sum(), (hidden_TD, weight_VD))

        milliseconds[str(length)] = 1e3 * median_seconds(work, device, repeats=3)
        gradients = hidden_TD.nbytes + weight_VD.nbytes
        added[str(length)] = added_bytes(work, device) - gradients
    return LogProbFigures(vocab_size, added, milliseconds)
