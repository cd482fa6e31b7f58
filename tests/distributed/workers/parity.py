"""One process of a parity world: the same model, batch and updates under any layout; figures as JSON from rank 0.

Started by `test_parallel_parity.py`: parity.py TABLES FOLDER OUT, where TABLES is the JSON of `[parallel]`,
`[model] recompute` and `[optimizer] overlap`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_npr.config import BatchSettings, OptimizerSettings, ParallelSettings, Recompute
from megatron_npr.data.packing import TrainSample
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model.context_parallel import shard_bounds
from megatron_npr.model.log_probs import token_log_probs
from megatron_npr.model.policy import Policy
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights, local_weights
from megatron_npr.rl.losses import papo_loss, sft_loss
from megatron_npr.runtime.process_world import World, megatron_context, world_of
from megatron_npr.sharding.catalog import catalog
from megatron_npr.sharding.cuts import Cut
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.engine_weights import full_weights
from megatron_npr.training.trainer import Trainer
from npr_ext import branch_layout
from tests.support.errors import allowed_error, largest_error
from tests.support.logits.transformers import exact_logits, transformers_logits
from tests.support.training import TAGS, axes, branching_samples


def measure(
    world: World, folder: Path, parallel: ParallelSettings, recompute: Recompute, overlap: bool
) -> dict[str, Any]:
    """Everything that must not depend on the layout."""
    figures: dict[str, Any] = {}
    samples = branching_samples()
    build = partial(
        build_policy,
        read_model_config(folder),
        world,
        parallel=parallel,
        recompute=recompute,
    )
    policy = build()
    load_policy_weights(policy, folder)
    figures["logits_error"] = logits_error(policy, world, folder)
    figures["entropy_difference"] = entropy_difference(world)
    for name in ("sft", "papo"):
        for share in (False, True):
            policy = build(entropy_coefficient=None if name == "sft" else 0.05)
            load_policy_weights(policy, folder)
            trainer = Trainer(
                policy,
                world,
                optimizer=OptimizerSettings(lr=1e-3, overlap=overlap, bucket_size=4000 if overlap else None),
                batch=BatchSettings(micro_batch_tokens=128, share_prompts=share),
                tags=TAGS,
                pad_id=0,
                num_updates=10,
                overlap_param_gather=overlap,
            )
            key = f"{name}{'_shared' if share else ''}"
            if name == "sft":
                log_probs = trainer.log_probs(samples, branching=True)
                figures[f"{key}_log_probs"] = [
                    np.nan_to_num(values, nan=9.0).tolist() for values in log_probs
                ]
            reports = [
                trainer.step(
                    samples,
                    (lambda lp, row: sft_loss(lp))
                    if name == "sft"
                    else (lambda lp, row: papo_loss(lp, row.advantages)),
                    branching=True,
                )
                for _ in range(3)
            ]
            figures[f"{key}_loss"] = [report.loss for report in reports]
            figures[f"{key}_grad_norm"] = [report.grad_norm for report in reports]
            if name == "papo":
                figures[f"{key}_entropy"] = [report.entropy for report in reports]
    if policy.model_config.num_experts:
        figures["balanced"] = balanced_figures(build(router_aux_loss=0.05), world, folder)
    trainer.gather()
    figures["engine_checksum"] = engine_checksum(policy)
    figures["strayed"] = strayed(policy, world)
    figures["resume"] = resume_difference(trainer, world, folder, samples)
    return figures


def balanced_figures(policy: Policy, world: World, folder: Path) -> list[float]:
    """Figures of updates with the loss that balances experts: on all samples, and on one, where a second data-parallel
    rank idles."""
    load_policy_weights(policy, folder)
    trainer = Trainer(
        policy,
        world,
        # With its usual eps Adam's first updates are the signs of gradients, also where these are all rounding.
        optimizer=OptimizerSettings(lr=1e-1, eps=1.0),
        batch=BatchSettings(micro_batch_tokens=128),
        tags=TAGS,
        pad_id=0,
        num_updates=2,
    )
    figures = []
    for samples in (branching_samples(), branching_samples()[:1]):
        report = trainer.step(samples, lambda lp, row: sft_loss(lp), branching=True)
        figures += [report.loss, report.grad_norm, report.load_balance]
    return figures


def logits_error(policy: Any, world: World, folder: Path) -> float:
    """Largest error of a logit over a causal sequence of 40 tokens, as a part of what support/errors.py allows; on
    every rank."""
    largest = torch.tensor([_own_logits_error(policy, world, folder)], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _own_logits_error(policy: Any, world: World, folder: Path) -> float:
    """On the last stage; 0 elsewhere."""
    size = policy.model_config.vocab_size
    token_ids = torch.from_numpy(np.random.default_rng(1).integers(0, size, 40))
    layout = branch_layout(token_ids, tags=TAGS, prompt_lengths=4, branching=False).as_tensor()

    begin, end = shard_bounds(40, world.cp_rank, world.cp_size)

    def forward_step(rows: Any, model: torch.nn.Module) -> Any:
        output = model(token_ids[None, begin:end], layout[:1, begin:end], layout)
        return output, lambda logits, non_loss_data: logits

    with megatron_context(), torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(())] * world.vpp_size,
            model=list(policy.chunks),
            num_microbatches=world.pp_size if world.vpp_size > 1 else 1,
            seq_length=40,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not world.is_last_stage:
        return 0.0
    shards = [torch.empty_like(outputs[0]) for _ in range(world.tp_size)]
    dist.all_gather(shards, outputs[0].contiguous(), group=world.tp_group)
    logits = torch.cat(shards, dim=-1).reshape(end - begin, -1)[:, :size]
    exact = exact_logits(folder, token_ids)
    return largest_error(logits, exact[begin:end]) / allowed_error(
        transformers_logits(folder, token_ids), exact
    )


def entropy_difference(world: World) -> float:
    """Largest relative error of entropy and gradients over the tensor group against the closed form, in float64."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (
        torch.randn(rows, 8, dtype=torch.float64, generator=generator) for rows in (9, 97 + (-97 % 4))
    )
    scale = torch.arange(1.0, 10, dtype=torch.float64)
    used = torch.tensor([token for token in range(97) if token not in (2, 33, 94, 95, 96)])
    # Holes, and a tail that may be all that a rank has.
    unused = sorted({*range(len(weight))} - {*used.tolist()})
    weight[unused] *= 10
    places = torch.arange(9) * 10
    targets, rows = used[places], len(weight) // world.tp_size
    first = world.tp_rank * rows
    own = [hidden.clone().requires_grad_(), weight[first : first + rows].clone().requires_grad_()]
    log_probs, entropy = token_log_probs(
        own[0],
        own[1],
        targets,
        first_row=first,
        unused_U=torch.tensor([token - first for token in unused if first <= token < first + rows]).long(),
        chunk=4,
        group=world.tp_group,
        entropy=True,
    )
    assert entropy is not None
    (log_probs - scale * entropy).sum().backward()
    reference = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    full = (reference[0] @ reference[1][used].T).log_softmax(-1)
    expected = -(full.exp() * full).sum(-1)
    (full.gather(1, places[:, None])[:, 0] - scale * expected).sum().backward()
    gradients = [tensor.grad for tensor in (*own, *reference)]
    assert all(gradient is not None for gradient in gradients)
    hidden_sum, weight_part, hidden_full, weight_full = gradients
    dist.all_reduce(hidden_sum, group=world.tp_group)
    pairs = [
        (entropy, expected),
        (hidden_sum, hidden_full),
        (weight_part, weight_full[first : first + rows]),
    ]
    errors = [
        float((ours - truth).detach().abs().max() / truth.detach().abs().max()) for ours, truth in pairs
    ]
    largest = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def engine_checksum(policy: Any) -> float:
    """Sum of squares over the full weights, after training."""
    return sum(float(weight.double().square().sum()) for weight in full_weights(policy).values())


