"""What a job asks of its machines: the layout of processes and the work of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, split_layers
from npr_ext.errors import UserError

Recompute = Literal["none", "selective", "full"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]
Modules = Literal["cpu", "torch", "transformer engine"]
"""Whose modules make up a layer: our own on the CPU, our own on a GPU, Transformer Engine's there."""


@dataclass(frozen=True)
class Layout:
    """Sizes along each axis, and the engine's.

    first_layers, last_layers: decoder layers of the outer pipeline stages where the split is uneven; None: even.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    first_layers: int | None = None
    last_layers: int | None = None
    engine_tp: int = 1
    engine_ep: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def engine(self, architecture: Architecture) -> EngineLayout:
        """An engine replica; UserError where it does not fit the model."""
        return EngineLayout.of(architecture, self.engine_tp, self.engine_ep)

    def trainer(self, architecture: Architecture) -> TrainerLayout:
        """The grid; UserError where layers or experts do not fit it."""
        layers = split_layers(
            architecture.num_layers, pp=self.pp, vpp=self.vpp, first=self.first_layers, last=self.last_layers
        )
        return TrainerLayout(layers, tp=self.tp, pp=self.pp, dp_cp=self.cp * self.dp, ep=self.ep)

    def __str__(self) -> str:
        uneven = ""
        if self.first_layers is not None or self.last_layers is not None:
            uneven = f" (first {self.first_layers}, last {self.last_layers} layers)"
        engine = f"engine TP{self.engine_tp}" + (f" x EP{self.engine_ep}" if self.engine_ep > 1 else "")
        sequence = " + SP" if self.sequence_parallel else ""
        return (
            f"TP{self.tp}{sequence} x PP{self.pp}{uneven} x VPP{self.vpp} x CP{self.cp} x EP{self.ep} x DP{self.dp}, "
            f"{engine}"
        )


@dataclass(frozen=True)
class Workload:
    """One step of a stage.

    Attributes:
        bytes_per_weight: 2 for bf16, 4 for fp32.
        modules: what is kept for the backward pass depends on them.
        fp8: the recipe by which what the projections multiply is rounded; None: it is not.
        fp8_parameters: the model's projections are FP8 themselves.
        row_tokens: tokens of a micro-batch.
        responses: of one step (SFT: samples); response_tokens: their mean length.
        speedup: tokens of a response over its critical path.
        kv_slots: token slots of an engine's KV cache; 0 where nothing is decoded.
        max_running_requests: responses that one engine decodes at once.
        max_branches: of one response at once; 1 where it does not branch.
        batch_tokens: tokens of one engine step at most, prefill and decode.
    """

    bytes_per_weight: int = 2
    modules: Modules = "transformer engine"
    fp8: Fp8Recipe | None = None
    fp8_parameters: bool = False
    recompute: Recompute = "none"
    row_tokens: int = 32_768
    responses: int = 256
    response_tokens: int = 8192
    speedup: float = 1.5
    kv_slots: int = 524_288
    max_running_requests: int = 256
    max_branches: int = 8
    batch_tokens: int = 16_384

    @property
    def max_running_branches(self) -> int:
        """Branches that one engine decodes at once, at most: each of them is a row of logits."""
        return min(self.max_running_requests * self.max_branches, self.batch_tokens)


def check_job(architecture: Architecture, layout: Layout, world_size: int) -> None:
    """UserError with one line where the layout fits neither the world nor the model."""
    if layout.world_size != world_size:
        raise UserError(
            f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} does not divide a world of {world_size} GPUs"
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise UserError(f"vpp {layout.vpp} needs pp >= 2")
    if architecture.num_experts and layout.tp > 1 and not layout.sequence_parallel:
        raise UserError(
            "experts under tp > 1 need sequence_parallel = true: Megatron dispatches sharded tokens"
        )
