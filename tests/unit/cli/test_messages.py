"""Keys and options that messages name are there: a remedy that cannot be given is none."""

from __future__ import annotations

import argparse
import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npr import config as schema
from megatron_npr.cli.commands import STAGES, TOOLS, tool_parser
from megatron_npr.config import keys
from tests.support.places import ROOT

FILES = sorted(
    path
    for package in ("megatron_npr", "engine/npr_engine", "cuda_ext/npr_ext")
    for path in (ROOT / package).rglob("*.py")
)
KEYS = {key.name for stage in STAGES.values() for key in keys(getattr(schema, stage.config))}
TABLES = {name.split(".")[0] for name in KEYS}
OTHERS_OPTIONS = {"--nproc-per-node", "--no-deps"}
"""Options of torchrun and pip that messages may name."""


@functools.cache
def options() -> set[str]:
    """The options of all tools."""
    found = {"--help"}
    for name in TOOLS:
        found |= set(_options(tool_parser(name)))
    return found


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _options(inner)


def messages(path: Path) -> Iterator[str]:
    """The constant text of every exception that a file raises; what is put in at run time becomes a blank."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                yield "".join(_text(argument))


def _text(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.FormattedValue):
        yield "{}"
    else:
        for child in ast.iter_child_nodes(node):
            yield from _text(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_messages_name_keys_and_options_that_exist(path: Path) -> None:
    for message in messages(path):
        named = {
            f"{table}.{key}"
            for table, key in re.findall(r"\b([a-z0-9]+)\.([a-z][a-z_0-9]*)\b", message)
            if table in TABLES
        }
        files = {name for name in named if name.split(".")[1] in ("json", "jsonl", "toml", "py")}
        assert named - files <= KEYS, message
        asked = set(re.findall(r"--[a-z][a-z0-9-]*(?:\.[a-z_]+)?", message))
        assert {word for word in asked if word[2:] not in KEYS} <= options() | OTHERS_OPTIONS, message
