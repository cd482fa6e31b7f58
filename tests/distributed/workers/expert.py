"""One rank of engines whose experts lie on more ranks than their attention; rank 0 writes all responses as JSON.

Started by `test_engine_expert_parallel.py`: expert.py FOLDER CASES OUT, where CASES is JSON
[[rollout.tp, rollout.ep, [indices of PROMPTS of copy 0, of copy 1, ...]], ...].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_npr.config import ParallelSettings, RolloutSettings
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.rollout.engine_groups import engine_groups, engine_layout
from megatron_npr.runtime.process_world import World, world_of
from megatron_npr.training.session import read_shards
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_engine.sampling import SamplingParams
from npr_engine.testing import GRAMMAR, encode

PROMPTS = [encode(text) for text in ("ab", "12+3=", "<guideline>\n<plan>1: a</plan>\n", "a", "cdefgh:0")]
LENGTHS = (12, 3, 40, 25, 1)
GREEDY = [SamplingParams(max_tokens=n, temperature=0.0, branching=False, ignore_eos=True) for n in LENGTHS]
BRANCHING = [SamplingParams(max_tokens=4 * n, seed=n) for n in LENGTHS]

Response = tuple[list[int], list[float]]


def responses(engine: Engine, own: list[int]) -> dict[int, list[Response]]:
    """Tokens and log-probs of this copy's prompts, greedy and branching, by index."""
    found: dict[int, list[Response]] = {index: [] for index in own}
    for sampling in (GREEDY, BRANCHING):
        rollouts = engine.generate(
            [PROMPTS[i] for i in own], [sampling[i] for i in own], request_ids=[str(i) for i in own]
        )
        engine.check_integrity()
        for index, rollout in zip(own, rollouts, strict=True):
            found[index].append((rollout.token_ids.tolist(), rollout.logprobs[~rollout.forced].tolist()))
    return found


def decode(folder: Path, world: World, tp: int, ep: int, shares: list[list[int]]) -> list[list[Response]]:
    """The responses of all copies by prompt; each rank of a copy has the same."""
    config = read_model_config(folder)
    layout = engine_layout(RolloutSettings(tp=tp, ep=ep), ParallelSettings(), config, world.size)
    groups = engine_groups(world, layout)
    weights = read_shards(folder, config, world, torch.float32, layout)
    held = {int(name.split("local_experts.")[1].split(".")[0]) for name in weights if "local_experts" in name}
    assert len(held) == config.num_experts // ep
    model = InferenceModel(config, weights, groups.tp, expert_group=groups.experts)
    engine = Engine(model, GRAMMAR, EngineConfig(num_kv_slots=2048, max_batch_tokens=16))
    everywhere: list[dict[int, list[Response]]] = [{} for _ in range(world.size)]
    dist.all_gather_object(everywhere, responses(engine, shares[world.rank // tp]))
    assert all(everywhere[rank] == everywhere[rank // tp * tp] for rank in range(world.size))
    found = {index: each for part in everywhere for index, each in part.items()}
    return [found[index] for index in range(len(PROMPTS))]


def main() -> None:
    folder, cases, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with world_of() as world:
        figures = [decode(folder, world, *case) for case in cases]
        if world.is_main:
            out.write_text(json.dumps(figures))
        dist.barrier()


if __name__ == "__main__":
    main()