def strayed(policy: Policy, world: World) -> list[str]:
    """Names of weights of which two ranks hold the same part in other bits, after training."""
    listed, own = catalog(policy.model_config), {}
    for name, weight in local_weights(policy).items():
        cut, part, _ = listed[name].trainer_cut(policy.layout, world.rank)
        own[name, 0 if cut is Cut.REPLICATED else part] = sha256(weight.detach().numpy()).hexdigest()
    of_ranks: list[Any] = [None] * world.size
    dist.all_gather_object(of_ranks, own)
    held = defaultdict(set)
    for part, digest in (each for of_rank in of_ranks for each in of_rank.items()):
        held[part].add(digest)
    return sorted({name for (name, _), versions in held.items() if len(versions) > 1})


def resume_difference(trainer: Trainer, world: World, folder: Path, samples: list[TrainSample]) -> float:
    """|loss after two more steps - the same after saving and loading| (bit for bit: 0)."""
    checkpoints = Checkpoints(
        folder / f"checkpoints_{os.getpid() if world.size == 1 else os.environ['TORCHELASTIC_RUN_ID']}",
        world,
        keep=1,
        model_folder=folder,
        config={},
    )
    path = checkpoints.save(3, trainer, {})

    def two_steps() -> float:
        return sum(
            trainer.step(samples, lambda lp, row: papo_loss(lp, row.advantages), branching=True).loss
            for _ in range(2)
        )

    first = two_steps()
    checkpoints.load(path, trainer)
    return abs(first - two_steps())


def main() -> None:
    """Measure under one layout and write rank 0's figures."""
    tables, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    parallel = ParallelSettings(**tables["parallel"])
    torch.set_num_threads(1)
    with world_of(**axes(parallel)) as world:
        figures = measure(world, folder, parallel, tables["recompute"], tables["overlap"])
        if world.is_main:
            out.write_text(json.dumps(figures))
        dist.barrier()


if __name__ == "__main__":
    main()
