"""Seconds per phase of a step, by the resource that bounds it; the shares of peak that are reached are assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_npr.planning.cluster import Cluster
from megatron_npr.planning.job import Layout, Workload
from megatron_npr.planning.memory import (
    GRADIENT_BYTES,
    engine_parameters,
    kv_bytes_per_token,
    parameters_of,
)
from megatron_npr.sharding.architecture import Architecture
from megatron_npr.weight_sync.plan import for_replica, plan

MFU = 0.40  # model FLOPs over peak in training, tensor parallelism within a node
DECODE_SHARE = 0.65  # of memory bandwidth
NETWORK_SHARE = 0.7
STEP_OVERHEAD = 1.5e-3  # seconds of an engine step that are neither weights nor KV, all-reduces included
EXCHANGE_LATENCY = 40e-6  # seconds of one small all-to-all
VISIBLE = 0.6  # pairs that a branching response sees, of the causal ones


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    rollout: float
    train: float
    weight_sync: float

    @property
    def total(self) -> float:
        return self.rollout + self.train + self.weight_sync


def times_of(architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> Times:
    """All phases; the bytes of the weight sync come from the planner itself."""
    decodes = work.kv_slots > 0
    return Times(
        rollout=rollout_seconds(architecture, layout, cluster, work) if decodes else 0.0,
        train=train_seconds(architecture, layout, cluster, work),
        weight_sync=weight_sync_seconds(architecture, layout, cluster, work) if decodes else 0.0,
    )


def rollout_seconds(architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> float:
    """By bandwidth: every engine step reads the weights that its tokens meet; every token reads the KV before it. Each copy of
    attention decodes its own responses; experts meet the tokens of all copies that share them."""
    copies = max(cluster.size // layout.engine_tp, 1)
    responses = math.ceil(work.responses / copies)
    fitting = max(work.kv_slots // work.response_tokens, 1)
    together = max(min(responses, fitting, work.max_running_requests), 1)
    waves = math.ceil(responses / together)
    steps = waves * work.response_tokens / work.speedup
    tokens_a_step = together * work.speedup
    held = engine_parameters(architecture, layout)
    if architecture.num_experts:
        experts = architecture.num_layers * architecture.num_experts * architecture.expert_parameters
        met = tokens_a_step * layout.engine(architecture).size / layout.engine_tp
        share = 1 - (1 - architecture.experts_per_token / architecture.num_experts) ** met
        held -= round((1 - share) * experts / layout.engine_ep)
    per_token = kv_bytes_per_token(architecture, layout.engine_tp, work.bytes_per_weight)
    kv_bytes = responses * work.response_tokens * work.response_tokens / 2 * per_token
    read = steps * held * work.bytes_per_weight + kv_bytes
    exchange = _exchange_seconds(architecture, layout, cluster, work, tokens_a_step)
    return read / (DECODE_SHARE * cluster.gpu.bandwidth) + steps * (STEP_OVERHEAD + exchange)


def _exchange_seconds(
    architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload, tokens: float
) -> float:
    """Seconds that one engine step sends rows for, where experts lie on more ranks than attention: in every layer the counts,
    the rows, and back."""
    span = layout.engine(architecture).size
    if span == layout.engine_tp:
        return 0.0
    pairs = tokens / layout.engine_tp * architecture.experts_per_token * (span - 1) / span
    rows = 2 * pairs * architecture.hidden_size * work.bytes_per_weight / _wire(span, cluster)
    return architecture.num_layers * (rows + 3 * EXCHANGE_LATENCY)


def train_flops(architecture: Architecture, work: Workload) -> float:
    """Model FLOPs of a step whose tokens are all trained."""
    tokens = work.responses * work.response_tokens
    pairs = VISIBLE * tokens * work.response_tokens / 2
    return model_flops(architecture, tokens=tokens, targets=tokens, pairs=pairs)


def model_flops(architecture: Architecture, *, tokens: float, targets: float, pairs: float) -> float:
    """FLOPs of forward and backward: 6 a parameter and token (of the output matrix: and trained token), and 12 a visible
    pair, head dim and head. What is recomputed does not count."""
    layers = architecture.active_parameters - architecture.embedding_parameters
    attention = 12.0 * architecture.num_layers * architecture.num_heads * architecture.head_dim * pairs
    return 6.0 * (layers * tokens + architecture.embedding_parameters * targets) + attention


def train_seconds(architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> float:
    """By FLOPs: recompute adds a forward pass, pipelines their bubble, groups wider than a node their network."""
    extra = {"none": 1.0, "selective": 1.2, "full": 4 / 3}[work.recompute]
    rows = max(math.ceil(work.responses * work.response_tokens / work.row_tokens / layout.dp), 1)
    bubble = (layout.pp - 1) / (layout.vpp * rows)
    compute = (
        train_flops(architecture, work) * extra / (MFU * cluster.gpu.flops * cluster.size) * (1 + bubble)
    )
    communication = _communication(architecture, layout, cluster, work, rows)
    return compute + communication + _gradient_seconds(architecture, layout, cluster, work)


def _communication(
    architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload, rows: int
) -> float:
    """Seconds of tensor-, expert- and context-parallel traffic of one rank that no compute hides."""
    size, layers = work.bytes_per_weight, architecture.num_layers / layout.pp
    row_bytes = size * work.row_tokens / layout.cp * architecture.hidden_size
    seconds = 0.0
    if layout.tp > 1:  # 8 all-gathers or reduce-scatters a layer, forward and backward
        seconds += 8 * layers * row_bytes * (layout.tp - 1) / layout.tp / _wire(layout.tp, cluster)
    if layout.ep > 1:  # dispatch and combine, forward and backward
        sent = row_bytes / layout.tp * architecture.experts_per_token * (layout.ep - 1) / layout.ep
        seconds += 4 * layers * sent / _wire(layout.ep, cluster)
    if layout.cp > 1:  # keys and values of the others, forward and backward
        keys = row_bytes / architecture.hidden_size * 2 * architecture.num_kv_heads * architecture.head_dim
        seconds += 3 * layers * keys / layout.tp * (layout.cp - 1) / _wire(layout.tp * layout.cp, cluster)
    return seconds * rows


def _gradient_seconds(architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of weights over the data-parallel ranks, once a step."""
    copies, dense_expert = layout.dp * layout.cp, parameters_of(architecture, layout, 0)
    shares = (copies, layout.tp * copies // layout.ep)
    num_bytes = sum(
        count * (GRADIENT_BYTES + work.bytes_per_weight) * (share - 1) / share
        for count, share in zip(dense_expert, shares, strict=True)
    )
    return num_bytes / _wire(layout.tp * copies, cluster)


def _wire(span: int, cluster: Cluster) -> float:
    """Bytes per second of a group of `span` neighbouring ranks."""
    gpu = cluster.gpu
    return NETWORK_SHARE * (gpu.link if span <= cluster.gpus_per_node else gpu.network)


def weight_sync_seconds(
    architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload
) -> float:
    """By bytes: what the busiest rank of the first replica receives, over the network between nodes and within."""
    planned = plan(architecture, layout.trainer(architecture), layout.engine(architecture))
    moved = for_replica(planned, 0).transfers
    source, destination = moved["source"], moved["destination"]
    num_bytes = work.bytes_per_weight * moved["rows"] * moved["row_length"]
    nodes = source // cluster.gpus_per_node != destination // cluster.gpus_per_node

    def busiest(chosen: np.ndarray) -> float:
        received = np.bincount(destination[chosen], weights=num_bytes[chosen], minlength=1)
        return float(received.max())

    within = busiest(~nodes & (source != destination)) / cluster.gpu.link
    between = busiest(nodes) / cluster.gpu.network
    copied = 2 * busiest(source == destination) / cluster.gpu.bandwidth
    return (within + between) / NETWORK_SHARE + copied
