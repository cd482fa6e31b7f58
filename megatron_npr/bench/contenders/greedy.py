"""Who decodes the same prompts in turns, so that all of them see the same machine.

prompts of a repeat ─► contender 1, contender 2, ... (who begins changes) ─► Decoded of each ─► medians and ratios
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from npr_engine.engine import Engine
from npr_engine.language.vocabulary import TokenClass, Vocabulary
from npr_engine.sampling import SamplingParams


@dataclass(frozen=True)
class Decoded:
    """A batch, greedily decoded: wall seconds, and the new tokens of each prompt."""

    seconds: float
    token_ids: list[list[int]]


class Contender(Protocol):
    """Decodes a batch of prompts, `num_tokens` each, past any end of sequence; idle before and after."""

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded: ...


@dataclass(frozen=True)
class Ours:
    """NPR-Engine without branches."""

    engine: Engine

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        params = SamplingParams(num_tokens, temperature=0.0, branching=False, ignore_eos=True)
        began = time.perf_counter()
        rollouts = self.engine.generate(prompts, params)
        seconds = time.perf_counter() - began
        return Decoded(seconds, [rollout.token_ids.tolist() for rollout in rollouts])


class Transformers:
    """`transformers.generate` on one of its models, where that lies: one batch with a dynamic KV cache."""

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig  # slow to import

        self._model = model
        self._model.generation_config = GenerationConfig()  # no end of sequence, greedy

    @classmethod
    def of_folder(cls, folder: Path, dtype: torch.dtype) -> Transformers:
        """The model of a folder, on the CPU."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar, enable_progress_bar

        disable_progress_bar()
        try:
            return cls(AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True))
        finally:
            enable_progress_bar()

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        ids_BP = torch.tensor(prompts, device=self._model.device)
        began = time.perf_counter()
        with torch.inference_mode():
            tokens_BT = self._model.generate(
                ids_BP, attention_mask=torch.ones_like(ids_BP), max_new_tokens=num_tokens, do_sample=False
            ).cpu()
        seconds = time.perf_counter() - began
        new_BN = tokens_BT[:, ids_BP.shape[1] :]
        assert new_BN.shape[1] == num_tokens, f"generate made {new_BN.shape[1]} tokens of {num_tokens}"
        return Decoded(seconds, new_BN.tolist())


def random_prompts(
    vocabulary: Vocabulary, batch: int, num_tokens: int, seed: tuple[int, ...]
) -> list[list[int]]:
    """`batch` different prompts of text tokens; other ones for another seed, so that no cache knows them."""
    text = np.flatnonzero(vocabulary.classes == TokenClass.TEXT)
    chosen: list[list[int]] = np.random.default_rng(seed).choice(text, (batch, num_tokens)).tolist()
    return chosen


def alternate(
    contenders: Mapping[str, Contender], batches: Sequence[Sequence[Sequence[int]]], num_tokens: int
) -> dict[str, list[Decoded]]:
    """Every contender decodes every batch, one contender after the other; each batch another one begins."""
    names = list(contenders)
    decoded: dict[str, list[Decoded]] = {name: [] for name in names}
    for turn, prompts in enumerate(batches):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            decoded[name].append(contenders[name].decode(prompts, num_tokens))
    return decoded


def tokens_per_second(runs: Sequence[Decoded]) -> float:
    """Median over the runs."""
    return statistics.median(sum(map(len, run.token_ids)) / run.seconds for run in runs)


def times_faster(ours: Sequence[Decoded], theirs: Sequence[Decoded]) -> float:
    """Their seconds over ours, batch by batch; the median, so that a noisy minute spoils one pair at most."""
    return statistics.median(other.seconds / own.seconds for own, other in zip(ours, theirs, strict=True))


def same_responses(ours: Sequence[Decoded], theirs: Sequence[Decoded]) -> float:
    """Share of responses that agree token by token (greedy decoding parts for good at the first near-tie)."""
    pairs = [
        (own, other)
        for run, other_run in zip(ours, theirs, strict=True)
        for own, other in zip(run.token_ids, other_run.token_ids, strict=True)
    ]
    return sum(own == other for own, other in pairs) / len(pairs)
