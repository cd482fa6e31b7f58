"""The configuration that a run writes down is the one that ran: for every command, key and value, by file and by option."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_npr.config import (
    EvalConfig,
    SampleConfig,
    Section,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    load_config,
    to_toml,
)
from npr_ext.errors import UserError

COMMANDS: list[type[Section]] = [Stage1Config, SampleConfig, Stage2Config, Stage3Config, EvalConfig]
KEYS = [
    (cls, section, key)
    for cls in COMMANDS
    for section, table in cls.model_fields.items()
    for key in typing.cast(type[Section], table.annotation).model_fields
    if f"{section}.{key}" not in cls.taken_from
]


def field_of(cls: type[Section], section: str, key: str) -> FieldInfo:
    return typing.cast(type[Section], cls.model_fields[section].annotation).model_fields[key]


def kinds_of(cls: type[Section], section: str, key: str) -> set[Any]:
    """The types that the values of a key may have."""
    parts = [field_of(cls, section, key).annotation]
    while any(typing.get_origin(part) not in (None, typing.Literal) for part in parts):
        parts = [inner for part in parts for inner in _inner(part)]
    return {part for part in parts if isinstance(part, type)}


def _inner(annotation: Any) -> tuple[Any, ...]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (None, typing.Literal):
        return (annotation,)
    return arguments[:1] if origin is typing.Annotated else arguments


def keys_of(*kinds: Any) -> Any:
    """A test's parameters: every key of every command whose value may be of one of these types."""
    chosen = [key for key in KEYS if kinds_of(*key) & set(kinds)]
    return pytest.mark.parametrize(
        ("cls", "section", "key"),
        chosen,
        ids=[f"{cls.__name__}-{section}.{key}" for cls, section, key in chosen],
    )


NAMES = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), include_characters="\"'\\#=[],\u00a0\ufeff"),
    min_size=1,
    max_size=20,
)
HARD_NAMES = [
    "none",
    "None",
    "true",
    "1e5",
    "inf",
    "a\\nb",
    'say "x"',
    "'",
    '"""',
    "\\u0041",
    "é\u00a0日",
    "#",
    " x ",
]
TEXTS = st.sampled_from(HARD_NAMES) | NAMES


def required(cls: type[Section]) -> dict[str, str]:
    names = ("model.path", "data.train", "sft.data", "eval.problems")
    return {name: "given" for name in names if name.split(".")[0] in cls.model_fields}


