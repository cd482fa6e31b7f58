"""Rollouts -> what the stages and the evaluation decide by: validity, format reward, correctness.

rollouts [turn][sample] ──► those of this rank's engine: grammar (format) + verifier (answer) ──► Judged ──► every rank: Scored

A verdict may depend on how busy a machine is. Each response is judged once, by the first rank of the engine that sampled it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_npr.config import RolloutSettings
from megatron_npr.data.rounds import Turn
from megatron_npr.monitoring.jumps import Share
from megatron_npr.monitoring.spans import span
from megatron_npr.rl.rewards import accuracy_reward, reward_of_reading
from megatron_npr.rl.verifier import Verdict, Verifier
from megatron_npr.rollout.engine_groups import EngineShare
from megatron_npr.runtime.agreement import agree
from megatron_npr.runtime.process_world import World
from npr_engine.language.grammar import Grammar, last_boxed
from npr_engine.rollout import Rollout
from npr_ext.layout.violations import Violation

JUDGED = np.dtype([("defect", "i2"), ("format", "f8"), ("verdict", "i1")])
"""What travels of a response that was judged: the first defect (a Violation), the format reward, the Verdict."""

REASONS = tuple(
    violation.name
    for violation in Violation
    if violation is not Violation.OK
    and not violation.name.startswith("BAD_")  # mistakes of a layout's caller
)
"""Why a response can be malformed."""


@dataclass(frozen=True)
class Scored:
    """A rollout of turn `group`.

    `defect`: the first one of the strict grammar, with at least one block required (OK: none); `format`: the stage-1 reward
    (0 when valid and no text is too short); `verdict`: on the answer.
    """

    rollout: Rollout
    group: int
    defect: Violation
    format: float
    verdict: Verdict

    @property
    def valid(self) -> bool:
        """Strictly well-formed, and ended by itself."""
        return self.rollout.finish_reason == "eos" and self.defect is Violation.OK

    @property
    def cut(self) -> bool:
        """Ended by a limit, of tokens or of branches."""
        return self.rollout.finish_reason in ("length", "budget")

    @property
    def correct(self) -> bool:
        return self.verdict is Verdict.RIGHT

    @property
    def accuracy_reward(self) -> float:
        return accuracy_reward(self.correct)


@span("verify")
def score(
    world: World,
    grammar: Grammar,
    verifier: Verifier,
    groups: Sequence[Sequence[Rollout]],
    turns: Sequence[Turn],
    settings: RolloutSettings,
) -> list[Scored]:
    """All rollouts that `collect` gave for these turns, in order, the same on every rank. Collective."""
    share = EngineShare.of(world, settings)
    mine = share.own(len(turns)) if share.speaks else range(0)
    claims = [(rollout, turns[index].prompt.problem.answer) for index in mine for rollout in groups[index]]
    ours = judge(grammar, verifier, claims)
    parts: list[Any] = [ours]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, ours)
    judged = np.empty((len(turns), settings.samples_per_prompt), JUDGED)
    for engine in range(share.num_engines):
        own = share.turns_of(engine, len(turns))
        judged[own] = parts[engine * share.size].reshape(len(own), -1)
    return [
        Scored(rollout, group, Violation(defect), form, Verdict(verdict))
        for group, rollouts in enumerate(groups)
        for rollout, (defect, form, verdict) in zip(rollouts, judged[group].tolist(), strict=True)
    ]


def outcomes(scored: Sequence[Scored]) -> dict[str, Share]:
    """How many responses were cut, were malformed (by reason), or have an answer that was not decided; always all names."""
    defects = Counter(item.defect.name for item in scored if not item.cut)
    verdicts = Counter(item.verdict for item in scored)
    counts = {
        "cut": sum(item.cut for item in scored),
        "verifier_timeouts": verdicts[Verdict.TIMED_OUT],
        "verifier_deaths": verdicts[Verdict.DIED],
        "malformed": defects.total() - defects[Violation.OK.name],
    }
    counts |= {f"malformed/{reason}": defects[reason] for reason in REASONS}
    return {name: Share(count, len(scored)) for name, count in counts.items()}


def invalid(scored: Sequence[Scored]) -> Share:
    """Responses that were cut or malformed, where blocks are asked for."""
    return Share(sum(not item.valid for item in scored), len(scored))


def agree_on_round(
    step: int, turns: Sequence[Turn], scored: Sequence[Scored], updates: Sequence[NDArray[np.float64]] = ()
) -> None:
    """`agree` on a round of rollouts; `updates`: the advantages of the samples of each update that follows. Collective."""
    agree(
        f"step {step}",
        problems=(np.array([*turn.identity, *turn.prompt.prompt_ids]) for turn in turns),
        rollouts=(part for item in scored for part in (item.rollout.token_ids, item.rollout.finish_reason)),
        verdicts=[np.array([(item.defect, item.format, item.verdict) for item in scored], JUDGED)],
        updates=updates,
    )


def judge(grammar: Grammar, verifier: Verifier, claims: Sequence[tuple[Rollout, str]]) -> NDArray[np.void]:
    """Responses beside their gold answers, [n] of JUDGED. An answer is the last \\boxed of a response that ended by itself,
    well-formed or not."""
    verdicts = verifier.judge([(answer_of(grammar, rollout), gold) for rollout, gold in claims])
    judged = np.empty(len(claims), JUDGED)
    for index, ((rollout, _), verdict) in enumerate(zip(claims, verdicts, strict=True)):
        reading = grammar.read(rollout.token_ids, require_block=True)
        defect = Violation.OK if reading.defect is None else reading.defect.violation
        judged[index] = defect, reward_of_reading(grammar, rollout.token_ids, reading), verdict
    return judged


def answer_of(grammar: Grammar, rollout: Rollout) -> str | None:
    """What the last \\boxed{...} of a finished response holds; None where it was cut or has none."""
    if rollout.finish_reason != "eos":
        return None
    return last_boxed(grammar.vocabulary.text(rollout.token_ids.tolist()))
