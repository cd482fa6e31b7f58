"""Log-probabilities, and the entropy on request, from vocab-parallel logits, in chunks: never T x V at once, no gather of
logits.

Shape legend: M target tokens, D hidden, V this rank's vocabulary rows, U those of them that no token has, C chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class VocabParallelLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] over a vocabulary split across `group`, and the entropy of that softmax.

    forward(hidden_MD, weight_VD, targets_M, first_row, unused_U, chunk, entropy, group) -> (log_probs_M, entropy_M or
    None) in fp32, fp64 for fp64 input. `first_row` is the token id of this rank's row 0; its rows `unused_U`, which
    no token has, take no probability and get no gradient. Entropy, in nats, comes from the same logits l: Z - sum p l with
    Z = log sum exp l; its gradient is -p (log p + entropy), and where it is dropped none is computed.
    Memory: O(chunk x V). The backward pass recomputes the logits of a chunk; its hidden gradient is this rank's partial sum
    (reduce it over the tensor group, e.g. by Megatron's copy_to_tensor_model_parallel_region before this function).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        first_row: int,
        unused_U: Tensor,
        chunk: int,
        entropy: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        accumulate = torch.promote_types(hidden_MD.dtype, torch.float32)
        num_targets = hidden_MD.shape[0]
        normalizer_M = torch.empty(num_targets, dtype=accumulate, device=hidden_MD.device)
        chosen_M = torch.empty_like(normalizer_M)
        mean_logit_M = torch.empty_like(normalizer_M) if entropy else None
        for start in range(0, num_targets, chunk):
            part = slice(start, start + chunk)
            chosen_C, normalizer_C, mean_logit_C = _chunk_values(
                hidden_MD[part], weight_VD, targets_M[part] - first_row, unused_U, accumulate, entropy
            )
            chosen_M[part], normalizer_M[part] = chosen_C, normalizer_C
            if mean_logit_M is not None and mean_logit_C is not None:
                mean_logit_M[part] = mean_logit_C
        if group is not None and group.size() > 1:
            dist.all_reduce(chosen_M, group=group)
            own_normalizer_M, normalizer_M = normalizer_M, _log_sum_exp_over(normalizer_M, group)
            if mean_logit_M is not None:
                mean_logit_M *= torch.exp(own_normalizer_M - normalizer_M)
                dist.all_reduce(mean_logit_M, group=group)
        entropy_M = None if mean_logit_M is None else normalizer_M - mean_logit_M
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, unused_U, normalizer_M, entropy_M)
        ctx.first_row, ctx.chunk = first_row, chunk
        return chosen_M - normalizer_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        hidden_MD, weight_VD, targets_M, unused_U, normalizer_M, entropy_M = ctx.saved_tensors
        grad_M, grad_entropy_M = grads
        if grad_M is None:
            grad_M = torch.zeros_like(normalizer_M)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=normalizer_M.dtype)
        for start in range(0, hidden_MD.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_hidden_MD[part] = _chunk_gradients(
                hidden_MD[part],
                weight_VD,
                targets_M[part] - ctx.first_row,
                normalizer_M[part, None],
                grad_M[part, None],
                None if grad_entropy_M is None else (entropy_M[part, None], grad_entropy_M[part, None]),
                unused_U,
                grad_weight_VD,
            )
        return grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None, None, None


# What belongs to a chunk lives in these functions alone: in a loop's body its logits would still be there while the next
# chunk's are computed.


def _chunk_values(
    hidden_CD: Tensor, weight_VD: Tensor, local_C: Tensor, unused_U: Tensor, dtype: torch.dtype, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's parts: logits of the targets (0 where another rank has them), log sum exp, and with `entropy` mean logit;
    [C] each. `local_C` are the targets, counted from this rank's first row."""
    logits_CV = _chunk_logits(hidden_CD, weight_VD, unused_U, dtype)
    owned_C = (local_C >= 0) & (local_C < len(weight_VD))
    picked_C = logits_CV.gather(1, local_C.clamp(0, len(weight_VD) - 1)[:, None])[:, 0]
    normalizer_C = torch.logsumexp(logits_CV, dim=1)
    mean_logit_C = _mean_logit(logits_CV, normalizer_C, unused_U) if entropy else None
    return torch.where(owned_C, picked_C, torch.zeros_like(picked_C)), normalizer_C, mean_logit_C


