"""A two-layer Qwen3 that has learned to write parallel responses, and the same model as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel, ModelConfig
from npr_engine.rollout import Rollout
from npr_engine.testing import GRAMMAR, PIECES, VOCABULARY, answer, block, encode
from npr_ext import branch_layout

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=96,
    vocab_size=len(PIECES),
    rope_theta=10_000.0,
)
STEPS = 600
PROMPTS = [encode(f"{a}{b}=?") for a in "123" for b in "45"]


def response(prompt: list[int]) -> list[int]:
    """What the model learns to answer: two blocks of branches of different lengths."""
    a, b = (PIECES[token] for token in prompt[:2])
    first = block(f"ab|{a}{a}{a}c{b}", f"c|{b}", f"d|{a}{b}{a}{b}{a}", takeaway=f"{a}+{b}")
    second = block(f"{b}|{a}{b}", "h|h", takeaway=b)
    return encode(first + ("\n\n" + second if a != "2" else "") + answer(a + b))


@dataclass(frozen=True)
class Plain:
    """The reference: transformers' model with a dense mask."""

    model: Qwen3ForCausalLM

    def logits(self, prompt: list[int], ids: list[int], *, branching: bool = True) -> tuple[Tensor, Tensor]:
        """Logits [R, V] that predict each response token, and their predecessors [R] (-1: predicted by nobody)."""
        tokens = torch.tensor([*prompt, *ids], dtype=torch.int32)
        layout = branch_layout(tokens, tags=VOCABULARY.tags, prompt_lengths=len(prompt), branching=branching)
        mask = torch.zeros(len(tokens), len(tokens), dtype=self.model.dtype)
        mask.masked_fill_(~layout.visible(), torch.finfo(self.model.dtype).min)
        output = self.model(
            input_ids=tokens.long()[None],
            position_ids=layout.position_ids.long()[None],
            attention_mask=mask[None, None],
        )
        before = layout.predecessor.long()[len(prompt) :]
        return output.logits[0][before.clamp(min=0)], before

    def logprobs(self, rollout: Rollout) -> np.ndarray:
        """Log-probs [R] of a rollout's tokens; NaN where nobody predicts one."""
        ids = rollout.token_ids.tolist()
        with torch.no_grad():
            logits, before = self.logits(rollout.prompt_ids.tolist(), ids, branching=rollout.branching)
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        return torch.where(before >= 0, chosen, torch.nan).numpy()


def fused(model: Qwen3ForCausalLM, config: ModelConfig) -> dict[str, Tensor]:
    """Its weights in Megatron's layout."""
    state = model.state_dict()
    weights = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        groups = [
            state[f"{theirs}self_attn.{x}_proj.weight"].unflatten(0, (config.num_kv_heads, -1)) for x in "qkv"
        ]
        weights[ours + "self_attention.linear_qkv.weight"] = torch.cat(groups, 1).flatten(0, 1)
        weights[ours + "mlp.linear_fc1.weight"] = torch.cat(
            [state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"]]
        )
        for mine, yours in {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        }.items():
            weights[ours + mine] = state[theirs + yours]
    return weights


@pytest.fixture(scope="session")
def plain() -> Plain:
    """The trained reference, float64."""
    torch.manual_seed(0)
    hf = Qwen3Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.ffn_hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
        rope_theta=CONFIG.rope_theta,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    reference = Plain(Qwen3ForCausalLM(hf))
    optimizer = torch.optim.AdamW(reference.model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=STEPS)
    samples = [(prompt, response(prompt)) for prompt in PROMPTS]
    for step in range(STEPS):
        prompt, ids = samples[step % len(samples)]
        logits, before = reference.logits(prompt, ids)
        loss = torch.nn.functional.cross_entropy(logits[before >= 0], torch.tensor(ids)[before >= 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    assert float(loss) < 0.1, "the tests need a model that has learned its samples by heart"
    reference.model.double().eval().requires_grad_(False)
    return reference


@pytest.fixture(scope="session")
def inference_model(plain: Plain) -> InferenceModel:
    """The engine's model of the weights of `plain`, float64."""
    return InferenceModel(CONFIG, fused(plain.model, CONFIG))


@pytest.fixture
def new_engine(inference_model: InferenceModel) -> Callable[..., Engine]:
    """Makes engines of any size."""

    def make(**sizes: int) -> Engine:
        return Engine(inference_model, GRAMMAR, EngineConfig(**{"num_kv_slots": 4096, **sizes}))

    return make
