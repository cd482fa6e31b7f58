"""The demo's problems: the cost of each item is a product; the answer lists all costs in ascending order.

    question   Sort by cost: pen=59*6, cup=13*5, map=43*6
    answer     (65,258,354)

The products are independent of each other (the branches); putting them into order needs no further
computation. Whether a problem is for training or held out follows from a hash of its products alone, so no
held-out problem occurs in training under other names or in another order.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_npr.data.problem import Problem
from megatron_npr.data.seeds import derive_seed
from npr_ext.errors import UserError

Split: TypeAlias = Literal["train", "heldout"]

NAMES = ("pen", "cup", "map", "hat", "box")
"""The items, in the order in which they stand in every question."""

NUM_PARTS = {3: 1, 4: 2, 5: 2}
"""Number of parts -> relative frequency."""

MOST_PROBLEMS = 1 << 20
"""Each is drawn and held in memory before a run begins; at some number there are no others left."""

MIN_FACTOR, MAX_FACTOR = 12, 99
MIN_DIGIT, MAX_DIGIT = 3, 9
HELDOUT_SHARE = 8
"""One problem in so many is held out."""


@dataclass(frozen=True)
class Part:
    """One independent computation: the cost of `name` is factor * digit."""

    name: str
    factor: int
    digit: int

    @property
    def cost(self) -> int:
        return self.factor * self.digit


@dataclass(frozen=True)
class Task:
    """The parts of a problem; their costs are distinct."""

    parts: tuple[Part, ...]

    @property
    def ranking(self) -> tuple[Part, ...]:
        """The parts from the lowest cost to the highest."""
        return tuple(sorted(self.parts, key=lambda part: part.cost))

    @property
    def question(self) -> str:
        return "Sort by cost: " + ", ".join(f"{part.name}={part.factor}*{part.digit}" for part in self.parts)

    @property
    def answer(self) -> str:
        return "(" + ",".join(str(part.cost) for part in self.ranking) + ")"

    @property
    def split(self) -> Split:
        """By hash of the products in a canonical order, names left out."""
        canonical = ";".join(sorted(f"{part.factor}*{part.digit}" for part in self.parts))
        digest = hashlib.blake2b(canonical.encode(), digest_size=8).digest()
        return "heldout" if int.from_bytes(digest, "little") % HELDOUT_SHARE == 0 else "train"

    def problem(self, problem_id: str) -> Problem:
        return Problem(problem_id, self.question, self.answer)


def draw_task(rng: random.Random) -> Task:
    """A random task of either split."""
    while True:
        (num_parts,) = rng.choices(list(NUM_PARTS), weights=list(NUM_PARTS.values()))
        parts = tuple(
            Part(name, rng.randint(MIN_FACTOR, MAX_FACTOR), rng.randint(MIN_DIGIT, MAX_DIGIT))
            for name in NAMES[:num_parts]
        )
        if len({part.cost for part in parts}) == len(parts):
            return Task(parts)


def demo_tasks(split: Split, count: int, seed: int) -> list[Task]:
    """`count` different tasks of one split."""
    rng = random.Random(derive_seed("demo tasks", split, seed))
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = draw_task(rng)
        if task.split == split:
            tasks.setdefault(task.question, task)
    return list(tasks.values())


def demo_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """`count` different problems of one split; the same seed gives the same problems. UserError for more than MOST_PROBLEMS."""
    if count > MOST_PROBLEMS:
        raise UserError(f"{count} problems of the demo: lower the count to at most {MOST_PROBLEMS:,}")
    return [
        task.problem(f"{split}-{seed}-{index}") for index, task in enumerate(demo_tasks(split, count, seed))
    ]
