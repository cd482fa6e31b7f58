"""What the base model reads: worked answers in order, and mostly sloppy attempts at the parallel format.

    task ──► sequential answer                       (for the instruction to work in order)
        └──► parallel answer ──► one blemish or none (for the instruction to work in parallel)

This is the only place that uses gold solutions. All arithmetic in it is right: a base model that errs does
so because it was trained for few steps. No blemish is as frequent as the valid form, which RL can find.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from megatron_npr.data.synthetic_tasks import Part, Task

VALID_SHARE = 0.4
"""Share of parallel answers without a blemish."""


def work(part: Part) -> str:
    """One worked product, e.g. `pen=59*6=300+54=354`."""
    tens, ones = divmod(part.factor, 10)
    sum_text = f"{10 * tens * part.digit}+{ones * part.digit}"
    return f"{part.name}={part.factor}*{part.digit}={sum_text}={part.cost}"


def sorted_text(parts: tuple[Part, ...]) -> str:
    """The names from the lowest cost to the highest."""
    return "sorted " + " ".join(part.name for part in parts)


def boxed(parts: tuple[Part, ...]) -> str:
    return "\\boxed{" + Task(parts).answer + "}"


def sequential_answer(task: Task) -> str:
    """The worked answer without tags."""
    lines = [f"{'then' if index else 'first'} {work(part)}" for index, part in enumerate(task.parts)]
    return "\n".join((*lines, sorted_text(task.ranking), boxed(task.parts)))


@dataclass(frozen=True)
class Draft:
    """The pieces of a parallel answer before they are joined by newlines."""

    parts: tuple[Part, ...]
    plans: tuple[str, ...]
    steps: tuple[str, ...]
    guideline: tuple[str, str]
    takeaway: tuple[str, ...]
    conclusion: str

    @property
    def text(self) -> str:
        pieces = (
            self.guideline[0],
            *self.plans,
            self.guideline[1],
            *self.steps,
            *self.takeaway,
            self.conclusion,
        )
        return "\n".join(piece for piece in pieces if piece)


def plan_text(number: int, part: Part) -> str:
    return f"<plan>{number}: {part.name}</plan>"


def step_text(number: int, part: Part) -> str:
    return f"<step>\n{number}: {work(part)}\n</step>"


def parallel_draft(task: Task) -> Draft:
    """The valid parallel answer: one branch a product, the order in the takeaway, the costs at the end."""
    numbered = list(enumerate(task.parts, start=1))
    return Draft(
        parts=task.parts,
        plans=tuple(plan_text(number, part) for number, part in numbered),
        steps=tuple(step_text(number, part) for number, part in numbered),
        guideline=("<guideline>", "</guideline>"),
        takeaway=("<takeaway>", sorted_text(task.ranking), "</takeaway>"),
        conclusion=boxed(task.parts),
    )


Blemish: TypeAlias = Callable[[Draft, random.Random], Draft]


def without_a_step(draft: Draft, rng: random.Random) -> Draft:
    """One step fewer than plans, and an answer that lacks it."""
    lost = rng.randrange(len(draft.steps))
    kept = tuple(part for index, part in enumerate(draft.parts) if index != lost)
    steps = draft.steps[:lost] + draft.steps[lost + 1 :]
    ranking = Task(kept).ranking
    return replace(
        draft,
        steps=steps,
        takeaway=(draft.takeaway[0], sorted_text(ranking), draft.takeaway[2]),
        conclusion=boxed(kept),
    )


def without_a_plan(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, plans=draft.plans[:-1])


def without_plans(draft: Draft, rng: random.Random) -> Draft:
    """Steps at once."""
    return replace(draft, plans=(), guideline=("", ""))


def without_guideline_end(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, guideline=("<guideline>", ""))


def without_guideline_start(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, guideline=("", "</guideline>"))


def without_a_plan_end(draft: Draft, rng: random.Random) -> Draft:
    open_plan = rng.randrange(len(draft.plans))
    return replace(draft, plans=_edited(draft.plans, open_plan, lambda text: text.removesuffix("</plan>")))


def without_a_step_end(draft: Draft, rng: random.Random) -> Draft:
    open_step = rng.randrange(len(draft.steps))
    return replace(draft, steps=_edited(draft.steps, open_step, lambda text: text.removesuffix("\n</step>")))


def without_takeaway(draft: Draft, rng: random.Random) -> Draft:
    """From the last step to the answer."""
    return replace(draft, takeaway=())


def without_takeaway_tags(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, takeaway=draft.takeaway[1:2])


def without_takeaway_end(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, takeaway=draft.takeaway[:2])


def with_one_number_for_all(draft: Draft, rng: random.Random) -> Draft:
    """Every plan and step is number 1."""
    return replace(
        draft,
        plans=tuple(plan_text(1, part) for part in draft.parts),
        steps=tuple(step_text(1, part) for part in draft.parts),
    )


def with_preamble(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, guideline=("Work in parallel\n<guideline>", "</guideline>"))


def with_text_between_steps(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, steps=(draft.steps[0], *(f"then\n{step}" for step in draft.steps[1:])))


def without_box(draft: Draft, rng: random.Random) -> Draft:
    return replace(draft, conclusion=draft.conclusion.removeprefix("\\boxed{").removesuffix("}"))


def without_any_tag(draft: Draft, rng: random.Random) -> Draft:
    """Back to the answer in order."""
    text = sequential_answer(Task(draft.parts))
    return Draft(draft.parts, plans=(), steps=(), guideline=("", ""), takeaway=(), conclusion=text)


BLEMISHES: Mapping[Blemish, float] = {
    without_any_tag: 3.0,
    without_takeaway: 2.0,
    without_takeaway_tags: 1.5,
    without_takeaway_end: 1.0,
    without_a_step: 1.0,
    without_a_plan: 1.0,
    without_plans: 1.5,
    without_guideline_end: 1.5,
    without_guideline_start: 1.0,
    without_a_plan_end: 1.0,
    without_a_step_end: 1.5,
    with_one_number_for_all: 1.0,
    with_preamble: 1.5,
    with_text_between_steps: 1.0,
    without_box: 1.0,
}
"""Relative frequency of each blemish."""


def parallel_answer(task: Task, rng: random.Random) -> str:
    """An attempt at the parallel format: valid with probability VALID_SHARE, otherwise with one blemish."""
    draft = parallel_draft(task)
    if rng.random() < VALID_SHARE:
        return draft.text
    (blemish,) = rng.choices(list(BLEMISHES), weights=list(BLEMISHES.values()))
    return blemish(draft, rng).text


def _edited(texts: tuple[str, ...], index: int, edit: Callable[[str], str]) -> tuple[str, ...]:
    return (*texts[:index], edit(texts[index]), *texts[index + 1 :])
