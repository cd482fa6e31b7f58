"""Chunked vocab-parallel log-probs against log_softmax, values and gradients."""

import pytest
import torch

from megatron_npr.logprobs import token_log_probs


def inputs(num_targets: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(num_targets, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, 8, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.randint(0, vocab, (num_targets,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("num_targets", [0, 1, 10])
def test_values_and_gradients_equal_log_softmax(num_targets: int, chunk: int) -> None:
    hidden, weight, targets = inputs(num_targets, 13)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    reference = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    scale = torch.arange(1.0, num_targets + 1, dtype=torch.float64)
    log_probs = token_log_probs(ours[0], ours[1], targets, chunk=chunk)
    expected = (reference[0] @ reference[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    (log_probs * scale).sum().backward()
    (expected * scale).sum().backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_padding_rows_take_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = inputs(6, 13)
    targets = targets % 10
    weight.requires_grad_()
    log_probs = token_log_probs(hidden, weight, targets, num_valid=10)
    expected = (hidden @ weight.detach()[:10].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert weight.grad is not None and not weight.grad[10:].any()
