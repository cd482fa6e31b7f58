"""Draws tokens from logits, all rows at once. S rows, V vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npr_engine.executor.upload import upload
from npr_engine.scheduler.batch import Sampled, SampleInputs
from npr_ext import categorical


def sample(logits_SV: Tensor, inputs: SampleInputs, forbidden_KV: Tensor | None = None) -> Sampled:
    """One token per row by inverse CDF of its uniform number; greedy where the temperature is 0.

    `forbidden_KV` (bool) are the masks that `inputs.masks` names; masked tokens have no probability under the
    policy either. Rows whose logits are NaN or +inf are flagged and do not touch the others.
    """
    device = logits_SV.device
    if forbidden_KV is not None:
        logits_SV = logits_SV.masked_fill(forbidden_KV[upload(inputs.masks, device)], -torch.inf)
    uniforms_S, temperature_S = upload(inputs.uniforms, device), upload(inputs.temperature, device)
    if _reshapes(inputs):
        wide_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
        scores_SV = _truncate(_scores(wide_SV, inputs), inputs)
        tokens_S, _, sampler_S = categorical(scores_SV, uniforms_S, (temperature_S > 0).float())
        policy_S = torch.log_softmax(wide_SV, -1).gather(1, tokens_S[:, None])[:, 0]
    else:
        tokens_S, policy_S, sampler_S = categorical(logits_SV, uniforms_S, temperature_S)
    # One transfer, hence one wait for a GPU; float64 holds every token id.
    tokens, logprobs, sampler_logprobs = (
        torch.stack((tokens_S.double(), policy_S.double(), sampler_S.double())).cpu().numpy()
    )
    logprobs = logprobs.astype(np.float32)
    return Sampled(tokens.astype(np.int32), logprobs, sampler_logprobs.astype(np.float32), np.isnan(logprobs))


def _reshapes(inputs: SampleInputs) -> bool:
    """Whether some row is sampled from another distribution than its logits at a temperature."""
    truncates = (inputs.top_k > 0).any() or (inputs.top_p < 1.0).any() or (inputs.min_p > 0.0).any()
    return bool(truncates) or inputs.penalised.shape[1] > 0


def _scores(logits_SV: Tensor, inputs: SampleInputs) -> Tensor:
    """Logits after repetition penalty and temperature (1 for greedy rows, which it does not change)."""
    scores_SV = logits_SV
    if inputs.penalised.shape[1]:
        tokens_SL = upload(inputs.penalised, logits_SV.device).long()
        seen_SV = torch.zeros_like(logits_SV, dtype=torch.bool)
        seen_SV.scatter_(1, tokens_SL.clamp(min=0), tokens_SL >= 0)
        penalty_S1 = _like(inputs.penalty, logits_SV)[:, None]
        lowered_SV = torch.where(scores_SV > 0, scores_SV / penalty_S1, scores_SV * penalty_S1)
        scores_SV = torch.where(seen_SV, lowered_SV, scores_SV)
    temperature = np.where(inputs.temperature == 0.0, np.float32(1.0), inputs.temperature)
    return scores_SV / _like(temperature, logits_SV)[:, None]


def _truncate(scores_SV: Tensor, inputs: SampleInputs) -> Tensor:
    """Scores of -inf beyond top-k, then top-p of what is left, and min-p."""
    probs_SV, order_SV = scores_SV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    vocabulary = probs_SV.shape[1]
    top_k_S = upload(np.where(inputs.top_k > 0, inputs.top_k, vocabulary), probs_SV.device)
    keep_SV = torch.arange(vocabulary, device=probs_SV.device) < top_k_S[:, None]
    probs_SV = probs_SV * keep_SV
    mass_S1 = probs_SV.sum(-1, keepdim=True)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    top_p_S1 = _like(inputs.top_p, probs_SV)[:, None]
    keep_SV &= (before_SV < top_p_S1 * mass_S1) | (top_p_S1 >= 1.0)
    keep_SV &= probs_SV >= _like(inputs.min_p, probs_SV)[:, None] * probs_SV[:, :1]
    kept_SV = torch.zeros_like(keep_SV).scatter_(1, order_SV, keep_SV)
    return scores_SV.masked_fill(~kept_SV, -torch.inf)


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """The array on the tensor's device, in its type."""
    return upload(array, tensor.device).to(tensor.dtype)
