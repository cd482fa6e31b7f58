"""`npr plan`: a layout for a model on a cluster, memory per GPU by part, and time per phase; pure functions, no torch.

Architecture, Cluster, Workload ──► search ──► Layout ──► memory (parts) and times (phases) ──► text or JSON
"""

from megatron_npr.planning.cluster import CLUSTER_GPUS, Cluster, Gpu
from megatron_npr.planning.job import Layout, Modules, Workload
from megatron_npr.planning.memory import Memory, memory_of
from megatron_npr.planning.search import JobPlan, best, evaluate
from megatron_npr.planning.times import Times, times_of

__all__ = [
    "CLUSTER_GPUS",
    "Cluster",
    "Gpu",
    "JobPlan",
    "Layout",
    "Memory",
    "Modules",
    "Times",
    "Workload",
    "best",
    "evaluate",
    "memory_of",
    "times_of",
]
