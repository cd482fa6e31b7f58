"""Which linear layers, Adam and gradient accumulation a run has: Transformer Engine's or apex's where they are installed.

device, FP8 or not ──► linear_modules ──► layer spec     (the same parameter names always, so checkpoints do not know)
FP8 settings ──► require_fp8 ──► fp8_options ──► Megatron's TransformerConfig
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine as engine_layers
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_te_version
from torch import Tensor

from megatron_npr.config import Fp8Settings
from megatron_npr.model.fp8_linears import Fp8ColumnParallelLinear, Fp8RowParallelLinear, LinearConfig
from megatron_npr.repairs.transformer_engine import with_tensor_state
from npr_ext.errors import UserError
from npr_ext.ops import differentiable
from npr_ext.ops.scaled_mm import ALIGNMENT


def mark_sequence_parallel(weight: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Megatron all-reduces the gradient of weights so marked over the tensor group (each rank saw a part of the tokens)."""
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm then ColumnParallelLinear, with Transformer Engine's names (`layer_norm_weight`, `weight`, `bias`)."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.layer_norm_weight, config)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = differentiable.rms_norm(hidden, self.layer_norm_weight, self.config.layernorm_epsilon)
        output: tuple[Tensor, Tensor | None] = super().forward(normed, *args, **kwargs)
        return output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Weight and bias are sharded on dim 0, the norm is replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata else None,
        )


class Fp8NormColumnParallelLinear(NormColumnParallelLinear, Fp8ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear whose product is in FP8."""


class SwiGLU(MegatronModule):
    """[..., 2F] -> [..., F], Megatron's activation between the projections of an MLP (Shazeer 2020)."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return differentiable.silu_mul(gate_up)


@dataclass(frozen=True)
class LinearModules:
    """Classes of the layers' projections. `norm_column` has the RMSNorm before it; `grouped` are the column and row projections
    of all local experts at once, where the library has such; `activation` is SwiGLU in one module, else Megatron's own."""

    library: str
    norm_column: type[torch.nn.Module]
    column: type[torch.nn.Module]
    row: type[torch.nn.Module]
    grouped: tuple[type[torch.nn.Module], type[torch.nn.Module]] | None = None
    activation: type[torch.nn.Module] | None = None


OWN = LinearModules(
    "Megatron-Core", NormColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, activation=SwiGLU
)
SCALED_MM = LinearModules(
    "Megatron-Core, FP8 by torch._scaled_mm",
    Fp8NormColumnParallelLinear,
    Fp8ColumnParallelLinear,
    Fp8RowParallelLinear,
    activation=SwiGLU,
)
TRANSFORMER_ENGINE = LinearModules(
    "Transformer Engine",
    with_tensor_state(engine_layers.TELayerNormColumnParallelLinear),
    with_tensor_state(engine_layers.TEColumnParallelLinear),
    with_tensor_state(engine_layers.TERowParallelLinear),
    (
        with_tensor_state(engine_layers.TEColumnParallelGroupedLinear),
        with_tensor_state(engine_layers.TERowParallelGroupedLinear),
    )
    if engine_layers.TEColumnParallelGroupedLinear is not None  # by Megatron from Transformer Engine 1.9 on
    else None,
)


def linear_modules(device: torch.device, *, fp8: bool = False) -> LinearModules:
    """Transformer Engine's on a GPU where it is installed, Megatron's elsewhere; with `fp8` those whose products are FP8."""
    if device.type == "cuda" and engine_layers.HAVE_TE:
        return TRANSFORMER_ENGINE
    return SCALED_MM if fp8 else OWN


def layer_linears(linears: LinearModules, config: TransformerConfig, layer: int) -> LinearModules:
    """Those of one layer of the model: it may be one that stays in bf16. Transformer Engine is told so at each pass."""
    return OWN if linears is SCALED_MM and is_first_last_bf16_layer(config, layer) else linears


def fuses_gradients(device: torch.device) -> bool:
    """Whether weight gradients are added to the fp32 buffer by the GEMM itself (apex's fused_weight_gradient_mlp_cuda)."""
    return device.type == "cuda" and bool(megatron_layers._grad_accum_fusion_available)


def describe(device: torch.device, *, fp8: bool = False) -> str:
    """One line: whose linear layers, Adam and gradient accumulation run on this device."""
    adam = megatron_optimizer.Adam.__module__.split(".")[0]
    fused = {"transformer_engine": "Transformer Engine, fused", "apex": "apex, fused"}.get(adam, adam)
    accumulation = "in the GEMM (apex)" if fuses_gradients(device) else "after the GEMM"
    library = linear_modules(device, fp8=fp8).library
    return f"linear layers: {library}; Adam: {fused}; gradient accumulation: {accumulation}"


_SMALLEST_GPU = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}


