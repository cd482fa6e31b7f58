"""`npr COMMAND ...`: finds the command, reads its configuration or options, and says in one line what is wrong with them.

Exit codes: 0 done, 1 a threshold of the demo missed or a failure of ours (with its traceback), 2 a mistake of the user's or a
disk that is full or read-only, 130 interrupted. A reader that goes away (`npr ... | head`) changes none of them. Everything
that needs torch is imported only when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_npr.cli.commands import STAGES, TOOLS, tool_parser
from megatron_npr.cli.help import overview, stage_help, suggestion
from megatron_npr.cli.interruption import how_to_continue
from megatron_npr.repairs.process import process_settings
from megatron_npr.runtime.lasting_output import lasting_output
from megatron_npr.runtime.output_place import check_folder, refused_write
from npr_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_npr.config import StageConfig

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Of many processes only rank 0 prints."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with process_settings(), lasting_output():
        try:
            return _dispatch(words)
        except UserError as error:
            _say(f"npr: error: {error}")
            return 2
        except KeyboardInterrupt:
            _say(f"npr: interrupted; {how_to_continue(words)}")
            return INTERRUPTED
        except BaseException as error:  # torch's own of checkpoints is no Exception
            refused = refused_write(error)
            if refused is None:
                raise
            place = refused.filename or "the disk"
            # On whichever rank: the others may have room.
            print(
                f"npr: error: cannot write to {place}: {refused.strerror}; {how_to_continue(words)}",
                file=sys.stderr,
                flush=True,
            )
            return 2


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(overview())
        return 0
    if command == "--version":
        print(f"npr {importlib.import_module('megatron_npr').__version__}")
        return 0
    if command in STAGES:
        return _run_stage(command, rest)
    if command in TOOLS:
        return TOOLS[command].load().run(tool_parser(command).parse_args(rest))
    raise UserError(f"unknown command {command!r}; {suggestion(command)}")


def _run_stage(command: str, rest: list[str]) -> int:
    from megatron_npr import config as schema

    stage = STAGES[command]
    cls: type[StageConfig] = getattr(schema, stage.config)
    if "--help" in rest or "-h" in rest:
        print(stage_help(command, stage, schema.keys(cls)))
        return 0
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    config = schema.load_config(cls, path, rest)
    folder = config.run.dir
    check_folder(folder)
    try:
        importlib.import_module(f"megatron_npr.stages.{stage.module}").run(config)
    finally:
        importlib.import_module("megatron_npr.run_folder.claim").withdraw(folder)
    return 0


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
