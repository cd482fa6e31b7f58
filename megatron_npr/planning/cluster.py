"""GPUs and the machines that hold them, as the vendors' data sheets state them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from npr_ext.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device: bytes, dense bf16 FLOP/s, and bytes per second of its memory, its link within a node (one direction)
    and its share of the network between nodes."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


CLUSTER_GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80GB", 80e9, 312e12, 2.04e12, 300e9, 25e9),
        Gpu("H100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        Gpu("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
        Gpu("B200", 180e9, 2250e12, 8e12, 900e9, 50e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int

    @property
    def size(self) -> int:
        return self.num_nodes * self.gpus_per_node


def find_gpu(name: str) -> Gpu:
    """By name in any case; UserError suggests one."""
    known = {each.lower(): gpu for each, gpu in CLUSTER_GPUS.items()}
    found = known.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
        hint = f"did you mean {known[close[0]].name}?" if close else f"known: {', '.join(CLUSTER_GPUS)}"
        raise UserError(f"--gpu {name}: unknown GPU; {hint}")
    return found
