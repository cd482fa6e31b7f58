"""The layout that fits and takes the least time, among all that are valid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_npr.planning.cluster import Cluster
from megatron_npr.planning.job import Layout, Recompute, Workload, check_job
from megatron_npr.planning.memory import USABLE, Memory, memory_of
from megatron_npr.planning.times import Times, rollout_seconds, times_of, train_seconds
from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.layouts import check_layouts
from npr_ext.errors import UserError

REMEDIES = {
    "weights": "more GPUs, or larger parallel.tp or parallel.pp",
    "gradients": "more GPUs, or larger parallel.tp or parallel.pp",
    "optimizer": "more GPUs: its state is sharded over the data-parallel ranks",
    "activations": "smaller batch.micro_batch_tokens, or larger parallel.cp",
    "kv": "smaller rollout.kv_slots, or larger rollout.tp",
    "engine_weights": "larger rollout.tp or rollout.ep, or parallel.pp = 1 where the engine reads the trainer's weights",
    "workspace": "smaller batch.micro_batch_tokens or rollout.max_batch_tokens, or larger parallel.tp",
}
NEAR = 1.05  # of the least time: among these the simplest layout is taken
PIPELINES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class JobPlan:
    """A layout and what it costs."""

    layout: Layout
    work: Workload
    memory: Memory
    times: Times
    limit: float  # bytes of a GPU that can be used

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    def shortage(self) -> str:
        """One line: by how much it does not fit, the largest part, the remedy."""
        memory, excess = self.memory, self.memory.total - self.limit
        others = [part for part in ("kv", "activations") if excess < memory.parts()[part] / 2]
        remedies = dict.fromkeys(REMEDIES[part] for part in (memory.largest, *others))
        if self.work.recompute != "full" and "activations" in (memory.largest, *others):
            remedies['model.recompute = "full"'] = None
        return (
            f"needs {memory.total / 1e9:.1f} GB a GPU, {self.limit / 1e9:.1f} GB can be used; largest part: "
            f"{memory.largest} {memory.parts()[memory.largest] / 1e9:.1f} GB; remedy: {'; or '.join(remedies)}"
        )


def evaluate(architecture: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> JobPlan:
    """What a given layout costs; UserError where it is not valid."""
    _check(architecture, layout, cluster)
    memory = memory_of(architecture, layout, work)
    times = times_of(architecture, layout, cluster, work)
    return JobPlan(layout, work, memory, times, USABLE * cluster.gpu.memory)


def best(
    architecture: Architecture, cluster: Cluster, work: Workload, recompute: Recompute | None
) -> JobPlan:
    """The quickest that fits, or the smallest where nothing does. `recompute` None: whatever is quickest."""
    options: tuple[Recompute, ...] = ("none", "selective", "full") if recompute is None else (recompute,)
    limit = USABLE * cluster.gpu.memory
    fitting: list[tuple[float, Layout, Workload]] = []
    smallest: tuple[float, Layout, Workload] | None = None
    for layout in candidates(architecture, cluster):
        for option in options:
            asked = replace(work, recompute=option)
            total = memory_of(architecture, layout, asked).total
            if total <= limit:
                seconds = train_seconds(architecture, layout, cluster, asked)
                seconds += rollout_seconds(architecture, layout, cluster, asked) if work.kv_slots else 0.0
                fitting.append((seconds, layout, asked))
            elif smallest is None or total < smallest[0]:
                smallest = (total, layout, asked)
    quickest = min((each[0] for each in fitting), default=0.0)
    near = (each for each in fitting if each[0] <= NEAR * quickest)
    chosen = min(near, key=lambda each: (*_complexity(each[1]), each[0]), default=smallest)
    if chosen is None:
        raise UserError(f"no layout of {cluster.size} GPUs divides this model's heads, layers and experts")
    return evaluate(architecture, chosen[1], cluster, chosen[2])


def _complexity(layout: Layout) -> tuple[int, ...]:
    """Fewer mechanisms first: an engine that reads the trainer's weights, then small pp, cp, vpp, ep and tp."""
    alike = (layout.engine_tp, layout.engine_ep, 1) == (layout.tp, layout.ep, layout.pp)
    return (int(not alike), layout.pp, layout.cp, layout.vpp, layout.ep, layout.tp)


def candidates(architecture: Architecture, cluster: Cluster) -> Iterator[Layout]:
    """Every valid layout: tensor parallelism within a node, engines that share experts over at most four nodes."""
    for tp in _powers(cluster.gpus_per_node):
        for pp in PIPELINES:
            for cp in _powers(8):
                if cluster.size % (tp * pp * cp):
                    continue
                for ep in _powers(64) if architecture.num_experts else (1,):
                    yield from _variants(architecture, cluster, tp, pp, cp, ep)


def _variants(
    architecture: Architecture, cluster: Cluster, tp: int, pp: int, cp: int, ep: int
) -> Iterator[Layout]:
    base = Layout(tp=tp, pp=pp, cp=cp, ep=ep, dp=cluster.size // (tp * pp * cp), sequence_parallel=tp > 1)
    first = last = None
    if architecture.num_layers % pp:
        first = last = outer_layers(architecture.num_layers, pp)
        if first is None:
            return
    chunks = [vpp for vpp in (1, 2, 4) if vpp == 1 or (pp > 1 and first is None)]
    for vpp in chunks:
        for engine_tp, engine_ep in _engines(architecture, cluster, base):
            layout = replace(
                base, vpp=vpp, first_layers=first, last_layers=last, engine_tp=engine_tp, engine_ep=engine_ep
            )
            if _is_valid(architecture, layout, cluster):
                yield layout


def outer_layers(num_layers: int, pp: int) -> int | None:
    """Layers of the first and of the last stage so that the rest divides evenly and no stage has more than the middle
    ones; None where that cannot be."""
    middle = pp - 2
    if middle < 1:
        return None
    even = num_layers // pp
    fitting = [
        outer
        for outer in range(1, even + 1)
        if (num_layers - 2 * outer) % middle == 0 and (num_layers - 2 * outer) // middle >= outer
    ]
    return max(fitting, default=None)


def _engines(architecture: Architecture, cluster: Cluster, base: Layout) -> Iterator[tuple[int, int]]:
    """Engine layouts: the trainer's own tp, or any up to a node; experts over up to four nodes."""
    if not architecture.num_experts:
        yield from ((tp, 1) for tp in _powers(cluster.gpus_per_node))
        return
    for tp in _powers(cluster.gpus_per_node):
        yield from ((tp, ep) for ep in _powers(4 * cluster.gpus_per_node) if ep >= tp)


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]


def _is_valid(architecture: Architecture, layout: Layout, cluster: Cluster) -> bool:
    try:
        _check(architecture, layout, cluster)
    except UserError:
        return False
    return True


def _check(architecture: Architecture, layout: Layout, cluster: Cluster) -> None:
    check_job(architecture, layout, cluster.size)
    check_layouts(architecture, layout.trainer(architecture), layout.engine(architecture))
