"""The commands of `npr`: which module does each. A module is imported when its command is asked for, never before."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from npr_ext.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A command that is configured by a file: `megatron_npr.stages.<module>.run(config)`.

    Attributes:
        summary: its line in the help.
        module: in megatron_npr.stages.
        config: class in megatron_npr.config.
    """

    summary: str
    module: str
    config: str


class ToolModule(Protocol):
    """What the module of a tool offers; to import it and to fill its parser loads no torch."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its options."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and give the exit code; UserError where the user is mistaken."""


@dataclass(frozen=True)
class Tool:
    """A command with a few options of its own, in a module of its own package.

    Attributes:
        summary: its line in the help.
        module: in megatron_npr.
    """

    summary: str
    module: str

    def load(self) -> ToolModule:
        """Import the module."""
        return cast(ToolModule, importlib.import_module(f"megatron_npr.{self.module}"))


STAGES = {
    "stage1": Stage(
        "format RL (DAPO): learn to write branches, decoded sequentially", "stage1", "Stage1Config"
    ),
    "sample": Stage(
        "rejection sampling: keep right and valid responses of stage 1", "rejection_sampling", "SampleConfig"
    ),
    "stage2": Stage("parallel SFT of the base model on those samples", "stage2", "Stage2Config"),
    "stage3": Stage("native parallel RL (PAPO) with the branching engine", "stage3", "Stage3Config"),
    "eval": Stage("accuracy, validity, parallelism and speed on held-out problems", "evaluate", "EvalConfig"),
}
TOOLS = {
    "demo": Tool("all stages on the small model, with a report", "demo.command"),
    "base": Tool("make the demo's base model from nothing", "demo.base_command"),
    "report": Tool("build report.html and report.json of a finished demo again", "report.command"),
    "profile": Tool("where the time of a run goes, phase by phase", "report.profile_command"),
    "bench": Tool("measure layouts, attention, engine, weight sync, text; prints JSON", "bench.command"),
    "plan": Tool("a layout, memory and time for a model on a cluster", "planning.command"),
    "draw": Tool("draw a small response's layout: mask, tiles, timeline", "report.draw_command"),
    "convert": Tool(
        "a GGUF file, Hugging Face folder or checkpoint as a Hugging Face folder, with the tags",
        "training.convert_command",
    ),
    "serve": Tool("a model over HTTP, as OpenAI's clients know it", "server.command"),
    "trace": Tool("check rollouts for real concurrency and write a Chrome trace", "rollout.trace_command"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, *given: Any, **named: Any) -> Any:
        """The options; a path from ~/ on lies in the user's home also where the shell has left it so (`--to=~/x`)."""
        options = super().parse_args(*given, **named)
        for name, value in vars(options).items():
            if isinstance(value, Path) and value.parts[:1] == ("~",):
                setattr(options, name, value.expanduser())
        return options


def tool_parser(name: str) -> Parser:
    """The parser of one of TOOLS, with its options."""
    tool = TOOLS[name]
    parser = Parser(prog=f"npr {name}", description=tool.summary)
    tool.load().add_arguments(parser)
    return parser
