"""The objectives against closed forms, in float64."""

import pytest
import torch
from torch import Tensor

from megatron_npr.rl.losses import dapo_loss, papo_loss, sft_loss, with_entropy


def log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def test_papo_gradient_equals_the_closed_form_on_a_hand_made_batch() -> None:
    # d J / d logits of token t = A_t / n * (onehot(y_t) - softmax): the policy gradient, no clipping anywhere.
    logits = torch.tensor(
        [[0.2, -1.0, 3.0], [1.0, 1.0, 1.0], [-2.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True
    )
    targets = torch.tensor([2, 0, 1])
    advantages = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)
    loss = papo_loss(log_probs_of(logits, targets), advantages).total / 3
    loss.backward()
    onehot = torch.nn.functional.one_hot(targets, 3).double()
    expected = -(advantages[:, None] / 3) * (onehot - logits.detach().softmax(-1))
    torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=0)
    assert abs(float(loss.detach()) + float(advantages.mean())) < 1e-12, (
        "the value is minus the mean advantage: the ratio is one"
    )


def test_sft_loss_is_the_summed_cross_entropy() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(sft_loss(log_probs_of(logits, targets)).total, expected)


def test_dapo_loss_equals_the_scalar_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(200, dtype=torch.float64, generator=generator) * 2
    old = torch.randn(200, dtype=torch.float64, generator=generator) * 2
    advantages = torch.randn(200, dtype=torch.float64, generator=generator)
    expected = 0.0
    for lp, lp_old, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = float(torch.exp(torch.tensor(lp - lp_old, dtype=torch.float64)))
        objective = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
        if a < 0:
            objective = max(objective, 10.0 * a)
        expected -= objective
    result = dapo_loss(new, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    assert abs(float(result.total) - expected) < 1e-9 * abs(expected)
    assert float(result.metrics["clipped"]) > 0


def test_dapo_on_policy_has_the_gradient_of_papo() -> None:
    log_probs = torch.randn(
        9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    advantages = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (dapo,) = torch.autograd.grad(
        dapo_loss(
            log_probs, log_probs.detach(), advantages, clip_low=0.2, clip_high=0.28, dual_clip=10.0
        ).total,
        log_probs,
    )
    (papo,) = torch.autograd.grad(papo_loss(log_probs, advantages).total, log_probs)
    torch.testing.assert_close(dapo, papo)


def test_an_entropy_bonus_lowers_the_loss_and_none_leaves_it() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    entropy = torch.tensor([0.5, 1.5], requires_grad=True)
    plain = sft_loss(log_probs)
    assert with_entropy(plain, entropy, 0.0).total is plain.total
    paid = with_entropy(plain, entropy, 0.1)
    assert float(paid.total.detach()) == pytest.approx(3.0 - 0.2)
    assert {name: float(value) for name, value in paid.metrics.items()} == {"nll": 3.0, "entropy": 2.0}
    torch.testing.assert_close(torch.autograd.grad(paid.total, entropy)[0], torch.tensor([-0.1, -0.1]))
