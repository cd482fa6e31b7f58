"""One process of a world that walks through layouts: the engine's logits over the trainer's weights, before and after an
update.

Started by `test_resharding_into_the_engine.py`: reshard_worker.py CASES FOLDER OUT, where CASES is JSON:
[{"parallel": {...}, "tp": engine's, "ep": engine's, "fp8": too}, ...]. FOLDER/expected.pt holds token ids, the exact
logits over them with what ours may err, and the same after `GROWTH`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npr.config import ParallelSettings, RolloutSettings
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model.policy import Policy
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights, local_weights
from megatron_npr.rollout.engine_groups import engine_groups, engine_layout
from megatron_npr.runtime.process_world import World
from megatron_npr.sharding.layouts import EngineLayout
from megatron_npr.training.engine_weights import EngineWeights
from npr_engine.model.transformer import InferenceModel
from tests.support.errors import largest_error
from tests.support.logits.engine import engine_logits
from tests.support.worlds import worlds

Truth = tuple[Tensor, float]
GROWTH = 1.25
"""The "training step" of every case: all weights times this."""


class FP8Pair:
    """Two engines in FP8: one is sent its projections so, the other quantises what it was sent whole."""

    def __init__(self, policy: Policy, layout: EngineLayout, whole: EngineWeights, world: World) -> None:
        self._sent, groups = EngineWeights(policy, layout, fp8=True), engine_groups(world, layout)
        self._taker, self._maker = (
            InferenceModel(policy.model_config, tensors, groups.tp, expert_group=groups.experts, fp8=True)
            for tensors in (self._sent.tensors, whole.tensors)
        )

    def update(self) -> int:
        """Bytes that were sent and copied."""
        moved = self._sent.update()
        self._taker.load(self._sent.tensors)
        self._taker.refresh()
        self._maker.refresh()
        return moved.sent + moved.copied

    def difference(self, token_ids: Tensor) -> float:
        ours, theirs = (engine_logits(model, token_ids) for model in (self._taker, self._maker))
        return float((ours - theirs).abs().max())


def measure(
    case: dict[str, Any], world: World, folder: Path, expected: tuple[Tensor, Truth, Truth]
) -> dict[str, Any]:
    """Largest logit error of any rank, as a part of what is allowed, before and after the update, and the bytes that the update
    moved in all; with "fp8" also the largest difference of the logits of two engines in FP8, whose weights came so or came
    whole."""
    token_ids, before, after = expected
    parallel = ParallelSettings(**case["parallel"])
    config = read_model_config(folder)
    policy = build_policy(config, world, parallel=parallel)
    load_policy_weights(policy, folder)
    layout = engine_layout(RolloutSettings(tp=case["tp"], ep=case["ep"]), parallel, config, world.size)
    weights = EngineWeights(policy, layout)
    groups = engine_groups(world, layout)
    model = InferenceModel(config, weights.tensors, groups.tp, expert_group=groups.experts)
    exact, allowed = before
    errors = [largest_error(engine_logits(model, token_ids), exact) / allowed]
    pair = FP8Pair(policy, layout, weights, world) if case["fp8"] else None
    differences = [pair.difference(token_ids)] if pair else [0.0]
    for weight in local_weights(policy).values():
        weight.mul_(GROWTH)
    moved = weights.update()
    exact, allowed = after
    errors.append(largest_error(engine_logits(model, token_ids), exact) / allowed)
    moved_in_fp8 = 0
    if pair:
        moved_in_fp8 = pair.update()
        differences.append(pair.difference(token_ids))
    worst = torch.tensor([*errors, max(differences)])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    bytes_of = torch.tensor([moved.sent + moved.copied, moved.in_place, moved_in_fp8])
    dist.all_reduce(bytes_of)
    return {
        "errors": worst[:2].tolist(),
        "fp8_difference": float(worst[2]),
        "moved": int(bytes_of[0]),
        "in_place": int(bytes_of[1]),
        "moved_in_fp8": int(bytes_of[2]),
    }


def main() -> None:
    cases, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    expected = torch.load(folder / "expected.pt")
    layouts = [ParallelSettings(**case["parallel"]) for case in cases]
    figures = [
        measure(case, world, folder, expected) for world, case in zip(worlds(layouts), cases, strict=True)
    ]
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
