"""A model with random weights and a liking for tags, so that long runs reach every part of the language; and a
vocabulary with the pieces that real ones have: parts of characters, spaces beyond ASCII, nothing at all."""

from __future__ import annotations

import torch
from torch import Tensor

from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.transformer import InferenceModel, ModelConfig
from npr_engine.testing import EOS, PIECES, VOCABULARY

BOXED, OPEN = "\\boxed{7}", "\\boxed{"
ODD = (b"\xc3", b"\xa9", b"\xc2", b"\xa0", "\u00a0", "", "1:", " :2")
GRAMMAR = Grammar(Vocabulary((*VOCABULARY.pieces, BOXED, OPEN, *ODD), EOS, VOCABULARY.tags))
NUM_TOKEN_IDS = GRAMMAR.vocabulary.size + 3  # output rows beyond the tokenizer, as models have them
CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_hidden_size=16,
    vocab_size=NUM_TOKEN_IDS,
    rope_theta=10_000.0,
    tied_embeddings=False,
)
_TAGS = VOCABULARY.tags
LIKED = dict.fromkeys(VOCABULARY.tag_ids, 2.0) | {
    _TAGS.guideline: 7.0,
    EOS: 4.0,
    len(PIECES): 3.0,
    len(PIECES) + 1: 1.0,
}


def random_weights(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights in Megatron's layout. Hidden dimension 0 is the same for every token, so that the output layer's
    column 0 is a bias: a token of `LIKED` is e^(its number) times as probable."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * scale

    hidden, ffn, heads = CONFIG.hidden_size, CONFIG.ffn_hidden_size, CONFIG.num_heads * CONFIG.head_dim
    fused = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    embedding, output = normal(NUM_TOKEN_IDS, hidden), normal(NUM_TOKEN_IDS, hidden, scale=0.3)
    embedding[:, 0] = 4.0
    output[:, 0] = 0.0
    for token, bias in LIKED.items():
        output[token, 0] = bias / 2.8  # hidden dimension 0 after the norm
    layer = "decoder.layers.0."
    proj, down = normal(hidden, heads, scale=0.2), normal(hidden, ffn, scale=0.2)
    proj[0], down[0] = 0.0, 0.0
    ones = torch.ones(hidden, dtype=dtype)
    return {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": output,
        "decoder.final_layernorm.weight": ones.clone(),
        layer + "self_attention.linear_qkv.layer_norm_weight": ones.clone(),
        layer + "self_attention.linear_qkv.weight": normal(fused, hidden),
        layer + "self_attention.q_layernorm.weight": torch.ones(CONFIG.head_dim, dtype=dtype),
        layer + "self_attention.k_layernorm.weight": torch.ones(CONFIG.head_dim, dtype=dtype),
        layer + "self_attention.linear_proj.weight": proj,
        layer + "mlp.linear_fc1.layer_norm_weight": ones.clone(),
        layer + "mlp.linear_fc1.weight": normal(2 * ffn, hidden, scale=0.3),
        layer + "mlp.linear_fc2.weight": down,
    }


def random_model(seed: int) -> InferenceModel:
    """The model of those weights."""
    return InferenceModel(CONFIG, random_weights(seed))
