"""`npr bench text`: what readers of model text make of a megabyte that was written to be slow to read.

unit of text x N ─► tokens of the demo's vocabulary ─► every reader, at half of the size and at all of it

A reader whose time grows with its text takes twice as long for twice as much (`growth` 2); a quadratic one four times.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from megatron_npr.bench.cpu.text_readers import READERS, Tools
from megatron_npr.data.prompts import PromptEncoder
from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from megatron_npr.rl.verifier import Verifier
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary

MEGABYTE = 1 << 20
BLOCK = "<guideline>\n<plan>1: a</plan>\n</guideline>\n<step>\n1: b\n</step>\n<takeaway>\nc\n</takeaway>\n"
HOSTILE = {
    "opened boxes": "\\boxed{",
    "closed boxes": "\\boxed{}",
    "opening braces": "{",
    "closing braces": "}",
    "backslashes": "\\",
    "digits": "1",
    "spaces": " ",
    "newlines": "\n",
    "almost a tag": "<step",
    "almost a stop": "ENDEN",
    "the beginning of a stop": "N",
    "blocks": BLOCK,
    "plans": "<plan>1: a</plan>\n",
    "guidelines": "<guideline>\n",
}


@dataclass(frozen=True)
class ReadingCost:
    """Seconds of processor time of one reader for one kind of text, at half of `num_bytes` and at all of them."""

    reader: str
    text: str
    num_bytes: int
    seconds_of_half: float
    seconds: float

    @property
    def growth(self) -> float:
        return self.seconds / self.seconds_of_half


def measure(num_bytes: int = MEGABYTE, kinds: Mapping[str, str] = HOSTILE) -> dict[str, object]:
    """Every reader of every kind of text."""
    with tools(num_bytes) as read_with:
        costs = [
            cost_of(read_with, reader, name, unit, num_bytes)
            for reader in READERS
            for name, unit in kinds.items()
        ]
    return {
        "largest_growth": max(cost.growth for cost in costs),
        "slowest_seconds": max(cost.seconds for cost in costs),
        "costs": [{**asdict(cost), "growth": cost.growth} for cost in costs],
    }


@contextlib.contextmanager
def tools(num_bytes: int) -> Iterator[Tools]:
    """What reads texts of up to `num_bytes`."""
    tokenizer = demo_tokenizer()
    with Verifier(1) as verifier:
        yield Tools(
            Grammar(Vocabulary.from_tokenizer(tokenizer)),
            PromptEncoder(tokenizer, "", max_prompt_tokens=num_bytes),
            verifier,
        )


def cost_of(tools: Tools, reader: str, name: str, unit: str, num_bytes: int) -> ReadingCost:
    """What one reader takes for one kind of text."""

    def seconds(size: int) -> float:
        text, ids = content_of(tools, unit, size)
        began = time.process_time()
        READERS[reader](tools, text, ids)
        return time.process_time() - began

    return ReadingCost(reader, name, num_bytes, seconds(num_bytes // 2), seconds(num_bytes))


def content_of(tools: Tools, unit: str, num_bytes: int) -> tuple[str, list[int]]:
    """As many units as fit, as text and as token ids."""
    count = num_bytes // len(unit)
    return unit * count, encode_response(unit, tools.grammar.vocabulary)[:-1].tolist() * count
