"""The demo's problems: seeded, right, and held-out ones apart from training."""

import re

from megatron_npr.data.synthetic_tasks import Part, Task, demo_problems, demo_tasks
from megatron_npr.rl.verifier_worker import equal


def products(question: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\d+\*\d", question)))


def test_the_same_seed_gives_the_same_problems_and_another_one_others() -> None:
    first = demo_problems("train", 50, seed=3)
    assert first == demo_problems("train", 50, seed=3)
    assert {problem.question for problem in first}.isdisjoint(
        problem.question for problem in demo_problems("train", 50, seed=4)
    )
    assert (
        len({problem.problem_id for problem in first}) == len({problem.question for problem in first}) == 50
    )


def test_no_set_of_products_is_both_for_training_and_held_out() -> None:
    training = {products(problem.question) for problem in demo_problems("train", 3000, seed=0)}
    heldout = {products(problem.question) for problem in demo_problems("heldout", 600, seed=0)}
    assert training.isdisjoint(heldout)


def test_names_and_order_do_not_move_a_task_to_the_other_split() -> None:
    for task in demo_tasks("heldout", 50, seed=1):
        renamed = Task(tuple(Part("pen", part.factor, part.digit) for part in reversed(task.parts)))
        assert renamed.split == task.split == "heldout"


def test_the_answer_is_the_sorted_products_and_math_verify_minds_their_order() -> None:
    for problem in demo_problems("heldout", 5, seed=0):
        costs = sorted(int(a) * int(b) for a, b in re.findall(r"(\d+)\*(\d)", problem.question))
        assert problem.answer == "(" + ",".join(map(str, costs)) + ")"
        assert len(set(costs)) == len(costs) and 3 <= len(costs) <= 5
        assert equal(problem.answer, problem.answer)
        assert not equal("(" + ",".join(map(str, [costs[1], costs[0], *costs[2:]])) + ")", problem.answer)
