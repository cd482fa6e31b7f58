"""One process of a world that walks through layouts: the engine's logits over the trainer's weights, before and after an
update.

Started by `test_resharding_into_the_engine.py` through torchrun: reshard_worker.py CASES FOLDER OUT, where CASES is JSON
[[[parallel], rollout.tp, rollout.ep], ...]. FOLDER/expected.pt holds token ids, the logits over them, and those after
`GROWTH`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npr.config import ParallelSettings, RolloutSettings
from megatron_npr.engine_grid import engine_groups, engine_layout
from megatron_npr.huggingface import read_model_config
from megatron_npr.parallel import close_world, init_world
from megatron_npr.policy import build_policy, load_policy_weights, local_weights
from megatron_npr.reshard import EngineWeights
from npr_engine.model import InferenceModel
from tests.engine_logits import engine_logits

GROWTH = 1.25
"""The "training step" of every case: all weights times this."""


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Largest error over the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def walk(case: dict[str, Any], folder: Path, expected: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Largest relative logit error of any rank before and after the update, and the bytes that the update moved in all."""
    token_ids, before, after = expected
    parallel = ParallelSettings(**case["parallel"])
    world = init_world(
        tensor=parallel.tp,
        pipeline=parallel.pp,
        context=parallel.cp,
        virtual=parallel.vpp,
        expert=parallel.ep,
    )
    config = read_model_config(folder)
    policy = build_policy(config, world, parallel=parallel)
    load_policy_weights(policy, folder)
    layout = engine_layout(RolloutSettings(tp=case["tp"], ep=case["ep"]), parallel, config, world.size)
    weights = EngineWeights(policy, layout)
    groups = engine_groups(world, layout)
    model = InferenceModel(config, weights.tensors, groups.tp, expert_group=groups.experts)
    errors = [relative_error(engine_logits(model, token_ids), before)]
    for weight in local_weights(policy).values():
        weight.mul_(GROWTH)
    moved = weights.update()
    errors.append(relative_error(engine_logits(model, token_ids), after))
    worst = torch.tensor(errors)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    bytes_of = torch.tensor([moved.sent + moved.copied, moved.in_place])
    dist.all_reduce(bytes_of)
    return {"errors": worst.tolist(), "moved": int(bytes_of[0]), "in_place": int(bytes_of[1])}


def main() -> None:
    cases, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    expected = torch.load(folder / "expected.pt")
    figures = [walk(case, folder, expected) for case in cases]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(figures))
    dist.barrier()
    close_world()


if __name__ == "__main__":
    main()
