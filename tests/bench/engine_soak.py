"""Soak: a random tiny model under load with KV memory for 30 % of what it wants; nothing may be lost or starve.

calibrate (memory for all) ─► demand ─► the same load with 30 % of it, requests coming as others end ─► Report

`make soak` runs it for 200,000 steps, `make test` for a few thousand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from npr_engine.engine import Engine, EngineConfig
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.testing import encode
from tests.support.random_model import GRAMMAR, random_model, random_weights

SHARE_OF_DEMAND = 0.3
IN_FLIGHT = 40
SIZES = EngineConfig(num_kv_slots=100_000, block_size=8, max_batch_tokens=64, max_running_requests=IN_FLIGHT)
CALIBRATION_STEPS = 800
NEW_WEIGHTS_EVERY = 5_000
CHECK_EVERY = 50
PROMPTS = [encode(text) for text in ("a", "ab=?", "abcdefgh" * 4, "12+34=" * 10, "<plan>a</plan>", "h" * 25)]


@dataclass(frozen=True)
class Report:
    """What a soak found.

    Attributes:
        demand_slots: KV slots that the load holds at once where there are as many as it wants.
        kv_utilisation: live slots / all slots, from the tables, when memory ran out for the first time.
        reasons: how many responses ended for which reason.
        worst_wait: the largest share of the bound that a request took from submission to end. The bound is what
            strict first come, first served gives: the steps that it and everything before it need alone, one after
            the other. 1 would be a queue without any concurrency; above 1 somebody was overtaken.
        lost_blocks: KV blocks that are not free after the last response.
    """

    steps: int
    seconds: float
    requests: int
    demand_slots: int
    kv_slots: int
    block_size: int
    kv_utilisation: float
    preemptions: int
    forks: int
    joins: int
    recomputed_share: float
    reasons: dict[str, int]
    worst_wait: float
    longest_wait_steps: int
    lost_blocks: int


@dataclass(frozen=True)
class Arrival:
    """The step that a request came in, and the requests that were in flight before it."""

    step: int
    ahead: tuple[int, ...]


class Load:
    """Keeps `IN_FLIGHT` requests in flight; request i is a pure function of (seed, i)."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.seed = engine, seed
        self.step, self.submitted = 0, 0
        self.waiting: dict[int, Arrival] = {}
        self.ended: dict[int, tuple[Arrival, int, int]] = {}  # steps that it took, steps that it needs alone
        self.reasons: Counter[str] = Counter()

    def fill(self) -> None:
        """Submits until as many are in flight as should be."""
        while len(self.waiting) < IN_FLIGHT:
            index = self.submitted
            prompt, params = request_of(self.seed, index)
            self.engine.submit(self.engine.request(prompt, params, str(index)))
            self.waiting[index] = Arrival(self.step, tuple(self.waiting))
            self.submitted += 1

    def advance(self) -> None:
        """One step; sometimes somebody gives up."""
        self.step += 1
        output = self.engine.step()
        if self.step % 97 == 0 and self.waiting:
            self.engine.abort(str(list(self.waiting)[self.step % len(self.waiting)]))
        for rollout in (*output.rollouts, *self.engine.take_output().rollouts):
            self._end(rollout)

    def _end(self, rollout: Rollout) -> None:
        arrival = self.waiting.pop(int(rollout.request_id))
        self.reasons[rollout.finish_reason.partition("(")[0]] += 1
        self.ended[int(rollout.request_id)] = arrival, self.step - arrival.step, steps_alone(rollout)

    def worst_wait(self) -> float:
        """`Report.worst_wait`, once everything has ended."""
        alone = {index: steps for index, (_, _, steps) in self.ended.items()}
        shares = [
            took / (steps + sum(alone[other] for other in arrival.ahead))
            for arrival, took, steps in self.ended.values()
        ]
        return max(shares)


