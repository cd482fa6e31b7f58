"""Rejection sampling (between stages 1 and 2): of up to `trials` responses a problem, keep the first right and valid one.

problems ─► rounds of one response for each problem still open ─► verifier + grammar ─► samples.jsonl
"""

from __future__ import annotations

from pathlib import Path

from megatron_npr.config import SampleConfig
from megatron_npr.monitor import mean, monitored
from megatron_npr.problems import training_prompts
from megatron_npr.prompts import EncodedProblem
from megatron_npr.rollouts import collect
from megatron_npr.rounds import Turn
from megatron_npr.samples import SftSample, write_samples
from megatron_npr.scoring import Scored, score
from megatron_npr.session import Session, folder_engine, open_session
from megatron_npr.sft import canonical_ids
from megatron_npr.verifier import Verifier


def run(config: SampleConfig) -> Path:
    """Sample, keep, write; returns the path of the samples."""
    session = open_session(config, config.run, config.model, config.parallel)
    with Verifier() as verifier:
        world = session.world
        engine = folder_engine(session, config.rollout)
        still_open = list(training_prompts(session, config.data))
        kept: dict[int, SftSample] = {}  # by the problem's row
        target = config.sample.target or len(still_open)
        with monitored(
            "sample", config.run, config.log, world, total=config.sample.trials, unit="trials"
        ) as monitor:
            for trial in range(config.sample.trials):
                if not still_open or len(kept) >= target:
                    break
                settings = config.rollout.model_copy(update={"samples_per_prompt": 1})
                turns = [Turn(prompt, attempt=trial) for prompt in still_open]
                groups = collect(engine, world, turns, settings, identity=(config.run.seed, "sample"))
                scored = score(
                    session.grammar, verifier, groups, [item.problem.answer for item in still_open]
                )
                for item in scored:
                    if item.valid and item.correct:
                        prompt = still_open[item.group]
                        kept[prompt.row] = accepted(session, prompt, item)
                monitor.step(
                    trial,
                    tokens=sum(item.rollout.num_tokens for item in scored),
                    shown=("kept",),
                    kept=len(kept),
                    tried=len(still_open),
                    format_valid=mean(item.valid for item in scored),
                    accuracy=mean(item.correct for item in scored),
                )
                still_open = [item for item in still_open if item.row not in kept]
        path = config.run.dir / config.sample.out
        if world.is_main:
            write_samples(path, list(kept.values())[:target])
    return path


def accepted(session: Session, prompt: EncodedProblem, item: Scored) -> SftSample:
    """The response in canonical form: what the model wrote, tokenised piece by piece as the engine writes it."""
    response_ids = canonical_ids(item.rollout.token_ids, session.grammar)
    return SftSample(
        problem_id=prompt.problem.problem_id,
        prompt_ids=prompt.prompt_ids.tolist(),
        response_ids=[int(token) for token in response_ids],
        text=session.vocabulary.text([int(token) for token in response_ids]),
    )
