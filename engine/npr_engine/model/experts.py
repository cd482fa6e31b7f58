"""The MLPs of a layer: one for all tokens, or experts that a router chooses for each; where experts lie on
other ranks, the way there and back.

on the tensor-parallel ranks:  every rank has all rows ──► the parts of its own experts ──► summed by the caller
over more ranks (ExpertRanks): a run of the rows ──route──► (row, expert) pairs ──all_to_all──► the rank of the expert
                               every row's sum, in the order of its experts ◄──all_to_all── what that expert makes of it

Shapes: T tokens of a step, R of them this rank's run, P = R * K pairs, D hidden, F feed-forward, E experts, K
of them for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from npr_engine.model.architecture import ModelConfig
from npr_engine.model.linear import Weight, linear
from npr_ext import silu_mul
from npr_ext.errors import UserError


@dataclass(frozen=True)
class FeedForward:
    """An MLP, or one expert, local shard."""

    gate_up_FD: Weight
    down_DF: Weight


@dataclass(frozen=True)
class Experts:
    """The router of a layer and those of its experts that this rank holds (all of them or a part of each), by
    number."""

    router_ED: Tensor
    held: Mapping[int, FeedForward]


def feed_forward(normed_TD: Tensor, weights: FeedForward) -> Tensor:
    """SwiGLU; this rank's part of the sum over ranks, [T, D]."""
    return linear(silu_mul(linear(normed_TD, weights.gate_up_FD)), weights.down_DF)


def route(normed_TD: Tensor, router_ED: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The K experts of each token and their shares of it, [T, K] both."""
    wide = torch.promote_types(normed_TD.dtype, torch.float32)
    logits_TE = linear(normed_TD.to(wide), router_ED.to(wide))
    shares_TK, chosen_TK = logits_TE.softmax(-1).topk(config.experts_per_token)
    if config.norm_topk_prob:
        shares_TK = shares_TK / shares_TK.sum(-1, keepdim=True)
    return chosen_TK, shares_TK.to(normed_TD.dtype)


def mixture(normed_TD: Tensor, experts: Experts, config: ModelConfig) -> Tensor:
    """Each token's experts by their share of it, [T, D], grouped by expert; no token is dropped. This rank's
    part of the sum over ranks. A token's sum runs in the order of the experts whoever else is in the step."""
    chosen_TK, shares_TK = route(normed_TD, experts.router_ED, config)
    chosen, shares = chosen_TK.flatten(), shares_TK.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=config.num_experts).tolist()
    mixed_TD = torch.zeros_like(normed_TD)
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs) and expert in experts.held:
            tokens = pairs // config.experts_per_token
            output = feed_forward(normed_TD.index_select(0, tokens), experts.held[expert])
            mixed_TD.index_add_(0, tokens, output * shares[pairs, None])
    return mixed_TD


class ExpertRanks:
    """The ranks that hold the experts of every layer, equally many neighbours each, for several copies of the
    model's attention: each copy decodes requests of its own, and all meet in the exchanges of every layer.

    So they step together: before a step all ranks learn whether any of them still has work (`any_busy`); as
    long as one has, every rank makes a step, and a copy without work serves its experts only: zero rows of
    its own in the exchanges of every layer. A rank that fails leaves the others waiting in an exchange, as
    one of any collective does.
    """

    def __init__(self, config: ModelConfig, group: ProcessGroup, tp_group: ProcessGroup | None) -> None:
        """`tp_group`: the ranks of this copy, which lie side by side in `group`."""
        self._config, self._group = config, group
        self.size = dist.get_world_size(group)
        self._copy_size = 1 if tp_group is None else dist.get_world_size(tp_group)
        self._place = 0 if tp_group is None else dist.get_rank(tp_group)
        if config.num_experts % self.size or self.size % self._copy_size:
            raise UserError(
                f"{config.num_experts} experts cannot be spread over {self.size} ranks, copies of {self._copy_size} ranks each"
            )
        self._local = config.num_experts // self.size
        first = dist.get_rank(group) * self._local
        self.numbers = range(first, first + self._local)

    def any_busy(self, busy: bool, device: torch.device) -> bool:
        """Whether any rank is busy. Collective."""
        flag = torch.tensor([int(busy)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def mixture(self, normed_TD: Tensor, experts: Experts) -> Tensor:
        """As the function of that name, with the same sums bit for bit where a linear layer's rows do not
        depend on their number; this rank's part of the sum over its copy. Collective over all copies, each
        with any T, also 0."""
        share = -(-len(normed_TD) // self._copy_size)
        own = slice(share * self._place, share * (self._place + 1))
        normed_RD = normed_TD[own]
        chosen_RK, shares_RK = route(normed_RD, experts.router_ED, self._config)
        chosen_RK, places_RK = chosen_RK.sort(-1)
        shares_RK = shares_RK.gather(-1, places_RK)
        outputs_RKD = self._outputs(normed_RD, chosen_RK, experts)
        mixed_TD = torch.zeros_like(normed_TD)
        for outputs_RD, shares_R in zip(outputs_RKD.unbind(1), shares_RK.unbind(1), strict=True):
            mixed_TD[own] += outputs_RD * shares_R[:, None]
        return mixed_TD

    def _outputs(self, normed_RD: Tensor, chosen_RK: Tensor, experts: Experts) -> Tensor:
        """[R, K, D]: what each row's experts make of it."""
        chosen = chosen_RK.flatten()
        order = chosen.argsort(stable=True)
        leaving = torch.bincount(chosen, minlength=self._config.num_experts)
        coming = torch.empty_like(leaving)  # rank by rank, each by this rank's experts
        dist.all_to_all_single(coming, leaving, group=self._group)
        counts = torch.stack((leaving, coming)).view(2, self.size, self._local)
        sent, received = counts.sum(2).tolist()
        arrived_PD = self._exchange(normed_RD[order // self._config.experts_per_token], sent, received)
        number = torch.arange(self._local, device=coming.device).repeat(self.size).repeat_interleave(coming)
        made_PD = torch.empty_like(arrived_PD)
        groups = number.argsort(stable=True).split(counts[1].sum(0).tolist())
        for expert, pairs in zip(self.numbers, groups, strict=True):
            if len(pairs):
                made_PD[pairs] = feed_forward(arrived_PD[pairs], experts.held[expert])
        outputs_PD = torch.empty(len(chosen), normed_RD.shape[1], dtype=made_PD.dtype, device=made_PD.device)
        outputs_PD[order] = self._exchange(made_PD, received, sent)
        return outputs_PD.view(*chosen_RK.shape, normed_RD.shape[1])

    def _exchange(self, rows_PD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived_PD = rows_PD.new_empty(sum(received), rows_PD.shape[1])
        dist.all_to_all_single(arrived_PD, rows_PD, received, sent, group=self._group)
        return arrived_PD
