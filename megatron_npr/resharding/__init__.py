"""Weights from any training layout into any engine layout: planned over metadata alone, then executed.

Architecture, TrainerLayout, EngineLayout ──► plan ──► Plan (arrays of one replica) ──► for_replica ──► flat slices
"""

from megatron_npr.resharding.layouts import EngineLayout, TrainerLayout, split_layers
from megatron_npr.resharding.plan import TRANSFER, Plan, ReplicaPlan, for_replica, plan

__all__ = [
    "TRANSFER",
    "EngineLayout",
    "Plan",
    "ReplicaPlan",
    "TrainerLayout",
    "for_replica",
    "plan",
    "split_layers",
]
