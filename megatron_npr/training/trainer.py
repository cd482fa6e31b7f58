"""One optimizer step of the policy through Megatron's schedules, DDP and distributed optimizer.

    TrainSample* ─► plan_rows ─► share_rows ─► pack_row (a row = a micro-batch) ─► Megatron forward/backward schedule ─►
    one global token mean (finalize_model_grads) ─► clip ─► distributed optimizer ─► StepReport

Every rank is given the SAME list of samples and takes its data-parallel share of the rows, so the result does not depend on
the layout of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_npr.config import BatchSettings, OptimizerSettings
from megatron_npr.data.balance import attended_pairs, row_pairs, share_rows
from megatron_npr.data.packing import (
    PackedRow,
    RankRows,
    RowPlan,
    TrainSample,
    pack_row,
    plan_rows,
    row_length,
)
from megatron_npr.model.context_parallel import shard_bounds
from megatron_npr.model.experts import Router
from megatron_npr.model.linears import token_multiple
from megatron_npr.model.load_balance import ExpertLoad
from megatron_npr.model.policy import Policy
from megatron_npr.monitoring.spans import span
from megatron_npr.rl.agreement import Agreement, agreement_sums
from megatron_npr.rl.losses import LossSum, with_entropy
from megatron_npr.runtime.agreement import agree
from megatron_npr.runtime.peak_memory import peak_memory
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.training.distributed_optimizer import build_optimizer, build_schedule, wrap_chunks
from megatron_npr.training.step_report import MEAN, StepReport, combine
from npr_ext import TagIds

Objective = Callable[[Tensor, PackedRow], LossSum]
"""(log_probs [M], row) -> sum of the loss over the row's M trained tokens."""


