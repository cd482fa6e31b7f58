"""Rounds out of shuffled passes: every turn of a run is another one, whatever the sizes."""

from collections import Counter

import numpy as np
import pytest

from megatron_npr.data.problem import Problem
from megatron_npr.data.prompts import EncodedProblem
from megatron_npr.data.rounds import Turn, round_places, round_turns


def prompts(count: int) -> list[EncodedProblem]:
    """Problems that all have one and the same name."""
    return [
        EncodedProblem(Problem("same", "1+1?", "2"), row, np.array([1], np.int32)) for row in range(count)
    ]


@pytest.mark.parametrize(
    ("num_items", "per_round"), [(1, 1), (1, 4), (3, 4), (3, 10), (4, 4), (10, 3), (24, 10), (7, 5)]
)
def test_no_turn_of_a_run_is_another_one_and_a_pass_has_every_row_once(
    num_items: int, per_round: int
) -> None:
    turns = [turn for step in range(9) for turn in round_turns(prompts(num_items), per_round, step, seed=3)]
    assert len({turn.identity for turn in turns}) == len(turns) == 9 * per_round
    for epoch in range(9 * per_round // num_items):
        rows = [turn.prompt.row for turn in turns if turn.epoch == epoch]
        assert sorted(rows) == list(range(num_items))


def test_the_order_does_not_depend_on_how_many_make_a_round() -> None:
    by_tens = [place for step in range(12) for place in round_places(24, 10, step, seed=1)]
    by_threes = [place for step in range(40) for place in round_places(24, 3, step, seed=1)]
    assert by_tens == by_threes


def test_passes_and_seeds_shuffle_differently() -> None:
    orders = [
        tuple(place.row for place in round_places(50, 50, step, seed)) for step in range(3) for seed in (0, 1)
    ]
    assert max(Counter(orders).values()) == 1


def test_tries_at_a_problem_are_turns_of_their_own() -> None:
    (prompt,) = prompts(1)
    assert len({Turn(prompt, attempt=attempt).identity for attempt in range(5)}) == 5
