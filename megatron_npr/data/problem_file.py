"""Problems from the files that the field publishes.

    .json (one list) or .jsonl ──► records ──► question and answer by the first schema ──► list[Problem]

Schemas: question/problem + answer (aime, amc, hmmt, math500), `#### N` at the end of a worked answer (gsm8k),
puzzle + question + choices + answer (ZebraLogic), final_answer as a list of one (OlympiadBench),
a `\\boxed` in solution (Minerva), and pairs of messages (Open-Reasoner-Zero).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_npr.data.problem import Problem
from megatron_npr.runtime.json_lines import file_bytes, json_value, read_json_lines
from npr_engine.language.grammar import last_boxed
from npr_ext.errors import UserError

QUESTION_FIELDS = ("question", "problem")
ANSWER_FIELDS = ("answer", "final_answer", "solution")
ID_FIELDS = ("problem_id", "unique_id", "id")


def load_problems(path: Path | str, count: int | None = None) -> list[Problem]:
    """The first `count` problems (None: all) of a JSON or JSONL file; UserError names file and line."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the .json or .jsonl file in it")
    if not path.is_file():
        raise UserError(f"no data file {path}: give the path of a .json or .jsonl file")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(
            f"{path} is a table: write it as JSON lines (pandas: DataFrame.to_json(lines=True, orient='records'))"
        )
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for place, record in _records(path):
        if count is not None and len(problems) == count:
            break
        try:
            problem = problem_of(record, default_id=f"{path.stem}/{len(problems)}")
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if problem.problem_id in seen:
            raise UserError(
                f"{place}: id {problem.problem_id!r} was used before, at {seen[problem.problem_id]}"
            )
        seen[problem.problem_id] = place
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def problem_of(record: Any, default_id: str) -> Problem:
    """The problem that one record of any known schema describes."""
    if isinstance(record, list):
        return _from_messages(record, default_id)
    if not isinstance(record, dict):
        raise UserError(f"expected an object with a question and an answer, got {_short(record)}")
    identity = next(
        (str(record[field]) for field in ID_FIELDS if record.get(field) not in (None, "")), default_id
    )
    return Problem(identity, _question(record), _answer(record))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record; a place is what an error names."""
    content = file_bytes(path)
    if content.lstrip().startswith(b"[") and path.suffix != ".jsonl":
        for index, item in enumerate(json_value(content, path)):
            yield f"{path}: item {index + 1}", item
        return
    yield from read_json_lines(path)


def _question(record: dict[str, Any]) -> str:
    text = next((record[field] for field in QUESTION_FIELDS if record.get(field) is not None), None)
    if not isinstance(text, str):
        raise UserError(f"no text in any of the fields {', '.join(QUESTION_FIELDS)}: has {_fields(record)}")
    if "puzzle" in record:
        text = f"{record['puzzle']}\n\n{text}"
    if "choices" in record:
        letters = (f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(record["choices"]))
        text = "\n".join((text, *letters))
    return text


def _answer(record: dict[str, Any]) -> str:
    field = next((name for name in ANSWER_FIELDS if record.get(name) is not None), None)
    if field is None:
        raise UserError(f"none of the fields {', '.join(ANSWER_FIELDS)}: has {_fields(record)}")
    value = record[field]
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"{field} has {len(value)} answers, expected one")
        value = value[0]
    if "choices" in record and isinstance(value, str) and value in record["choices"]:
        value = chr(ord("A") + record["choices"].index(value))
    text = answer_text(value)
    if field == "solution":
        boxed = last_boxed(text)
        if not boxed:
            raise UserError("solution has no \\boxed answer")
        return boxed
    return text


def answer_text(value: object) -> str:
    """A gold answer as text: whole floats lose their fraction, worked answers everything up to `####`."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"the answer is {_short(value)}, expected a text or a number")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    _, marker, final = value.rpartition("####")
    text = final.strip().replace(",", "") if marker else value.strip()
    return (
        text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text
    )


def _from_messages(messages: list[Any], default_id: str) -> Problem:
    """Open-Reasoner-Zero: `[{"value": question}, {"ground_truth": {"value": answer}}]`."""
    try:
        question, answer = messages
        return Problem(default_id, question["value"], answer_text(answer["ground_truth"]["value"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            'expected [{"value": question}, {"ground_truth": {"value": answer}}], '
            f"got {_short(messages)}"
        ) from None


def _fields(record: dict[str, Any]) -> str:
    return ", ".join(sorted(record)) or "none"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
