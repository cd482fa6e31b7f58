"""Chunked vocab-parallel log-probs and entropy against log_softmax, values and gradients."""

import weakref
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_npr.model.log_probs import token_log_probs
from megatron_npr.model.policy import unused_rows
from megatron_npr.runtime.process_world import World


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


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("unused", [[], [11, 12], [0, 5], [3, 4, 8, 12]])
def test_rows_that_no_token_has_take_no_probability_and_get_no_gradient(
    unused: list[int], chunk: int, entropy: bool
) -> None:
    """The truth is the softmax over a vocabulary without these rows, and the closed form of its entropy."""
    hidden, weight, _ = inputs(10, 13)
    weight[unused] *= 100  # they would win
    used = torch.tensor([token for token in range(13) if token not in unused])
    places = torch.arange(10) % len(used)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    reference = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    scale = torch.arange(1.0, 11, dtype=torch.float64) if entropy else torch.zeros(10, dtype=torch.float64)
    log_probs, found = token_log_probs(
        ours[0],
        ours[1],
        used[places],
        unused_U=torch.tensor(unused, dtype=torch.long),
        chunk=chunk,
        entropy=entropy,
    )
    full = (reference[0] @ reference[1][used].T).log_softmax(-1)
    expected, expected_entropy = full.gather(1, places[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.testing.assert_close(log_probs, expected)
    assert (found is None) == (not entropy)
    if found is not None:
        torch.testing.assert_close(found, expected_entropy)
    (log_probs if found is None else log_probs - scale * found).sum().backward()
    (expected - scale * expected_entropy).sum().backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert ours[1].grad is not None and not ours[1].grad[unused].any()


def test_a_target_that_no_token_has_is_impossible() -> None:
    hidden, weight, _ = inputs(2, 13)
    log_probs, _ = token_log_probs(hidden, weight, torch.tensor([5, 12]), unused_U=torch.tensor([12]))
    assert torch.isfinite(log_probs[0]) and log_probs[1] == -torch.inf


@pytest.mark.parametrize(
    "unused, vocab_size, rank, size, expected",
    [
        ([], 13, 0, 1, []),
        ([11, 12], 13, 0, 1, [11, 12]),
        ([3, 11, 12], 13, 0, 2, [3]),
        ([3, 11, 12], 13, 1, 2, [4, 5, 6]),  # 14 rows: the last one only makes the parts equal
        ([*range(4, 13)], 13, 3, 4, [0, 1, 2, 3]),  # a rank without any token
    ],
)
def test_each_rank_knows_which_of_its_rows_no_token_has(
    unused: list[int], vocab_size: int, rank: int, size: int, expected: list[int]
) -> None:
    world = cast(World, SimpleNamespace(tp_rank=rank, tp_size=size))
    assert unused_rows(unused, vocab_size, world).tolist() == expected


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
