"""TOML file + dotted overrides -> a validated stage configuration, or ONE line that says what to change.

file.toml ──tomllib──► tables ─┐
--optimizer.lr 1e-4 ──────────┴─► keys checked against the schema ─► stage defaults below ─► pydantic ─► to_toml ─► file
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_npr.config.section import Section
from megatron_npr.config.shipped import CONFIGS
from npr_ext.errors import UserError

Config = TypeVar("Config", bound=Section)
Tables = dict[str, dict[str, Any]]

NONE = "none"
"""How a file and the command line say None."""


@dataclass(frozen=True)
class Key:
    """One setting of a stage as `--help` shows it."""

    name: str  # dotted, e.g. "optimizer.lr"
    kind: str  # e.g. "float", "fp32|bf16"
    default: str  # "" where the user has to give a value
    description: str


def load_config(cls: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (if any), put `overrides` (["--section.key", "value", ...]) on top, validate.

    Raises UserError with one line naming file or option, key, value and remedy.
    """
    read = _read_toml(path) if path is not None else {}
    origin = dict.fromkeys(_dotted(read), str(path))
    for name in origin:
        _check_key(cls, name, str(path))
    fields = _fields(cls)
    tables = {
        section: {
            key: _from_file(f"{section}.{key}", fields, value, str(path)) for key, value in table.items()
        }
        for section, table in read.items()
    }
    for name, raw in parse_overrides(overrides):
        _check_key(cls, name, f"--{name}")
        section, key = name.split(".")
        tables.setdefault(section, {})[key] = _from_text(name, fields[name].annotation, raw)
        origin[name] = "command line"
    try:
        return cls.model_validate(_with_defaults(cls, tables))
    except ValidationError as error:
        raise UserError(_one_line(error.errors()[0], origin)) from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """["--train.steps", "4", "--run.resume"] -> ("train.steps", "4"), ("run.resume", None)."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or len(option) == 2:
            raise UserError(f"unexpected argument {option!r}: overrides look like --optimizer.lr 1e-4")
        name, equals, value = option[2:].partition("=")
        if equals:
            yield name, value
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def keys(cls: type[Section]) -> list[Key]:
    """Every setting of a stage, in the order of the schema, with the stage's own default."""
    result = []
    defaults = _with_defaults(cls, {})
    for name, field in _fields(cls).items():
        section, key = name.split(".")
        value = defaults.get(section, {}).get(key)
        required = field.is_required() and key not in defaults.get(section, {})
        default = (
            "" if required else toml_value(value if key in defaults.get(section, {}) else field.get_default())
        )
        result.append(Key(name, _kind(field.annotation), default, field.description or ""))
    return result


def to_toml(config: Section) -> str:
    """The resolved configuration as a file that `load_config` reads back to an equal object.

    TOML has no null: a setting that is off is written as the "none" that switches it off.
    """
    lines: list[str] = []
    for section, table in config.model_dump().items():
        lines.append(f"[{section}]")
        lines += [
            f"{key} = {toml_value(NONE if value is None else value)}"
            for key, value in table.items()
            if f"{section}.{key}" not in config.taken_from
        ]
        lines.append("")
    return "\n".join(lines)


def _read_toml(path: Path) -> Tables:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such configuration file; those that come with npr lie in {CONFIGS}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the .toml file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: expected TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{path}: key {section!r} stands outside a table: put it under a [section]")
    return tables


def _dotted(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{section}.{key}" for section, table in tables.items() for key in table or ("",)]


def _sections(cls: type[Section]) -> dict[str, type[BaseModel]]:
    return {name: typing.cast(type[BaseModel], field.annotation) for name, field in cls.model_fields.items()}


def _fields(cls: type[Section]) -> dict[str, FieldInfo]:
    return {
        f"{s}.{k}": field
        for s, section in _sections(cls).items()
        for k, field in section.model_fields.items()
        if f"{s}.{k}" not in cls.taken_from
    }


def _check_key(cls: type[Section], name: str, where: str) -> None:
    known = _fields(cls)
    section, _, key = name.partition(".")
    if name in known or (not key and section in _sections(cls) and where != f"--{name}"):
        return
    if name in cls.taken_from:
        raise UserError(f"{where}: {name} is not of this command: set {cls.taken_from[name]}")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    elsewhere = [other for other in known if other.partition(".")[2] == key]
    similar = close or elsewhere or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {similar[0]}?" if similar else f"tables: {', '.join(_sections(cls))}"
    raise UserError(f"{where}: unknown key {name.rstrip('.')}; {hint}")


def _with_defaults(cls: type[Section], tables: Mapping[str, Mapping[str, Any]]) -> Tables:
    """Fill tables with the STAGE's defaults: a file that sets one key of a table keeps the others' values."""
    merged: Tables = {}
    for section, field in cls.model_fields.items():
        own = field.default.model_dump() if isinstance(field.default, BaseModel) else {}
        merged[section] = {**own, **tables.get(section, {})}
    return merged


def _from_file(name: str, fields: Mapping[str, FieldInfo], value: Any, place: str) -> Any:
    """A value of a file as the schema takes it: its numbers are no truth values, and "none" is None where None may be."""
    annotation = fields[name].annotation
    if isinstance(value, bool) and not _allows(annotation, bool):
        raise UserError(f"{place}: {name} = {str(value).lower()}: input should be {_kind(annotation)}")
    return None if _is_none(annotation, value) else value


def _from_text(name: str, annotation: Any, raw: str | None) -> Any:
    """A value of the command line; an option alone (`raw` None) switches on what can be switched."""
    if raw is None:
        if _allows(annotation, bool):
            return True
        raise UserError(
            f"--{name} needs a value ({_kind(annotation)}): give --{name} VALUE, or --{name}=VALUE"
        )
    if _is_none(annotation, raw):
        return None
    if typing.get_origin(annotation) is tuple:
        return [part.strip(" \"'") for part in raw.strip("[] ").split(",") if part.strip()]
    return raw


def _is_none(annotation: Any, value: Any) -> bool:
    return isinstance(value, str) and value.lower() == NONE and _allows(annotation, type(None))


def _allows(annotation: Any, kind: type) -> bool:
    """Whether a type of the schema is `kind`, or a union with it."""
    return annotation is kind or kind in typing.get_args(annotation)


def _one_line(error: ErrorDetails, origin: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] == "missing":
        return f"{name} is not set: put it into the configuration file or give --{name} VALUE"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and "." not in name:  # of several settings, which it names
        return message
    value = error["input"]
    return f"{origin.get(name, 'configuration')}: {name} = {value!r}: {message[0].lower()}{message[1:]}"


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin is tuple:
        return f"{_kind(arguments[0])},..."
    if origin in (typing.Union, types.UnionType):
        return "|".join(_kind(argument) for argument in arguments)
    if annotation is type(None):
        return "none"
    return str(annotation.__name__).lower()


def toml_value(value: Any) -> str:
    """A value as it stands in a file; "none" for None."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Path) and str(value).lower() == NONE:
        return f'"./{value}"'  # a file of that name, not the absence of one
    # The schema lets no character pass that TOML escapes otherwise.
    return json.dumps(str(value), ensure_ascii=False)
