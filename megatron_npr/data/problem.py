"""A problem: what the model is asked and what is right."""

from __future__ import annotations

from dataclasses import dataclass

from npr_ext.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A question and its gold answer in LaTeX, without `\\boxed`. `problem_id` is unique in its set."""

    problem_id: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise UserError(f"problem {self.problem_id!r} has an empty question: remove it or write one")
        if not self.answer.strip():
            raise UserError(f"problem {self.problem_id!r} has an empty answer: remove it or write one")