class Trainer:
    """The policy with its DDP wrapper, optimizer and learning-rate schedule on this rank."""

    def __init__(
        self,
        policy: Policy,
        world: World,
        *,
        optimizer: OptimizerSettings,
        batch: BatchSettings,
        tags: TagIds,
        pad_id: int,
        num_updates: int,
        overlap_param_gather: bool = False,
    ) -> None:
        """`overlap_param_gather`: where communication overlaps, the next forward pass gathers the new weights,
        layer by layer; before anything else reads them, call `gather`."""
        self.policy, self.world, self.batch, self.tags, self.pad_id = policy, world, batch, tags, pad_id
        overlap = world.device.type == "cuda" if optimizer.overlap is None else optimizer.overlap
        self._overlap_param_gather = overlap_param_gather and overlap
        with megatron_context():
            self.chunks = wrap_chunks(
                policy,
                bucket_size=optimizer.bucket_size,
                overlap_grad_reduce=overlap,
                overlap_param_gather=self._overlap_param_gather,
            )
            self.optimizer = build_optimizer(
                self.chunks, policy, optimizer, overlap_param_gather=self._overlap_param_gather
            )
            self.schedule = build_schedule(self.optimizer, optimizer, num_updates)
        policy.config.finalize_model_grads_func = finalize_model_grads
        policy.config.grad_scale_func = self.optimizer.scale_loss
        if overlap:  # gradients travel in the last micro-batch's backward pass
            policy.config.no_sync_func = [chunk.no_sync for chunk in self.chunks]
            if len(self.chunks) == 1:
                (policy.config.no_sync_func,) = policy.config.no_sync_func

    def step(
        self, samples: Sequence[TrainSample], objective: Objective, *, branching: bool, idle_targets: int = 0
    ) -> StepReport:
        """One update on `samples`, one token mean over the global batch.

        `idle_targets` trained tokens of other samples are known to have no gradient (advantage 0): they count in the mean
        and cost nothing.
        """
        began = time.perf_counter()
        with peak_memory(self.world.device) as peak:
            packed = self.pack(samples, branching=branching)
            totals = self.accumulate(packed.rows, objective, idle_targets=idle_targets)
            grad_norm = self._update()
        count = max(totals["targets"], 1.0)
        computed = max(totals["targets"] - totals["idle"], 1.0)
        return StepReport(
            loss=totals["loss"] / count,
            grad_norm=grad_norm,
            lr=self.lr,
            num_targets=int(totals["targets"]),
            num_tokens=int(totals["tokens"]),
            num_rows=len(packed.rows) * self.world.dp_size,
            seconds=time.perf_counter() - began,
            memory_gb=peak.gb,
            imbalance=packed.imbalance,
            metrics={
                name.removeprefix(MEAN): totals[name] / computed for name in totals if name.startswith(MEAN)
            },
            load_balance=totals["load_balance"],
            agreement=Agreement.of(totals),
        )

    @span("optimizer")
    def _update(self) -> float:
        """Clip, change the weights by the accumulated gradients; the gradients' norm before the clipping."""
        with megatron_context():
            self.schedule.step(increment=1)
            _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm or 0.0)

    def gather(self) -> None:
        """The new weights are whole on every rank; collective. Needed with `overlap_param_gather` alone."""
        if self._overlap_param_gather:
            with megatron_context():
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)

    @property
    def lr(self) -> float:
        """Learning rate of the latest update."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    @property
    def balances_experts(self) -> bool:
        """Whether there are experts, and a loss that keeps them evenly loaded."""
        return bool(self.policy.config.moe_aux_loss_coeff)

    @span("pack")
    def pack(self, samples: Sequence[TrainSample], *, branching: bool) -> RankRows:
        """This rank's rows, with the targets that it computes; every data-parallel rank gets equally many (the last may be
        all padding) and nearly as many attended pairs."""
        world, budget = self.world, self.batch.micro_batch_tokens
        plans = plan_rows(samples, row_tokens=budget, share_prompts=self.batch.share_prompts)
        length = row_length(
            plans,
            budget if world.device.type == "cuda" else None,
            multiple=token_multiple(self.policy.config),
        )
        costs = [1] * len(plans)
        if world.dp_size > 1:
            pairs = [attended_pairs(sample, self.tags, branching=branching) for sample in samples]
            costs = [row_pairs(plan, samples, pairs, length=length) for plan in plans]
        shares = share_rows(costs, world.dp_size)
        agree(
            "packing",
            samples=(
                part
                for sample in samples
                for part in (sample.prompt_ids, sample.response_ids, sample.loss_mask)
            ),
            rows=[str([plan.groups for plan in plans]), str(shares.rows), str(length)],
        )
        # The interleaved schedule runs micro-batches in groups of as many as there are stages.
        group = world.pp_size if world.vpp_size > 1 else 1
        count = -(-max(map(len, shares.rows)) // group) * group
        mine = [plans[row] for row in shares.rows[world.dp_rank]]
        mine += [RowPlan((), 0)] * (count - len(mine))
        rows = [
            pack_row(samples, plan, length=length, tags=self.tags, branching=branching, pad_id=self.pad_id)
            for plan in mine
        ]
        if world.cp_size > 1:
            own_tokens = shard_bounds(length, world.cp_rank, world.cp_size)
            rows = [row.with_predecessors_in(*own_tokens) for row in rows]
        return RankRows(rows, shares.imbalance)

    @span("forward_backward")
    def accumulate(
        self, rows: Sequence[PackedRow], objective: Objective, *, idle_targets: int = 0
    ) -> dict[str, float]:
        """Gradients of the global token mean into Megatron's buffers; sums over the global batch, by name."""
        with megatron_context():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        # Counted once in the global batch: with the first row of the first rank that has one.
        first = rows[0] if self.world.dp_rank == self.world.cp_rank == 0 else None
        loss_of = partial(
            _loss_of_row,
            objective=objective,
            entropy_coefficient=self.policy.entropy_coefficient,
            idle_row=first,
            idle_targets=idle_targets,
        )
        with self._balanced_load(rows, idle_targets) as load_balance:
            self.policy.train()
            outputs = self._run(rows, loss_of, forward_only=False)
        return self._global_sums(rows, outputs) | {"load_balance": load_balance}

    @contextlib.contextmanager
    def _balanced_load(self, rows: Sequence[PackedRow], idle_targets: int) -> Iterator[float]:
        """Within it, backward passes of these rows add the gradient of the loss that balances the load of experts. Its mean
        over the layers; NaN where it is not asked for."""
        routers = self.policy.routers
        if not self.balances_experts:
            yield math.nan
            return
        self._count_load(rows, routers)
        targets = torch.tensor(sum(row.num_targets for row in rows), device=self.world.device)
        losses = torch.tensor(
            sum(router.load.loss for router in routers if router.load), device=self.world.device
        )
        dist.all_reduce(targets, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(losses, group=self.world.pp_group)
        for router in routers:  # the sum over tokens is divided by all targets in the end
            router.load_weight = self.policy.config.moe_aux_loss_coeff * (int(targets) + idle_targets)
        try:
            yield float(losses) / self.policy.config.num_layers
        finally:
            for router in routers:
                router.load = None

    def _count_load(self, rows: Sequence[PackedRow], routers: Sequence[Router]) -> None:
        """Which experts the tokens of the global batch choose, into each router's `load`."""
        for router in routers:
            router.load = ExpertLoad(router.num_experts, router.topk, self.world.device)
            router.counting = True
        self.gather()
        self.policy.eval()
        self._run([row.without_targets() for row in rows], _log_probs_of_row, forward_only=True)
        for router in routers:
            assert router.load is not None
            router.load.reduce(router.tp_dp_cp_group)
            router.counting = False

    @span("log_probs")
    def log_probs(self, samples: Sequence[TrainSample], *, branching: bool) -> list[NDArray[np.float32]]:
        """Log-prob of every trained token under the current weights, NaN elsewhere; on every rank, in input order."""
        self.gather()
        rows = self.pack(samples, branching=branching).rows
        self.policy.eval()
        outputs = self._run(rows, _log_probs_of_row, forward_only=True)
        found: list[tuple[Tensor, Tensor, Tensor]] = [
            (row.sample_of, row.within, output["log_probs"].cpu())
            for row, output in zip(rows, outputs, strict=False)
        ]
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, found if self.world.tp_rank == 0 else [])
        result = [np.full(len(sample.response_ids), np.nan, np.float32) for sample in samples]
        for sample_of, within, values in (part for parts in gathered for part in parts):
            for index, position, value in zip(
                sample_of.tolist(), within.tolist(), values.tolist(), strict=True
            ):
                result[index][position] = value
        return result

    def _run(
        self, rows: Sequence[PackedRow], loss_of: Callable[[Tensor, PackedRow], Any], *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        world, length = self.world, rows[0].token_ids.shape[1]
        own_tokens = shard_bounds(length, world.cp_rank, world.cp_size)
        schedule = get_forward_backward_func()
        with megatron_context(), torch.set_grad_enabled(not forward_only):
            outputs: list[dict[str, Tensor]] = schedule(
                forward_step_func=partial(
                    _forward_step, loss_of=loss_of, own_tokens=own_tokens, device=world.device
                ),
                data_iterator=[iter(rows) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(rows),
                seq_length=length,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return outputs

    def _global_sums(self, rows: Sequence[PackedRow], outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum the last stage's outputs over micro-batches and data-parallel ranks; the same on every rank."""
        sums: dict[str, float] = {}
        if self.world.is_last_stage and self.world.tp_rank == 0:
            for output in outputs:
                combine(sums, {name: float(value) for name, value in output.items()})
            if self.world.cp_rank == 0:
                sums["tokens"] = float(sum(row.num_real_tokens for row in rows))
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, sums)
        totals: dict[str, float] = {}
        for part in gathered:
            combine(totals, part)
        return totals


def _forward_step(
    rows: Iterator[PackedRow],
    model: torch.nn.Module,
    *,
    loss_of: Callable[[Tensor, PackedRow], Any],
    own_tokens: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's forward step: every stage reads the row, since each needs the layout."""
    row = next(rows)
    token_ids, layout = row.token_ids.to(device), row.layout.to(device)
    own = slice(*own_tokens)
    output = model(
        token_ids[:, own],
        layout[:1, own],
        layout,
        labels=token_ids,
        loss_mask=row.targets.to(device),
        padding_mask=~row.in_response.to(device)[None, own],
    )
    return output, lambda figures: loss_of(figures, row)


def _loss_of_row(
    figures: Tensor,
    row: PackedRow,
    objective: Objective,
    entropy_coefficient: float | None,
    idle_row: PackedRow | None,
    idle_targets: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`figures`: log-probs [1, M], with the entropy [2, M]."""
    log_probs = figures[0]
    loss = objective(log_probs, row)
    if entropy_coefficient is not None:
        loss = with_entropy(loss, figures[1], entropy_coefficient)
    idle = torch.tensor(idle_targets if row is idle_row else 0, dtype=torch.int, device=figures.device)
    count = row.num_targets + idle
    report = {
        "loss": loss.total.detach(),
        "targets": count.double(),
        "idle": idle.double(),
        **{MEAN + name: value for name, value in loss.metrics.items()},
        **agreement_sums(log_probs, row.old_log_probs.to(log_probs), row.segments.to(log_probs.device)),
    }
    return loss.total, count, report


def _log_probs_of_row(figures: Tensor, row: PackedRow) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    log_probs = figures[0]
    count = torch.tensor(row.num_targets, dtype=torch.int, device=log_probs.device)
    return log_probs.sum(), count, {"log_probs": log_probs.detach()}
