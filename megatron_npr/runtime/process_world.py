"""The process world: one process a device, Megatron's process groups on top, gloo on CPU and NCCL on GPU.

torchrun / srun ──► init_world(sizes) ──► World (ranks, sizes, groups) ──► everything else takes it as an argument
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from megatron_npr.repairs.megatron_on_cpu import cpu_runtime
from npr_ext.errors import UserError

T = TypeVar("T")


def has_gpu() -> bool:
    """True where this process trains on a CUDA device."""
    return torch.cuda.is_available()


def megatron_context() -> AbstractContextManager[None]:
    """Entered around every call into Megatron-Core: the CPU runtime where there is no GPU, nothing where there is."""
    return contextlib.nullcontext() if has_gpu() else cpu_runtime()


@dataclass(frozen=True)
class World:
    """Ranks and sizes along each axis of the process grid, and the groups that we use ourselves."""

    rank: int
    size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    vpp_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def check_sizes(world_size: int, *, tp: int, pp: int, cp: int, ep: int = 1) -> None:
    """UserError unless tp x pp x cp divides the world, and ep the ranks of a pipeline stage."""
    model_size = tp * pp * cp
    if world_size % model_size:
        raise UserError(
            f"world size {world_size} does not fit tp {tp} x pp {pp} x cp {cp} = {model_size}: "
            f"start a multiple of {model_size} processes (torchrun --nproc-per-node) or change parallel.*"
        )
    if world_size // pp % ep:
        raise UserError(
            f"parallel.ep {ep} does not divide the {world_size // pp} ranks of a pipeline stage: "
            "choose a divisor"
        )


def _has_groups(*sizes: int) -> bool:
    """Whether Megatron's groups of this layout stand already; groups are never freed, so they are not made twice."""
    return parallel_state.model_parallel_is_initialized() and sizes == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_expert_model_parallel_world_size(),
    )


def init_world(*, tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 1, ep: int = 1, seed: int = 0) -> World:
    """Join the process group and build Megatron's groups."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_sizes(world_size, tp=tp, pp=pp, cp=cp, ep=ep)
    join_world()
    with megatron_context():
        if not _has_groups(tp, pp, cp, vpp, ep):
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=has_gpu(),
            )
        model_parallel_cuda_manual_seed(1 + seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cp,
        vpp_size=vpp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=ep,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu"),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def join_world() -> None:
    """Join the process group where that has not been done: torchrun's environment, or a world of one."""
    if dist.is_initialized():
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    atexit.register(close_world)
    timeout = datetime.timedelta(minutes=30)
    backend = "nccl" if has_gpu() else "gloo"
    if has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        # A store in memory: no port or file on which several single-process runs could collide.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def on_first_rank(world: World, decide: Callable[[], T]) -> T:
    """What rank 0 decides, the same on every rank: its answer, or its UserError; collective."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome)
    answer, refusal = outcome
    if refusal is not None:
        raise refusal
    return cast(T, answer)


def on_every_rank(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, where it does on all; else the first rank's UserError on every rank; collective.

    For what each rank reads by itself: one that refused alone would leave the others waiting for it, and its line unsaid.
    """
    answer, refusal = None, None
    try:
        answer = work()
    except UserError as error:
        refusal = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        refusals: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(refusals, refusal)
        refusal = next((line for line in refusals if line is not None), None)
    if refusal is not None:
        raise UserError(refusal)
    return cast(T, answer)


def close_world() -> None:
    """Leave Megatron's groups and the process group."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def world_of(
    *, tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 1, ep: int = 1, seed: int = 0
) -> Iterator[World]:
    """`init_world` for the length of a with-block."""
    try:
        yield init_world(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, seed=seed)
    finally:
        close_world()
