"""Draws tokens from logits, all rows at once. S rows, V vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npr_engine.batch import Sampled, SampleInputs


def sample(logits_SV: Tensor, inputs: SampleInputs) -> Sampled:
    """One token per row by inverse CDF of its uniform number; greedy where the temperature is 0.

    Raises:
        FloatingPointError: logits that are NaN.
    """
    if logits_SV.dtype not in (torch.float32, torch.float64):
        logits_SV = logits_SV.float()
    policy_SV = torch.log_softmax(logits_SV, -1)
    greedy_S = inputs.temperature == 0.0
    scores_SV = _scores(logits_SV, inputs, greedy_S)
    sampler_SV = policy_SV if scores_SV is logits_SV else torch.log_softmax(scores_SV, -1)
    sampler_SV = _truncate(sampler_SV, inputs)
    if greedy_S.all():
        tokens_S = scores_SV.argmax(-1)
    else:
        tokens_S = _draw(sampler_SV, torch.from_numpy(inputs.uniforms).to(logits_SV.device))
        if greedy_S.any():
            tokens_S = torch.where(_like(greedy_S, tokens_S), scores_SV.argmax(-1), tokens_S)
    places = tokens_S[:, None]
    logprobs = policy_SV.gather(1, places)[:, 0].float().cpu().numpy()
    if np.isnan(logprobs).any():
        raise FloatingPointError(f"{int(np.isnan(logprobs).sum())} of {len(logprobs)} rows have NaN logits")
    if sampler_SV is policy_SV and not greedy_S.any():
        sampler_logprobs = logprobs
    else:
        sampler_logprobs = sampler_SV.gather(1, places)[:, 0].float().cpu().numpy()
        sampler_logprobs = np.where(greedy_S, np.float32(0.0), sampler_logprobs)
    return Sampled(tokens_S.to(torch.int32).cpu().numpy(), logprobs, sampler_logprobs)


def _scores(logits_SV: Tensor, inputs: SampleInputs, greedy_S: np.ndarray) -> Tensor:
    """Logits after repetition penalty and temperature; the same tensor where neither changes anything."""
    scores_SV = logits_SV
    if inputs.penalised.shape[1]:
        tokens_SL = torch.from_numpy(inputs.penalised).long().to(logits_SV.device)
        seen_SV = torch.zeros_like(logits_SV, dtype=torch.bool)
        seen_SV.scatter_(1, tokens_SL.clamp(min=0), tokens_SL >= 0)
        penalty_S1 = _like(inputs.penalty, logits_SV)[:, None]
        lowered_SV = torch.where(scores_SV > 0, scores_SV / penalty_S1, scores_SV * penalty_S1)
        scores_SV = torch.where(seen_SV, lowered_SV, scores_SV)
    if (inputs.temperature != 1.0).any():
        scores_SV = scores_SV / _like(np.where(greedy_S, 1.0, inputs.temperature), logits_SV)[:, None]
    return scores_SV


def _truncate(logprobs_SV: Tensor, inputs: SampleInputs) -> Tensor:
    """Top-k, then top-p of what is left, and min-p; renormalised. The same tensor where no row truncates."""
    if not ((inputs.top_k > 0).any() or (inputs.top_p < 1.0).any() or (inputs.min_p > 0.0).any()):
        return logprobs_SV
    probs_SV, order_SV = logprobs_SV.exp().sort(dim=-1, descending=True, stable=True)
    vocabulary = probs_SV.shape[1]
    top_k_S1 = torch.from_numpy(np.where(inputs.top_k > 0, inputs.top_k, vocabulary)).to(probs_SV.device)[
        :, None
    ]
    keep_SV = torch.arange(vocabulary, device=probs_SV.device) < top_k_S1
    probs_SV = probs_SV * keep_SV
    mass_S1 = probs_SV.sum(-1, keepdim=True)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    top_p_S1 = _like(inputs.top_p, probs_SV)[:, None]
    keep_SV &= (before_SV < top_p_S1 * mass_S1) | (top_p_S1 >= 1.0)
    keep_SV &= probs_SV >= _like(inputs.min_p, probs_SV)[:, None] * probs_SV[:, :1]
    kept_SV = torch.zeros_like(keep_SV).scatter_(1, order_SV, keep_SV)
    return torch.log_softmax(logprobs_SV.masked_fill(~kept_SV, -torch.inf), -1)


def _draw(logprobs_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """First token whose cumulative probability exceeds the uniform number; float64, so no mass is lost."""
    cumulative_SV = logprobs_SV.double().exp().cumsum(-1)
    targets_S1 = (uniforms_S * cumulative_SV[:, -1])[:, None]
    drawn_S: Tensor = torch.searchsorted(cumulative_SV, targets_S1, right=True)[:, 0]
    return drawn_S.clamp(max=logprobs_SV.shape[1] - 1)


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """The array on the tensor's device, in its type unless the array is boolean."""
    dtype = torch.bool if array.dtype == np.bool_ else tensor.dtype
    return torch.from_numpy(array).to(device=tensor.device, dtype=dtype)
