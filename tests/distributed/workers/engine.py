"""One rank of a tensor-parallel engine; rank 0 writes the rollouts as JSON.

Started by `test_engine_tensor_parallel.py`: engine.py WEIGHTS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel, ModelConfig
from npr_engine.sampling import SamplingParams
from npr_engine.testing import GRAMMAR


def shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's part of a full weight, as Megatron cuts it."""
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        padded = torch.cat((full, full.new_zeros(-len(full) % size, full.shape[1])))
        return padded.chunk(size)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if name.endswith("linear_qkv.weight"):
        return full.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(size, dim=1)[rank].contiguous()
    return full


def main() -> None:
    weights_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    config, weights, prompts = torch.load(weights_path, weights_only=False)
    assert isinstance(config, ModelConfig)
    rank, size = dist.get_rank(), dist.get_world_size()
    local = {name: shard(name, tensor, rank, size) for name, tensor in weights.items()}
    group = dist.group.WORLD if size > 1 else None
    engine = Engine(InferenceModel(config, local, group), GRAMMAR, EngineConfig(num_kv_slots=2048))
    rollouts = engine.generate(prompts, SamplingParams(max_tokens=200, seed=4))
    shown = [(r.token_ids.tolist(), r.logprobs[~r.forced].tolist(), r.finish_reason) for r in rollouts]
    everywhere: list[object] = [None] * size
    dist.all_gather_object(everywhere, shown)
    assert all(other == everywhere[0] for other in everywhere), "ranks disagree"
    if rank == 0:
        out.write_text(json.dumps(shown))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