def _chunk_gradients(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    local_C: Tensor,
    normalizer_C1: Tensor,
    grad_C1: Tensor,
    entropies: tuple[Tensor, Tensor] | None,
    unused_U: Tensor,
    grad_weight_VD: Tensor,
) -> Tensor:
    """The hidden states' gradient [C, D]; the weight's is added to `grad_weight_VD`. `entropies`: they and their gradients."""
    logits_CV = _chunk_logits(hidden_CD, weight_VD, unused_U, normalizer_C1.dtype)
    # d log p(target) / d logits = onehot(target) - p; d entropy / d logits = -p (log p + entropy)
    log_probs_CV = logits_CV.sub_(normalizer_C1)
    if entropies is None:
        grad_logits_CV = log_probs_CV.exp_().mul_(-grad_C1)
    else:
        entropy_C1, grad_entropy_C1 = entropies
        probs_CV = torch.exp(log_probs_CV)
        grad_logits_CV = log_probs_CV.add_(entropy_C1).mul_(-grad_entropy_C1)
        grad_logits_CV.sub_(grad_C1).mul_(probs_CV)
        grad_logits_CV.index_fill_(1, unused_U, 0)  # 0 x -inf
    rows = torch.nonzero((local_C >= 0) & (local_C < len(weight_VD)))[:, 0]
    grad_logits_CV[rows, local_C[rows]] += grad_C1[rows, 0]
    narrow_CV = grad_logits_CV.to(hidden_CD.dtype)
    del logits_CV, log_probs_CV, grad_logits_CV  # the products need the narrow one alone
    grad_weight_VD += narrow_CV.T @ hidden_CD
    return narrow_CV @ weight_VD


def _chunk_logits(hidden_CD: Tensor, weight_VD: Tensor, unused_U: Tensor, dtype: torch.dtype) -> Tensor:
    return (hidden_CD @ weight_VD.T).to(dtype).index_fill_(1, unused_U, -torch.inf)


def _mean_logit(logits_CV: Tensor, normalizer_C: Tensor, unused_U: Tensor) -> Tensor:
    """sum p l [C] over these columns alone, p normalised to them; 0 where none is used. Overwrites the logits."""
    probs_CV = (logits_CV - normalizer_C[:, None]).exp_().index_fill_(1, unused_U, 0)
    return torch.einsum("cv,cv->c", probs_CV, logits_CV.index_fill_(1, unused_U, 0))


def _log_sum_exp_over(normalizer_M: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log sum_ranks exp(x), stable: subtract the largest first."""
    largest_M = normalizer_M.clone()
    dist.all_reduce(largest_M, op=dist.ReduceOp.MAX, group=group)
    total_M = torch.exp(normalizer_M - largest_M)
    dist.all_reduce(total_M, group=group)
    return largest_M + torch.log(total_M)


def token_log_probs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    first_row: int = 0,
    unused_U: Tensor | None = None,
    chunk: int = 4096,
    group: dist.ProcessGroup | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log p(targets) [M] from the hidden states that predict them, with `entropy` that of each distribution [M], in nats);
    -inf for a target that no token has. See `VocabParallelLogProbs`; `unused_U` int64, None: all rows are used."""
    if unused_U is None:
        unused_U = torch.empty(0, dtype=torch.int64, device=weight_VD.device)
    found: tuple[Tensor, Tensor | None] = VocabParallelLogProbs.apply(
        hidden_MD, weight_VD, targets_M.long(), first_row, unused_U, chunk, entropy, group
    )
    return found
