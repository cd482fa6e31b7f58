"""Chunked vocab-parallel log-probs and entropy against log_softmax, values and gradients."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    log_probs, none = token_log_probs(ours[0], ours[1], targets, chunk=chunk)
    expected = (reference[0] @ reference[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert none is None
    torch.testing.assert_close(log_probs, expected)
    (log_probs * scale).sum().backward()
    (expected * scale).sum().backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_padding_rows_take_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = inputs(6, 13)
    targets = targets % 10
    weight.requires_grad_()
    log_probs, _ = token_log_probs(hidden, weight, targets, num_valid=10)
    expected = (hidden @ weight.detach()[:10].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert weight.grad is not None and not weight.grad[10:].any()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_entropy_and_its_gradient_equal_the_closed_form(chunk: int) -> None:
    hidden, weight, targets = inputs(10, 13)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    reference = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    scale = torch.arange(1.0, 11, dtype=torch.float64)
    log_probs, entropy = token_log_probs(
        ours[0], ours[1], targets % 11, num_valid=11, chunk=chunk, entropy=True
    )
    full = (reference[0] @ reference[1][:11].T).log_softmax(-1)
    expected = -(full.exp() * full).sum(-1)
    assert entropy is not None
    torch.testing.assert_close(entropy, expected)
    (log_probs - scale * entropy).sum().backward()
    (full.gather(1, targets[:, None] % 11)[:, 0] - scale * expected).sum().backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("wanted", ["log-probs", "entropy"])
def test_either_output_alone_has_its_own_gradient(wanted: str) -> None:
    hidden, weight, targets = inputs(5, 13)
    ours, reference = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    outputs = token_log_probs(ours, weight, targets, entropy=True)
    full = (reference @ weight.T).log_softmax(-1)
    expected = (full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1))
    index = ("log-probs", "entropy").index(wanted)
    (gradient,) = torch.autograd.grad(outputs[index].sum(), ours)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[index].sum(), reference)[0])


def test_entropy_of_certain_and_of_uniform_distributions() -> None:
    weight = torch.eye(64)
    certain, uniform = 200.0 * torch.eye(64)[:1], torch.zeros(1, 64)
    for hidden, expected in ((certain, 0.0), (uniform, float(torch.tensor(64.0).log()))):
        hidden.requires_grad_()
        _, entropy = token_log_probs(hidden, weight, torch.tensor([3]), entropy=True)
        assert entropy is not None
        torch.testing.assert_close(entropy, torch.tensor([expected]))
        (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
        torch.testing.assert_close(gradient, torch.zeros(1, 64))


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operator gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("num_targets", [64, 1024])
def test_no_tensor_is_larger_than_a_chunk_of_logits_whatever_the_length(num_targets: int) -> None:
    hidden = torch.randn(num_targets, 4).requires_grad_()
    weight = torch.randn(512, 4).requires_grad_()
    with LargestResult() as seen:
        log_probs, entropy = token_log_probs(
            hidden, weight, torch.zeros(num_targets, dtype=torch.long), chunk=32, entropy=True
        )
        assert entropy is not None
        (log_probs + entropy).sum().backward()
    assert seen.elements == 32 * 512


class LiveLogits(TorchDispatchMode):
    """The most bytes of chunks of logits that were there at once; views count with what they are views of."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.most, self._elements = 0, elements
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self._elements:
            self._seen.append(weakref.ref(result))
        alive = [tensor for tensor in (reference() for reference in self._seen) if tensor is not None]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.most = max(self.most, sum(sizes.values()))
        return result


@pytest.mark.parametrize(("dtype", "bytes_a_logit"), [(torch.float32, 4), (torch.bfloat16, 6)])
@pytest.mark.parametrize("num_chunks", [1, 5])
def test_logits_of_one_chunk_are_held_at_a_time(
    num_chunks: int, dtype: torch.dtype, bytes_a_logit: int
) -> None:
    hidden = torch.randn(32 * num_chunks, 4).to(dtype).requires_grad_()
    weight = torch.randn(500, 4).to(dtype).requires_grad_()
    targets = torch.zeros(len(hidden), dtype=torch.long)
    with LiveLogits(32 * 500) as seen:
        log_probs, _ = token_log_probs(hidden, weight, targets, chunk=32)
        log_probs.sum().backward()
    assert seen.most == bytes_a_logit * 32 * 500