def words(settings: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """What the schema allows at a key, from its type and bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(arguments[0], [*metadata, *_bounds(arguments[1:])])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0], []), min_size=1, max_size=3).map(tuple)
    if arguments:
        return st.one_of([values(argument, metadata) for argument in arguments])
    low, high, open_low, open_high = _range(metadata)
    simple: dict[Any, Any] = {
        type(None): st.none,
        bool: st.booleans,
        int: lambda: st.integers(low, 2**63 - 1) | st.integers(low or 0, 5000),
        float: lambda: st.floats(
            low, high, exclude_min=open_low, exclude_max=open_high, allow_nan=False, allow_infinity=False
        ),
        str: lambda: TEXTS,
        Path: lambda: TEXTS.map(Path),
    }
    drawn: st.SearchStrategy[Any] = simple[annotation]()
    return drawn


def _bounds(given: tuple[Any, ...]) -> list[Any]:
    return [bound for info in given for bound in (info.metadata if isinstance(info, FieldInfo) else [info])]


def _range(metadata: list[Any]) -> tuple[Any, Any, bool, bool]:
    low = high = None
    open_low = open_high = False
    for bound in metadata:
        if isinstance(bound, annotated_types.Ge | annotated_types.Gt):
            low = getattr(bound, "ge", getattr(bound, "gt", None))
            open_low = isinstance(bound, annotated_types.Gt)
        if isinstance(bound, annotated_types.Le | annotated_types.Lt):
            high = getattr(bound, "le", getattr(bound, "lt", None))
            open_high = isinstance(bound, annotated_types.Lt)
    return low, high, open_low, open_high


def drawn_table(table: type[Section], data: st.DataObject, cls: type[Section], name: str) -> dict[str, Any]:
    """A value for every key that a command has in a table, but for those that contradict the ones before them."""
    chosen: dict[str, Any] = {}
    for key, field in table.model_fields.items():
        if f"{name}.{key}" in cls.taken_from:
            continue
        more = {**chosen, key: data.draw(values(field.annotation, field.metadata))}
        try:
            table.model_validate({**needed(table), **more})
        except ValidationError:
            continue
        chosen = more
    return {**needed(table), **chosen}


def needed(table: type[Section]) -> dict[str, Any]:
    return {key: "given" for key, field in table.model_fields.items() if field.is_required()}


def as_word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"./{value}" if isinstance(value, Path) and str(value).lower() == "none" else str(value)


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("cls", COMMANDS)
def test_a_configuration_comes_back_from_its_file_and_from_the_command_line(
    cls: type[Section], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tables = {
        name: drawn_table(typing.cast(type[Section], field.annotation), data, cls, name)
        for name, field in cls.model_fields.items()
    }
    if cls in (Stage1Config, Stage3Config):
        tables["rollout"] |= {"prompts_per_step": 3, "samples_per_prompt": 2, "temperature": 0.5, "top_k": 0}
    if cls is SampleConfig:
        tables["rollout"] |= {"samples_per_prompt": 1}
    config = cls.model_validate(tables)
    assert_comes_back(config, tmp_path_factory.getbasetemp() / "written.toml")
    every = {f"{section}.{key}": as_word(value) for section, table in config for key, value in table}
    every = {name: word for name, word in every.items() if name not in cls.taken_from}
    assert load_config(cls, None, words(every)) == config


def assert_comes_back(config: Section, path: Path) -> None:
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(type(config), path) == config
    read = tomllib.loads(path.read_text(encoding="utf-8"))
    every = {f"{name}.{key}" for name, table in config.model_dump().items() for key in table}
    assert {f"{name}.{key}" for name, table in read.items() for key in table} == every - set(
        config.taken_from
    )


@keys_of(str, Path, type(None))
def test_odd_names_and_none_come_back_at_every_key(
    cls: type[Section], section: str, key: str, tmp_path: Path
) -> None:
    kinds = kinds_of(cls, section, key)
    for value in HARD_NAMES if {str, Path} & kinds else ["none"]:
        config = load_config(cls, None, words(required(cls) | {f"{section}.{key}": value}))
        if value.lower() == "none" and type(None) in kinds:
            assert config.model_dump()[section][key] is None
        assert_comes_back(config, tmp_path / "written.toml")


@keys_of(float)
def test_no_number_is_infinite_or_undefined(cls: type[Section], section: str, key: str) -> None:
    for value in ("inf", "-inf", "nan", "1e999"):
        with pytest.raises(UserError, match=rf"^command line: {section}\.{key} = '{value}': "):
            load_config(cls, None, words(required(cls) | {f"{section}.{key}": value}))


LETTERS = ["\n", "\r", "\t", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udc80"]


@keys_of(str, Path)
def test_a_character_that_tears_a_line_apart_is_refused_in_one(
    cls: type[Section], section: str, key: str
) -> None:
    for letter in LETTERS:
        with pytest.raises(UserError, match=rf"{section}\.{key} = .*: character 2, .* is ") as caught:
            load_config(cls, None, words(required(cls) | {f"{section}.{key}": f"a{letter}b"}))
        assert len(str(caught.value).splitlines()) == 1


@keys_of(int, float)
def test_a_number_of_a_file_is_no_truth_value(
    cls: type[Section], section: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "given.toml"
    path.write_text(f"[{section}]\n{key} = true\n")
    with pytest.raises(UserError, match=rf"{section}\.{key} = true: input should be (int|float)"):
        load_config(cls, path, words(required(cls)))
