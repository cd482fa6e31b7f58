"""Computations over tensors that stay where they are, recorded once and run again: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Recording: TypeAlias = tuple[Callable[[], None], Tensor]
"""(runs the computation again, where its result comes)."""

Recorder: TypeAlias = Callable[[Callable[[], Tensor]], Recording]


class CudaGraphs:
    """Records graphs that run one at a time: they share one pool of memory, all but their results."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and lets libraries take their workspace
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (a checkpoint's writer, NCCL's watchdog) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result
