"""The recipe of the demo's base model: honest next-token training on the corpus, stopped early.

tasks (training split) ──► answer in order | attempt at the parallel format ──► (prompt ids, response ids)
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_npr.data.prompts import ASSETS, PromptEncoder, instruction_text
from megatron_npr.data.seeds import derive_seed
from megatron_npr.data.synthetic_tasks import draw_task
from megatron_npr.data.synthetic_tokenizer import END, demo_tokenizer
from megatron_npr.demo.corpus import parallel_answer, sequential_answer

FOLDER = ASSETS / "demo_base"
PARALLEL_SHARE = 0.5
"""Share of the sequences that carry the instruction to work in parallel."""

SEQUENCES_PER_UPDATE = 32
LR = 2e-3
"""Constant after the warm-up: the model stops while it still learns, so there is nothing to anneal to."""

WARMUP_UPDATES = 100
STOP_LOSS = 0.05
"""Training ends when the running loss reaches this (seed 0: after 748 updates, seed 1: 692). A number of updates
would not do: the arithmetic is learned of a sudden, and when differs from seed to seed and machine to machine."""

LOSS_MEMORY = 0.95
"""Share of the last value in the running loss."""

MAX_UPDATES = 2000
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
GRAD_CLIP = 1.0
MAX_PROMPT_TOKENS = 128

ARCHITECTURE = {
    "num_hidden_layers": 8,
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


def base_sequences(seed: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Endless (prompt ids [P], response ids [R], EOS included); the loss is on the responses."""
    tokenizer = demo_tokenizer()
    rng = random.Random(derive_seed("base corpus", seed))
    encoders = {
        mode: PromptEncoder(tokenizer, instruction_text(mode, demo=True), max_prompt_tokens=MAX_PROMPT_TOKENS)
        for mode in ("parallel", "sequential")
    }
    while True:
        task = draw_task(rng)
        if task.split != "train":
            continue
        parallel = rng.random() < PARALLEL_SHARE
        answer = parallel_answer(task, rng) if parallel else sequential_answer(task)
        prompt_ids = encoders["parallel" if parallel else "sequential"].encode(task.problem("corpus"))
        yield prompt_ids, np.asarray(tokenizer.encode(answer + END, add_special_tokens=False), np.int32)
