"""The layout's tag machine against the grammar's: equal violation, equal token, on millions of random responses.

    random texts ──► packed into rows ──► branch_layout (C++): status and token of every segment ─┐
               └──► Parser (Python), one response at a time: its structural violation ────────────┴──► equal?

`make fuzz` runs it as `grammar_fuzz.py COUNT SEED`. A third of the texts is well-formed, a third well-formed with
tokens replaced, removed or put in (and cut by chance), a third starts well and goes on with noise.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch

from npr_engine.language.grammar import Grammar
from npr_engine.testing import EOS, PIECES, VOCABULARY
from npr_ext import Violation, branch_layout

TAGS = VOCABULARY.tags
TEXT = range(max(TAGS.as_tuple()) + 1, len(PIECES) + 2)  # two ids that no vocabulary has
TOKENS = (*TAGS.as_tuple(), *TEXT)
RESPONSES_IN_ROW = 4000


def text(rng: random.Random, longest: int) -> list[int]:
    """Tokens that are no tags."""
    return [rng.choice(TEXT) for _ in range(rng.randrange(longest + 1))]


def well_formed(rng: random.Random) -> list[int]:
    """Up to three blocks of up to four branches, gaps and texts of a few tokens."""
    ids = text(rng, 3)
    for _ in range(rng.randrange(4)):
        branches = 1 + rng.randrange(4)
        ids.append(TAGS.guideline)
        for _ in range(branches):
            ids += [*text(rng, 1), TAGS.plan, *text(rng, 2), TAGS.plan_end]
        ids += [*text(rng, 1), TAGS.guideline_end]
        for _ in range(branches):
            ids += [*text(rng, 1), TAGS.step, *text(rng, 2), TAGS.step_end]
        ids += [*text(rng, 1), TAGS.takeaway, *text(rng, 2), TAGS.takeaway_end]
    return ids + text(rng, 3)


def mutated(rng: random.Random) -> list[int]:
    """A well-formed response with one to three edits; every other one is cut, too."""
    ids = well_formed(rng)
    for _ in range(1 + rng.randrange(3)):
        place = rng.randrange(len(ids) + 1)
        ids[place : place + rng.randrange(2)] = rng.choices(TOKENS, k=rng.randrange(2))
    return ids[: rng.randrange(len(ids) + 1)] if rng.random() < 0.5 else ids


def derailed(rng: random.Random) -> list[int]:
    """A well-formed response up to any token, then noise of which most is tags."""
    ids = well_formed(rng)
    tags = TAGS.as_tuple()
    noise = [rng.choice(tags if rng.random() < 0.7 else TEXT) for _ in range(rng.randrange(12))]
    return ids[: rng.randrange(len(ids) + 1)] + noise


def texts(rng: random.Random) -> Iterator[list[int]]:
    """The inputs, without end."""
    while True:
        yield well_formed(rng)
        yield mutated(rng)
        yield derailed(rng)


def compare(grammar: Grammar, responses: list[list[int]], found: Counter[Violation]) -> None:
    """Counts the violations of a packed row; ends the process at the first difference."""
    bounds = torch.tensor([0, *map(len, responses)]).cumsum(0)
    layout = branch_layout(
        torch.tensor([token for ids in responses for token in ids], dtype=torch.int32),
        tags=TAGS,
        prompt_lengths=torch.zeros(len(responses), dtype=torch.int64),
        cu_seqlens=bounds,
    )
    violations = {each.segment: each for each in layout.violations()}
    for segment, (ids, begin) in enumerate(zip(responses, bounds.tolist(), strict=False)):
        structural = grammar.read(ids).structural
        expected = None if structural is None else (structural.violation, structural.token_index)
        ours = violations.get(segment)
        actual = None if ours is None else (ours.violation, ours.token_index - begin)
        if actual != expected:
            sys.exit(f"grammar_fuzz: {ids}: the layout says {actual}, the grammar {expected}")
        found[Violation.OK if expected is None else expected[0]] += 1


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    assert EOS not in TOKENS  # it ends a response for the grammar and is text to the layout
    inputs = texts(random.Random(seed))
    grammar, found = Grammar(VOCABULARY), Counter[Violation]()
    for done in range(0, count, RESPONSES_IN_ROW):
        compare(grammar, list(islice(inputs, min(RESPONSES_IN_ROW, count - done))), found)
    kinds = ", ".join(f"{violation.name} {number}" for violation, number in sorted(found.items()))
    print(f"grammar_fuzz: {count} responses, no difference ({kinds})")


if __name__ == "__main__":
    main()
