"""From a setting to prompts: a file of problems, or the demo's generated ones."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_npr.config import DataSettings, EvalSettings
from megatron_npr.data.problem import Problem
from megatron_npr.data.problem_file import load_problems
from megatron_npr.data.prompts import EncodedProblem, Mode, PromptEncoder, instruction_text
from megatron_npr.data.synthetic_tasks import demo_problems
from megatron_npr.runtime.process_world import on_first_rank
from megatron_npr.training.session import Session

DEMO = "demo"
DEMO_TRAIN_COUNT = 4096
DEMO_HELDOUT_COUNT = 512
HELDOUT_SEED = 0
"""The held-out problems are the same in every run, whatever its seed."""


def training_prompts(session: Session, data: DataSettings) -> tuple[EncodedProblem, ...]:
    """The training problems as prompts, as rank 0 reads them; those over the limit are counted, reported and left out.
    Collective."""

    def read() -> tuple[EncodedProblem, ...]:
        if data.train == DEMO:
            problems = demo_problems("train", data.count or DEMO_TRAIN_COUNT, session.run.seed)
        else:
            problems = load_problems(Path(data.train), data.count)
        return encode(session, problems, data.mode, data, demo=data.train == DEMO)

    return on_first_rank(session.world, read)


def evaluation_prompts(session: Session, settings: EvalSettings, mode: Mode) -> tuple[EncodedProblem, ...]:
    """The evaluation problems as prompts of one mode, as rank 0 reads them. Collective."""

    def read() -> tuple[EncodedProblem, ...]:
        if settings.problems == DEMO:
            problems = demo_problems("heldout", settings.count or DEMO_HELDOUT_COUNT, HELDOUT_SEED)
        else:
            problems = load_problems(Path(settings.problems), settings.count)
        return encode(session, problems, mode, settings, demo=settings.problems == DEMO)

    return on_first_rank(session.world, read)


def encode(
    session: Session,
    problems: list[Problem],
    mode: Mode,
    settings: DataSettings | EvalSettings,
    *,
    demo: bool,
) -> tuple[EncodedProblem, ...]:
    """Problems with a mode's instruction in the tokenizer's chat template."""
    limit, table = settings.max_prompt_tokens, settings.table
    text = instruction_text(mode, demo=demo, path=settings.instruction, table=table)
    encoder = PromptEncoder(session.tokenizer, text, max_prompt_tokens=limit, table=table)
    encoded = encoder.encode_all(problems)
    if encoded.num_skipped:
        print(
            f"skipped {encoded.num_skipped} of {len(problems)} problems: prompts over {limit} tokens",
            file=sys.stderr,
        )
    return encoded.kept
