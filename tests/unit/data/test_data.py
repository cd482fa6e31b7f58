"""Loaders: every published schema, and the one line that says what is wrong with a file."""

import json
from pathlib import Path

import pytest

from megatron_npr.data.problem_file import load_problems, problem_of
from megatron_npr.data.synthetic_tasks import demo_problems
from npr_ext.errors import UserError
from tests.support.places import SHARED


@pytest.mark.parametrize(
    "record, question, answer",
    [
        ({"question": "1+1?", "answer": "2"}, "1+1?", "2"),
        ({"problem": "1+1?", "answer": "2", "solution": "It is \\boxed{3}."}, "1+1?", "2"),
        ({"question": "How many?", "answer": "40+2 = <<40+2=42>>42\n#### 1,042"}, "How many?", "1042"),
        ({"question": "AMC?", "answer": 27.0}, "AMC?", "27"),
        ({"question": "AMC?", "answer": 2.5}, "AMC?", "2.5"),
        ({"question": "Olympiad?", "final_answer": ["$\\frac{1}{2}$"]}, "Olympiad?", "\\frac{1}{2}"),
        (
            {"problem": "Minerva?", "solution": "So \\boxed{1} or \\boxed{\\frac{3}{4}}."},
            "Minerva?",
            "\\frac{3}{4}",
        ),
        (
            {"puzzle": "Two houses.", "question": "Who?", "choices": ["Ann", "Bob"], "answer": "Bob"},
            "Two houses.\n\nWho?\nA. Ann\nB. Bob",
            "B",
        ),
        ([{"from": "human", "value": "ORZ?"}, {"ground_truth": {"value": "7"}}], "ORZ?", "7"),
    ],
)
def test_every_schema_gives_its_question_and_answer(record: object, question: str, answer: str) -> None:
    problem = problem_of(record, default_id="x")
    assert (problem.question, problem.answer) == (question, answer)


def test_a_json_list_and_jsonl_lines_load_alike(tmp_path: Path) -> None:
    records = [{"question": f"{n}+1?", "answer": str(n + 1), "id": f"sum-{n}"} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    listed = load_problems(tmp_path / "a.json")
    assert listed == load_problems(tmp_path / "a.jsonl")
    assert [problem.problem_id for problem in listed] == ["sum-0", "sum-1", "sum-2"]
    assert load_problems(tmp_path / "a.json", count=2) == listed[:2]


@pytest.mark.parametrize(
    "name, text, said",
    [
        (
            "empty.jsonl",
            '{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": "d"}\n',
            "empty.jsonl:2: empty",
        ),
        ("broken.jsonl", '{"question": "a", "answer": "b"}\n{"question": \n', "broken.jsonl:2: not JSON"),
        ("broken.json", '[{"question": "a",\n "answer" "b"}]', "broken.json:2: not JSON"),
        (
            "fields.jsonl",
            '{"prompt": "a", "answer": "b"}\n',
            "fields.jsonl:1: no text in any of the fields question",
        ),
        ("gold.jsonl", '{"question": "a"}\n', "gold.jsonl:1: none of the fields answer"),
        (
            "blank.jsonl",
            '{"question": "a", "answer": " "}\n',
            "blank.jsonl:1: problem 'blank/0' has an empty answer",
        ),
        (
            "many.json",
            '[{"question": "a", "final_answer": ["1", "2"]}]',
            "many.json: item 1: final_answer has 2",
        ),
        ("pair.json", '[[{"value": "a"}, {"truth": 1}]]', "pair.json: item 1: expected"),
        ("number.jsonl", "3\n", "number.jsonl:1: expected an object"),
        ("nothing.json", "[]", "nothing.json holds no problems"),
        ("null.json", '[{"question": "a", "answer": {"value": 1}}]', "null.json: item 1: the answer is"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_place(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_problems(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_repeated_id_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file"):
        load_problems(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder: name the"):
        load_problems(tmp_path)
    (tmp_path / "twice.jsonl").write_text('{"question": "a", "answer": "b", "id": 1}\n' * 2)
    with pytest.raises(UserError, match=r"twice.jsonl:2: id '1' was used before"):
        load_problems(tmp_path / "twice.jsonl")


@pytest.mark.shared
@pytest.mark.parametrize(
    "name, count",
    [("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319), ("math500.json", 500), ("aime25.json", 30)],
)
def test_the_shared_files_load_whole(name: str, count: int) -> None:
    problems = load_problems(SHARED / "data" / name)
    assert len(problems) == count
    assert not any("####" in problem.answer for problem in problems)


def test_more_problems_of_the_demo_than_there_can_be_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="1000000000000 problems of the demo: lower the count to at most"):
        demo_problems("heldout", 10**12, 0)
