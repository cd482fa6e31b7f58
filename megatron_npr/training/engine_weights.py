"""Trainer weights -> engine weights on this rank: aliases where the layouts agree, the planned exchange where they do not.

Policy.layout, EngineLayout ──► plan ──► EngineWeights.tensors (the trainer's own storage where nothing has to move)
                                    └──► update() after an optimizer step: a new version, all of it or nothing
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from megatron_npr.model.fp8_parameters import PlainWeights, in_fp8
from megatron_npr.model.policy import Policy
from megatron_npr.model.policy_weights import local_weights
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.weight_sync.exchange import Exchanged, WeightExchange
from megatron_npr.weight_sync.plan import Plan, plan
from npr_engine.model.linear import Weight

EXPORT_ELEMENTS = 1 << 28
"""Elements that an export gathers at a time on every rank's device."""


class EngineWeights:
    """The engine's view of the policy's weights on this rank; made after the optimizer, which moves parameters into its
    buffers. Collective over the world."""

    def __init__(self, policy: Policy, engine: EngineLayout, *, fp8: bool = False) -> None:
        """`fp8`: the engine decodes in FP8; projections that have to move then travel and arrive so."""
        weights = local_weights(policy)
        self._sources = PlainWeights(weights)
        self._exchange = WeightExchange(
            plan(policy.model_config, policy.layout, engine),
            self._sources,
            fp8=fp8,
            in_place=not in_fp8(weights),  # those are read as plain numbers
        )
        self.tensors: dict[str, Weight] = {**self._exchange.tensors, **self._exchange.fp8}
        self._exchange.update(0)

    @property
    def version(self) -> int:
        return self._exchange.version

    def update(self) -> Exchanged:
        """Bring the engine's weights to the trainer's; a new version. Collective over the world.

        Raises:
            WeightUpdateError: the update broke off or arrived damaged; weights and version are the old ones.
        """
        self._sources.forget()
        return self._exchange.update(self.version + 1)


def full_weights(policy: Policy) -> dict[str, Tensor]:
    """Copies of the full (unsharded) weights on the CPU of every rank, some layers at a time; collective over the world."""
    planned = plan(policy.model_config, policy.layout, EngineLayout())
    sources = PlainWeights(local_weights(policy))
    gathered: dict[str, Tensor] = {}
    for part in _parts(planned, EXPORT_ELEMENTS):
        exchange = WeightExchange(part, sources)
        exchange.update(1)
        gathered |= {name: weight.detach().cpu().clone() for name, weight in exchange.tensors.items()}
    return gathered


def _parts(planned: Plan, elements: int) -> list[Plan]:
    """The plan in runs of whole weights of about `elements`, more where one weight has more."""
    routes = planned.routes
    volume = np.bincount(routes["tensor"], weights=routes["rows"] * routes["row_length"])
    part_of = ((np.cumsum(volume) - volume) // elements).astype(np.int64)
    return [replace(planned, routes=routes[part_of[routes["tensor"]] == part]) for part in np.unique(part_of)]
