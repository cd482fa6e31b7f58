"""Prompt ids: question and instruction in the tokenizer's chat template.

Problem + instruction ──► chat template ──► token ids, or counted and skipped when longer than the limit
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_npr.data.problem import Problem
from npr_ext.errors import UserError

Mode: TypeAlias = Literal["parallel", "sequential"]

ASSETS = Path(__file__).parents[1] / "assets"


def instruction_text(mode: Mode, *, demo: bool = False, path: Path | None = None, table: str = "data") -> str:
    """The instruction of a mode: the shipped one, the demo's short one, or a file of one's own (`table`.instruction)."""
    path = path or ASSETS / (f"instruction_{mode}_demo.txt" if demo else f"instruction_{mode}.txt")
    if not path.is_file():
        raise UserError(f"no instruction file {path}: leave {table}.instruction out for the shipped one")
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise UserError(
            f"the instruction file {path} is empty: leave {table}.instruction out for the shipped one"
        )
    return text


@dataclass(frozen=True)
class EncodedProblem:
    """A problem, its row among those that were read, and its prompt ids, int32 [P]."""

    problem: Problem
    row: int
    prompt_ids: NDArray[np.int32]


@dataclass(frozen=True)
class EncodedProblems:
    """Problems that fit, in order, and how many were too long."""

    kept: tuple[EncodedProblem, ...]
    num_skipped: int


class PromptEncoder:
    """Turns problems into prompts; the instruction follows the question in the user's message."""

    def __init__(
        self, tokenizer: Any, instruction: str, *, max_prompt_tokens: int, table: str = "data"
    ) -> None:
        """`table` of the configuration: the one whose key is the limit."""
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: use an instruct model's tokenizer")
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.max_prompt_tokens, self._table = max_prompt_tokens, table

    def text(self, problem: Problem) -> str:
        """The prompt up to and including the opening of the assistant's turn."""
        message = {"role": "user", "content": f"{problem.question}\n{self.instruction}"}
        return str(
            self.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        )

    def encode(self, problem: Problem) -> NDArray[np.int32]:
        """Prompt ids, int32 [P], however long."""
        return np.asarray(self.tokenizer.encode(self.text(problem), add_special_tokens=False), np.int32)

    def encode_all(self, problems: Iterable[Problem]) -> EncodedProblems:
        """The problems whose prompts fit; UserError when none does."""
        encoded = [EncodedProblem(problem, row, self.encode(problem)) for row, problem in enumerate(problems)]
        kept = tuple(item for item in encoded if len(item.prompt_ids) <= self.max_prompt_tokens)
        if encoded and not kept:
            shortest = min(len(item.prompt_ids) for item in encoded)
            raise UserError(
                f"all {len(encoded)} prompts are longer than {self._table}.max_prompt_tokens = "
                f"{self.max_prompt_tokens} (the shortest has {shortest}): raise the limit"
            )
        return EncodedProblems(kept, len(encoded) - len(kept))