def fp8_obstacle(
    recipe: str, device: str, capability: tuple[int, int] | None, engine_version: str | None
) -> str | None:
    """Why FP8 training cannot run, None if it can. `capability` is None where `device` is no GPU."""
    needed = _SMALLEST_GPU[recipe]
    obstacles = []
    if capability is None or capability < needed:
        compute = f"has compute capability {'.'.join(map(str, capability))}" if capability else "is no GPU"
        package = " (with the package transformer-engine, extra gpu, or with torch alone)"
        alternative = package if recipe == "tensorwise" else ""
        obstacles.append(
            f"{device} {compute}, recipe {recipe} needs {'.'.join(map(str, needed))}{alternative}"
        )
    if engine_version is None and recipe != "tensorwise":
        obstacles.append(_recipe_needs_engine(recipe))
    return "; ".join(obstacles) or None


def _recipe_needs_engine(recipe: str) -> str:
    return _needs_engine(f"fp8.recipe = '{recipe}'", otherwise="choose fp8.recipe = 'tensorwise'")


def _needs_engine(setting: str, *, otherwise: str) -> str:
    return f"{setting} needs the package transformer-engine, which is not installed: install it (extra gpu) or {otherwise}"


def transformer_engine_version() -> str | None:
    """None where it is not installed."""
    return str(get_te_version()) if engine_layers.HAVE_TE else None


def require_fp8(device: torch.device, recipe: str = "tensorwise") -> None:
    """UserError where FP8 training cannot run on this device, with device and package."""
    gpu = device.type == "cuda"
    obstacle = fp8_obstacle(
        recipe,
        torch.cuda.get_device_name(device) if gpu else "cpu",
        torch.cuda.get_device_capability(device) if gpu else None,
        transformer_engine_version(),
    )
    if obstacle is not None:
        raise UserError(f"model.dtype = 'fp8' cannot run here: {obstacle}; use bf16")


def fp8_options(
    settings: Fp8Settings, linears: LinearModules, *, num_layers: int, stages: int
) -> dict[str, Any]:
    """What these linear layers want in the configuration for FP8 training. UserError for a recipe that they do not have, and
    where the layers kept in bf16 do not lie in one pipeline stage each."""
    assert linears is not OWN, "their products are not FP8"
    if linears is SCALED_MM and settings.recipe != "tensorwise":
        raise UserError(_recipe_needs_engine(settings.recipe))
    if linears is SCALED_MM and settings.parameters:
        raise UserError(_needs_engine("fp8.parameters = true", otherwise="set it to false"))
    for end in ("first", "last"):
        count = settings.model_dump()[f"{end}_layers_bf16"]
        if count > num_layers // stages:
            raise UserError(
                f"fp8.{end}_layers_bf16 = {count} is more than the {num_layers // stages} layers of a pipeline stage"
            )
    ends: dict[str, Any] = {
        "first_last_layers_bf16": settings.first_layers_bf16 + settings.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": settings.first_layers_bf16,
        "num_layers_at_end_in_bf16": settings.last_layers_bf16,
    }
    if linears is SCALED_MM:
        return ends | {"scaled_mm": settings.format}
    return ends | {
        "fp8": settings.format,
        "fp8_recipe": settings.recipe,
        "fp8_param": settings.parameters,
        # The history of Transformer Engine's own recipe; the other recipes look at the tensor at hand.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


def token_multiple(config: LinearConfig) -> int:
    """What the length of a row has to be a multiple of, so that ranks have equal shares of it, which suit the GEMMs."""
    shares = config.context_parallel_size * (
        config.tensor_model_parallel_size if config.sequence_parallel else 1
    )
    return shares * (ALIGNMENT if config.fp8 or config.scaled_mm else 1)
