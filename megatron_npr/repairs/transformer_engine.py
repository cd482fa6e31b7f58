"""What Transformer Engine's layers put into a checkpoint: tensors, never a pickle.

Only delayed scaling has a state: a scale and a history of largest values for each tensor that is rounded. Transformer Engine
pickles it as "extra state"; 2.20 refuses to read that back, older versions run whatever it says, and Megatron-Core 0.16.1,
which has to split it by expert, fails to save any recipe without a state. Here the extra state is one tensor:

    [1 + history, quantisers]: the scales, then the histories; quantisers = 3 of forward, then 2 of backward, for each GEMM

empty where there is nothing to keep. The largest values are reduced over all ranks that share a weight, so the state is the
same on each of them, and another layout may read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as engine_layers
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from megatron_npr.repairs.repair import Repair

FORWARD, BACKWARD = 3, 2
"""Quantisers of a GEMM: input, weight, output; gradient of the output, gradient of the input."""


def with_tensor_state(layer: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A layer class of Transformer Engine whose extra state is a tensor; the class itself where that is not installed."""
    if not engine_layers.HAVE_TE:
        return layer
    grouped = engine_layers.TEGroupedLinear  # None before Transformer Engine 1.9
    mixin = GroupedTensorState if grouped is not None and issubclass(layer, grouped) else TensorState
    return type(layer.__name__, (mixin, layer), {})


class TensorState(torch.nn.Module):
    """Mixin before a layer of Transformer Engine, as Megatron wraps it."""

    fp8_meta: dict[str, Any]
    config: Any
    num_gemms: int = 1
    init_fp8_metadata: Callable[..., None]

    def get_extra_state(self) -> Tensor:
        """[1 + history, quantisers] fp32 in host memory; [0] without a state."""
        if not self._is_delayed or "scaling_fwd" not in self.fp8_meta:
            return torch.empty(0)
        both = (self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"])
        return torch.cat([torch.cat([one.scale[None], one.amax_history]) for one in both], dim=1).cpu()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Go on with a state; passed over where there is none or this run's recipe has no use for it."""
        if state is None or state.numel() == 0 or not self._is_delayed:
            return
        with torch.no_grad(), get_fp8_context(self.config):
            self.init_fp8_metadata(num_gemms=self.num_gemms)
        for name, part in zip(("scaling_fwd", "scaling_bwd"), self._by_direction(state), strict=True):
            self.fp8_meta[name].scale.copy_(part[0])
            self.fp8_meta[name].amax_history.copy_(part[1:])

    def _by_direction(self, state: Tensor) -> tuple[Tensor, ...]:
        """The columns of forward and of backward."""
        return state.split([FORWARD * self.num_gemms, BACKWARD * self.num_gemms], dim=1)

    @property
    def _is_delayed(self) -> bool:
        return bool(self.config.fp8) and self.config.fp8_recipe == "delayed"


class GroupedTensorState(TensorState):
    """Mixin before a grouped layer, the experts of a rank: a checkpoint holds the state of each expert for itself."""

    def _split_extra_state(self, state: Tensor) -> list[Tensor]:
        """Megatron asks for the state of every expert: [1 + history, 5] each."""
        if state.numel() == 0:
            return [state] * self.num_gemms
        forward, backward = self._by_direction(state)
        pairs = zip(forward.split(FORWARD, dim=1), backward.split(BACKWARD, dim=1), strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Joined here, before Megatron's hook looks for states of experts to unpickle.
        key = f"{prefix}_extra_state"
        keys = [f"{key}{number or ''}" for number in range(self.num_gemms)]
        if key in state_dict:
            states = [state_dict.pop(each) for each in keys]
            state_dict[key] = _joined(states)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _joined(states: list[Tensor | None]) -> Tensor:
    """The state of a rank's experts out of each one's; empty where one is missing (another recipe, other layers saved it)."""
    found = [state for state in states if state is not None and state.numel()]
    if len(found) < len(states):
        return torch.empty(0)
    return torch.cat([state[:, :FORWARD] for state in found] + [state[:, FORWARD:] for state in found], dim=1)


_ENGINE = "transformer-engine[pytorch]==2.20.2"
_MODULE = "transformer_engine.pytorch.module.base:TransformerEngineBaseModule"
REPAIRS = (
    Repair(
        f"{_MODULE}.get_extra_state",
        _ENGINE,
        "it pickles the state of delayed scaling",
        "it gives tensors",
        "`transformer_engine.TensorState`, a mixin of our layers",
    ),
    Repair(
        f"{_MODULE}.set_extra_state",
        _ENGINE,
        "it refuses to unpickle it; older versions run whatever it says",
        "it takes tensors",
        "`transformer_engine.TensorState`, a mixin of our layers",
    ),
    Repair(
        "megatron.core.extensions.transformer_engine:TEGroupedLinear._split_extra_state",
        "megatron-core==0.16.1",
        "states of experts cannot be saved for a recipe that has none",
        "it splits an empty state",
        "`transformer_engine.GroupedTensorState`, a mixin of our layers",
    ),
    Repair(
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.amax",
        _ENGINE,
        "random numbers that a weight was made with stay in the history of largest values",
        "it begins its history with the first forward pass",
        "`model/fp8_parameters.py`: `fill`",
    ),
)
