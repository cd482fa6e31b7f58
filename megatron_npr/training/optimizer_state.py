"""What a checkpoint needs around the state of Megatron's distributed optimizer: state to fill, settings kept, parts regrouped.

Megatron's own methods are replaced in `repairs/megatron_core.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer import MegatronOptimizer


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
