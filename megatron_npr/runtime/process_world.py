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

from megatron_npr.runtime.cpu_runtime import cpu_runtime
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
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    virtual_size: int
    expert_rank: int
    expert_size: int
    data_rank: int
    data_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def check_sizes(world_size: int, *, tensor: int, pipeline: int, context: int, expert: int = 1) -> None:
    """UserError unless tensor x pipeline x context divides the world, and expert the ranks of a pipeline stage."""
    model_size = tensor * pipeline * context
    if world_size % model_size:
        raise UserError(
            f"world size {world_size} does not fit tp {tensor} x pp {pipeline} x cp {context} = {model_size}: "
            f"start a multiple of {model_size} processes (torchrun --nproc-per-node) or change parallel.*"
        )
    if world_size // pipeline % expert:
        raise UserError(
            f"parallel.ep {expert} does not divide the {world_size // pipeline} ranks of a pipeline stage: "
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


def init_world(
    *, tensor: int = 1, pipeline: int = 1, context: int = 1, virtual: int = 1, expert: int = 1, seed: int = 0
) -> World:
    """Join the process group and build Megatron's groups."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_sizes(world_size, tensor=tensor, pipeline=pipeline, context=context, expert=expert)
    join_world()
    with megatron_context():
        if not _has_groups(tensor, pipeline, context, virtual, expert):
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=has_gpu(),
            )
        model_parallel_cuda_manual_seed(1 + seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context,
        virtual_size=virtual,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=expert,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu"),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
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
    *, tensor: int = 1, pipeline: int = 1, context: int = 1, virtual: int = 1, expert: int = 1, seed: int = 0
) -> Iterator[World]:
    """`init_world` for the length of a with-block."""
    try:
        yield init_world(
            tensor=tensor, pipeline=pipeline, context=context, virtual=virtual, expert=expert, seed=seed
        )
    finally:
        close_world()
