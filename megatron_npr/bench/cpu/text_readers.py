"""Every reader of model text, by name: what `npr bench text` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_npr.data.problem import Problem
from megatron_npr.data.prompts import PromptEncoder
from megatron_npr.data.sft_encoding import encode_response
from megatron_npr.report.records import Timeline
from megatron_npr.report.timeline import drawing, response_html
from megatron_npr.rl.rewards import format_reward
from megatron_npr.rl.verifier import Verifier
from megatron_npr.rollout.rollout_file import pieces
from megatron_npr.server.text.transcript import Transcript
from npr_engine.language.boxed import last_boxed
from npr_engine.language.grammar import Grammar
from npr_engine.rollout import Rollout
from npr_engine.scheduler.streaming import TokenEvent
from npr_engine.trace import examine

STOPS = ("ENDEND!", "N" * 256)
EVENT = 16
"""Tokens of an event, as a served response brings them."""


@dataclass(frozen=True)
class Tools:
    """What readers read with."""

    grammar: Grammar
    prompts: PromptEncoder
    verifier: Verifier


def _stream(
    grammar: Grammar, ids: Sequence[int], *, size: int = EVENT, branch: int = 0, interleave: bool = False
) -> None:
    """Events of `size` tokens each."""
    transcript = Transcript(grammar.vocabulary, stops=STOPS, interleave=interleave)
    for start in range(0, len(ids), size):
        tokens = np.array(ids[start : start + size], np.int32)
        count = len(tokens)
        forced, logprobs = np.zeros(count, np.bool_), np.zeros(count, np.float32)
        transcript.push(TokenEvent("bench", branch, tokens, forced, logprobs))
    transcript.end()


def _many_branches(ids: Sequence[int]) -> Rollout:
    """A block with a branch for every token but the first; no two of them in one step."""
    numbers = np.arange(len(ids), dtype=np.int32)
    logprobs, forced = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.bool_)
    return Rollout(
        request_id="bench",
        prompt_ids=np.zeros(1, np.int32),
        token_ids=np.array(ids, np.int32),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        forced=forced,
        branch_ids=numbers,
        decode_steps=numbers,
        positions=numbers + 1,
        finish_reason="eos",
        branching=True,
        constrained=False,
        weights_version=0,
    )


def _report(grammar: Grammar, ids: Sequence[int]) -> None:
    rollout = _many_branches(ids)
    timeline = Timeline("", "", False, rollout, pieces(rollout, grammar.vocabulary))
    response_html(timeline)
    drawing(timeline)


Reader = Callable[[Tools, str, list[int]], object]
READERS: Mapping[str, Reader] = {
    "last_boxed": lambda tools, text, ids: last_boxed(text),
    "verifier": lambda tools, text, ids: tools.verifier.correct(text, "12"),
    "grammar.read": lambda tools, text, ids: tools.grammar.read(ids, require_block=True),
    "format_reward": lambda tools, text, ids: format_reward(tools.grammar, ids),
    "encode_response": lambda tools, text, ids: encode_response(text, tools.grammar.vocabulary),
    "prompt": lambda tools, text, ids: tools.prompts.encode(Problem("bench", f"?{text}", "12")),
    "stream of tokens": lambda tools, text, ids: _stream(tools.grammar, ids),
    "stream in one event": lambda tools, text, ids: _stream(tools.grammar, ids, size=len(ids)),
    "stream of a later branch": lambda tools, text, ids: _stream(tools.grammar, ids, branch=2),
    "stream, interleaved": lambda tools, text, ids: _stream(tools.grammar, ids, branch=2, interleave=True),
    "trace": lambda tools, text, ids: examine(_many_branches(ids)),
    "report": lambda tools, text, ids: _report(tools.grammar, ids),
}
"""Each takes the tools, the text, and its token ids."""
