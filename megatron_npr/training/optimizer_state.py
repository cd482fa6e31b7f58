"""Repairs of Megatron-Core 0.16.1's distributed-optimizer state, without which a resumed run silently differs.

Both are entered around save and load only, and restore Megatron's own methods on exit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@contextlib.contextmanager
def repaired_optimizer_state() -> Iterator[None]:
    """Within this context `fully_reshardable` saves and loads the state of every parameter exactly."""
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    gather_states = DistributedOptimizer.get_parameter_state_dp_zero

    def set_with_own_step(
        self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        # torch's AdamW (no apex, no TE) keeps a `step` tensor for each parameter. Megatron saves it once, then looks for it
        # among the loaded tensors (KeyError), and hands ONE tensor to all parameters, which then counts each of them.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    def gather_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The gathered buckets are joined without their end padding, then cut by offsets that include it: with more than one
        # bucket (a tied embedding under pipeline parallelism has its own) and a padded one, states land on other parameters.
        state = gather_states(self, *args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(self.buffers):
                for tensors in state[index].values():
                    for name in ("param", "exp_avg", "exp_avg_sq"):
                        if name in tensors:
                            tensors[name] = _padded(tensors[name], buffer)
        return state

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_own_step
    DistributedOptimizer.get_parameter_state_dp_zero = gather_with_padding
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = set_states
        DistributedOptimizer.get_parameter_state_dp_zero = gather_states


@contextlib.contextmanager
def own_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """What is loaded within this context brings moments and step counts; betas, eps, rates and the like stay as they are.

    A state dict holds the settings of its time, in groups, and Megatron's and torch's loaders take those over.
    """
    before = [dict(group) for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", "step")})


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped yet its (zero) state: Megatron can neither save nor load without one."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner.state:
            continue
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0  # no weight decay either: the parameters stay as they are
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in inner.state.values():
            if "step" in state:
                state["step"].zero_()


def regrouped_state(loaded: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """A loaded optimizer state for as many optimizers as this layout has.

    Experts are in an optimizer of their own where their gradients have a group of their own (under expert or tensor
    parallelism), else in the common one. Their tensors are found by name either way; steps and groups are saved an optimizer,
    and are the same for both.
    """
    parts = optimizer.chained_optimizers
    saved = [loaded[key] for key in (0, 1) if "optimizer" in loaded.get(key, {})] or [loaded]
    if len(saved) == len(parts):
        return loaded
    made = {}
    for number, part in enumerate(parts):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = saved[0]["optimizer"]["param_groups"][0]["step"]
        tensors = loaded if len(parts) == 1 else loaded[number]
        kept = {"param_state_sharding_type": saved[0]["param_state_sharding_type"]}
        made[number] = state | kept | {"param_state": tensors["param_state"]}
    return made[0] if len(parts) == 1 else made


def _padded(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Unpadded buckets end to end -> each at its own offset of the buffer."""
    padded = joined.new_zeros(buffer.numel)
    offset = 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        padded[start : start + bucket.numel_unpadded] = joined[offset : offset + bucket.numel_unpadded]
        offset += bucket.numel_unpadded
    return padded