def request_of(seed: int, index: int) -> tuple[list[int], SamplingParams]:
    """Mostly constrained requests, so that they fork and join; some that break the language or stop early."""
    draw = np.random.default_rng((seed, index))
    params = SamplingParams(
        max_tokens=int(draw.integers(1, 300)),
        temperature=float(draw.choice([0.0, 0.7, 1.0, 1.0, 1.5])),
        top_p=float(draw.choice([1.0, 1.0, 0.9])),
        repetition_penalty=float(draw.choice([1.0, 1.0, 1.1])),
        max_critical_path=int(draw.integers(20, 300)) if draw.random() < 0.2 else None,
        constrain=bool(draw.random() < 0.85),
        stop_token_ids=tuple(encode("9")) if draw.random() < 0.05 else (),
        seed=seed,
    )
    if draw.random() < 0.1:
        params = replace(params, branching=False, constrain=False)
    return PROMPTS[int(draw.integers(len(PROMPTS)))], params


def steps_alone(rollout: Rollout) -> int:
    """An upper bound on the steps that a response takes when it is served first, from nothing: each token of the
    critical path, two steps more a block, and its tokens once more after a preemption and new weights each."""
    sizes = SIZES.max_batch_tokens - 8
    recompute = -(-(len(rollout.prompt_ids) + rollout.num_tokens) // sizes)
    blocks = int((np.diff(rollout.branch_ids) < 0).sum()) + 1
    return rollout.critical_path + (2 + 9) * blocks + 3 * recompute + 2


def soak(steps: int, seed: int = 0) -> Report:
    """Runs the load for `steps` steps and until all of it has ended; asserts what must hold."""
    roomy = Load(Engine(random_model(seed), GRAMMAR, SIZES), seed)
    for _ in range(CALIBRATION_STEPS):
        roomy.fill()
        roomy.advance()
    demand = roomy.engine.stats().peak_blocks * SIZES.block_size

    slots = int(demand * SHARE_OF_DEMAND)
    engine = Engine(random_model(seed), GRAMMAR, replace(SIZES, num_kv_slots=slots))
    load = Load(engine, seed)
    start = time.perf_counter()
    while load.step < steps:
        load.fill()
        load.advance()
        if load.step % CHECK_EVERY == 0:
            engine.check_integrity()
        if load.step % NEW_WEIGHTS_EVERY == 0:
            version = engine.weights_version + 1
            engine.update_weights(random_weights(seed + version % 5), version)
    while load.waiting:
        load.advance()
    seconds = time.perf_counter() - start
    engine.check_integrity()
    assert sum(load.reasons.values()) == load.submitted and engine.num_unfinished == 0
    engine.weights_updated(engine.weights_version + 1)  # the prompts' KV goes
    stats = engine.stats()
    lost = stats.num_blocks - stats.free_blocks
    assert lost == 0, f"{lost} KV blocks are lost"
    worst = load.worst_wait()
    assert worst <= 1.0, f"a request took {worst:.2f} of its bound: it was overtaken"
    assert stats.preemptions > 0 and stats.kv_utilisation is not None, "memory was never short"
    return Report(
        steps=load.step,
        seconds=round(seconds, 1),
        requests=load.submitted,
        demand_slots=demand,
        kv_slots=stats.num_blocks * SIZES.block_size,
        block_size=SIZES.block_size,
        kv_utilisation=round(stats.kv_utilisation, 4),
        preemptions=stats.preemptions,
        forks=stats.forks,
        joins=stats.joins,
        recomputed_share=round(stats.recomputed_tokens / stats.computed_tokens, 4),
        reasons=dict(load.reasons),
        worst_wait=round(worst, 4),
        longest_wait_steps=max(took for _, took, _ in load.ended.values()),
        lost_blocks=lost,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak the engine; prints a report as JSON.")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(asdict(soak(arguments.steps, arguments.seed)), indent=2))


if __name__ == "__main__":
    main()
