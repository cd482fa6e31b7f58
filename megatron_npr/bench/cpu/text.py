"""`npr bench text`: what readers of model text make of a megabyte that was written to be slow to read.

unit of text x N ─► tokens of the demo's vocabulary ─► every reader, at half of the size and at all of it

A reader whose time grows with its text takes twice as long for twice as much (`growth` 2); a quadratic one four times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.data.synthetic_tokenizer import demo_tokenizer
from megatron_npr.rl.rewards import format_reward
from megatron_npr.server.text.transcript import Transcript
from npr_engine.language.boxed import last_boxed
from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.scheduler.streaming import TokenEvent

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
    "blocks": BLOCK,
    "plans": "<plan>1: a</plan>\n",
    "guidelines": "<guideline>\n",
}
STOPS = ("ENDEND!", "N" * 256)


@dataclass(frozen=True)
class ReadingCost:
    """Seconds of one reader for one kind of text, at half of `num_bytes` and at all of them."""

    reader: str
    text: str
    num_bytes: int
    seconds_of_half: float
    seconds: float

    @property
    def growth(self) -> float:
        return self.seconds / self.seconds_of_half


def measure(num_bytes: int = MEGABYTE) -> dict[str, object]:
    """Every reader of every kind of text."""
    grammar = Grammar(Vocabulary.from_tokenizer(demo_tokenizer()))
    costs = [
        cost_of(grammar, reader, name, unit, num_bytes)
        for reader in READERS
        for name, unit in HOSTILE.items()
    ]
    return {
        "largest_growth": max(cost.growth for cost in costs),
        "slowest_seconds": max(cost.seconds for cost in costs),
        "costs": [{**asdict(cost), "growth": cost.growth} for cost in costs],
    }


def cost_of(grammar: Grammar, reader: str, name: str, unit: str, num_bytes: int) -> ReadingCost:
    """Of one reader and one kind."""
    unit_ids = encode_response(unit, grammar.vocabulary)[:-1].tolist()

    def seconds(size: int) -> float:
        count = size // len(unit)
        work = partial(READERS[reader], grammar, unit * count, unit_ids * count)
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return ReadingCost(reader, name, num_bytes, seconds(num_bytes // 2), seconds(num_bytes))


def _stream(grammar: Grammar, ids: Sequence[int], *, size: int, branch: int = 0) -> None:
    """Events of `size` tokens each, as a served response brings them."""
    transcript = Transcript(grammar.vocabulary, stops=STOPS)
    for start in range(0, len(ids), size):
        tokens = np.array(ids[start : start + size], np.int32)
        count = len(tokens)
        forced, logprobs = np.zeros(count, np.bool_), np.zeros(count, np.float32)
        transcript.push(TokenEvent("bench", branch, tokens, forced, logprobs))
    transcript.end()


Reader = Callable[[Grammar, str, list[int]], object]
READERS: dict[str, Reader] = {
    "last_boxed": lambda grammar, text, ids: last_boxed(text),
    "grammar.read": lambda grammar, text, ids: grammar.read(ids, require_block=True),
    "format_reward": lambda grammar, text, ids: format_reward(grammar, ids),
    "encode_response": lambda grammar, text, ids: encode_response(text, grammar.vocabulary),
    "stream of tokens": lambda grammar, text, ids: _stream(grammar, ids, size=16),
    "stream in one event": lambda grammar, text, ids: _stream(grammar, ids, size=len(ids)),
    "stream of a later branch": lambda grammar, text, ids: _stream(grammar, ids, size=16, branch=2),
}
"""By name: takes the grammar, the text, and its token ids."""
