"""The `npr plan` command: from its options, or a stage's configuration, to a plan in text or JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from megatron_npr.config import (
    RolloutSettings,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    load_config,
)
from megatron_npr.hf.tensor_files import TensorFiles, check_tensors, has_weights
from megatron_npr.hf.tensor_names import tensor_shapes
from megatron_npr.planning.cluster import CLUSTER_GPUS, Cluster, find_gpu
from megatron_npr.planning.job import Layout, Workload
from megatron_npr.planning.search import JobPlan, best, evaluate
from megatron_npr.sharding.architecture import Architecture, find_architecture
from npr_ext.errors import UserError

StageConfig = Stage1Config | Stage2Config | Stage3Config
STAGES: dict[str, type[StageConfig]] = {
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "stage3": Stage3Config,
}
SFT_TOKENS = 8192  # mean length of a sample where none is known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", nargs="?", help="a known name (Qwen3-4B), a model folder or a config.json")
    parser.add_argument("--config", type=Path, help="plan this stage configuration instead of searching")
    parser.add_argument("--stage", choices=STAGES, help="stage of --config (default: by its file name)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default 8)")
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(CLUSTER_GPUS)} (default H100)")
    parser.add_argument("--tokens", type=int, default=8192, help="mean tokens of a response (default 8192)")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=32_768, help="tokens of a row (default 32768)"
    )
    parser.add_argument("--kv-slots", type=int, default=262_144, help="of an engine (default 262144)")
    parser.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="(default: the quickest that fits)"
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; UserError (exit code 2) where it cannot fit, naming the largest part and the remedy."""
    for name in ("nodes", "gpus_per_node", "tokens", "micro_batch_tokens", "kv_slots"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give a positive number")
    cluster = Cluster(find_gpu(arguments.gpu), arguments.nodes, arguments.gpus_per_node)
    if arguments.config is not None:
        model, architecture, found = plan_config(arguments, cluster)
    elif arguments.model is not None:
        model, architecture = arguments.model, _architecture(arguments.model)
        work = Workload(
            row_tokens=arguments.micro_batch_tokens,
            response_tokens=arguments.tokens,
            kv_slots=arguments.kv_slots,
        )
        found = best(architecture, cluster, work, arguments.recompute)
    else:
        raise UserError("give a model (npr plan Qwen3-4B) or --config FILE; see npr plan --help")
    if arguments.json:
        print(json.dumps(record(model, architecture, cluster, found)))
    elif found.fits:
        print(text(model, architecture, cluster, found))
    if not found.fits:
        raise UserError(f"{model} on {_where(cluster)}: {found.layout}: {found.shortage()}")
    return 0


def _architecture(model: str) -> Architecture:
    """The architecture of a known name or a folder; UserError where a folder has weights that are not those of its
    config.json."""
    architecture, folder = find_architecture(model), Path(model)
    if has_weights(folder):
        found = TensorFiles(folder).tensors
        check_tensors(folder, found, tensor_shapes(architecture), tied=architecture.tied_embeddings)
    return architecture


def plan_config(arguments: argparse.Namespace, cluster: Cluster) -> tuple[str, Architecture, JobPlan]:
    """(model, its shape, what the configured layout costs on this cluster)."""
    path, name = arguments.config, arguments.stage or arguments.config.stem
    if name not in STAGES:
        raise UserError(f"{path}: cannot tell the stage by the file's name; give --stage {'|'.join(STAGES)}")
    config: StageConfig = load_config(STAGES[name], path)
    model, parallel = arguments.model or str(config.model.path), config.parallel
    architecture = _architecture(model)
    rollout = None if isinstance(config, Stage2Config) else config.rollout
    size = parallel.tp * parallel.pp * parallel.cp
    layout = Layout(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        dp=max(cluster.size // size, 1),
        sequence_parallel=parallel.sequence_parallel,
        first_layers=parallel.first_layers,
        last_layers=parallel.last_layers,
        engine_tp=(rollout.tp if rollout else None) or parallel.tp,
        engine_ep=(rollout.ep if rollout else None) or parallel.ep,
    )
    work = Workload(
        bytes_per_weight=4 if config.model.dtype == "fp32" else 2,
        fp8=config.fp8.recipe if config.model.dtype == "fp8" else None,
        fp8_parameters=config.model.dtype == "fp8" and config.fp8.parameters,
        recompute=config.model.recompute,
        row_tokens=config.batch.micro_batch_tokens,
        kv_slots=0,
        response_tokens=SFT_TOKENS,
    )
    if isinstance(config, Stage2Config):
        work = replace(work, responses=config.train.global_batch)
    else:
        work = _rollout_work(work, config.rollout, arguments.tokens)
    return model, architecture, evaluate(architecture, layout, cluster, work)


def _rollout_work(work: Workload, rollout: RolloutSettings, response_tokens: int) -> Workload:
    return replace(
        work,
        responses=rollout.prompts_per_step * rollout.samples_per_prompt,
        response_tokens=min(response_tokens, rollout.max_tokens),
        speedup=work.speedup if rollout.branching else 1.0,
        kv_slots=rollout.kv_slots,
        max_running_requests=rollout.max_running_requests,
        max_branches=rollout.max_branches if rollout.branching else 1,
        batch_tokens=rollout.max_batch_tokens,
    )


def record(model: str, architecture: Architecture, cluster: Cluster, found: JobPlan) -> dict[str, object]:
    """The plan as JSON data; bytes and seconds."""
    return {
        "model": model,
        "parameters": architecture.num_parameters,
        "active_parameters": architecture.active_parameters,
        "gpu": cluster.gpu.name,
        "nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "layout": asdict(found.layout),
        "work": asdict(found.work),
        "memory": {**found.memory.parts(), "total": found.memory.total, "limit": found.limit},
        "seconds": {**asdict(found.times), "total": found.times.total},
        "fits": found.fits,
    }


def text(model: str, architecture: Architecture, cluster: Cluster, found: JobPlan) -> str:
    """The plan for people."""
    work, memory, times = found.work, found.memory, found.times
    lines = [
        f"{model}: {architecture.num_parameters / 1e9:.2f} B parameters"
        + (f", {architecture.active_parameters / 1e9:.2f} B active" if architecture.num_experts else "")
        + f", on {_where(cluster)}",
        f"layout     {found.layout}",
        f"rows       {work.row_tokens} tokens, recompute {work.recompute}",
        f"memory     {memory.total / 1e9:.1f} of {found.limit / 1e9:.1f} GB a GPU (pipeline stage {memory.stage})",
    ]
    lines += [f"  {name:<15}{value / 1e9:8.1f} GB" for name, value in memory.parts().items()]
    lines.append(
        f"time       {times.total:.0f} s a step of {work.responses} responses of {work.response_tokens} tokens (estimate)"
    )
    lines += [f"  {name:<15}{value:8.1f} s" for name, value in asdict(times).items()]
    return "\n".join(lines)


def _where(cluster: Cluster) -> str:
    return f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
