"""Rollouts -> what the stages and the evaluation decide by: validity, format reward, correctness.

rollouts [prompt][sample] + gold answers ──► grammar (format) + verifier (answer) ──► Scored
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npr.rewards import accuracy_reward, reward_of_reading
from megatron_npr.verifier import Verifier
from npr_engine.grammar import Grammar, last_boxed
from npr_engine.rollout import Rollout


@dataclass(frozen=True)
class Scored:
    """A rollout of prompt `group`.

    `valid`: strictly, with at least one block; `format`: the stage-1 reward (0 when valid and no text is too short).
    """

    rollout: Rollout
    group: int
    valid: bool
    format: float
    correct: bool

    @property
    def accuracy_reward(self) -> float:
        return accuracy_reward(self.correct)


def score(
    grammar: Grammar, verifier: Verifier, groups: Sequence[Sequence[Rollout]], answers: Sequence[str]
) -> list[Scored]:
    """All rollouts in order. An answer is the last \\boxed of a response that ended by itself, well-formed or not."""
    flat = [(group, rollout) for group, rollouts in enumerate(groups) for rollout in rollouts]
    correct = verifier.correct_all([(answer_of(grammar, rollout), answers[group]) for group, rollout in flat])
    scored = []
    for (group, rollout), right in zip(flat, correct, strict=True):
        reading = grammar.read(rollout.token_ids, require_block=True)
        valid = rollout.finish_reason == "eos" and reading.defect is None
        form = reward_of_reading(grammar, rollout.token_ids, reading)
        scored.append(Scored(rollout, group, valid, form, right))
    return scored


def answer_of(grammar: Grammar, rollout: Rollout) -> str | None:
    """What the last \\boxed{...} of a finished response holds; None where it was cut or has none."""
    if rollout.finish_reason != "eos":
        return None
    return last_boxed(grammar.vocabulary.text(rollout.token_ids.tolist()))
