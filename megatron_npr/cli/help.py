"""What `npr --help` and `npr STAGE --help` print, and what a mistyped command might have meant."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_npr.cli.commands import STAGES, TOOLS, Stage

if TYPE_CHECKING:
    from megatron_npr.config import Key


def overview() -> str:
    """All commands, a line each."""
    rows = [(name, stage.summary) for name, stage in STAGES.items()]
    rows += [(name, tool.summary) for name, tool in TOOLS.items()]
    commands = "\n".join(f"  {name:<8} {summary}" for name, summary in rows)
    return f"""\
Train language models to reason in native parallel branches.

usage: npr COMMAND [CONFIG.toml] [--table.key VALUE ...]

{commands}

npr COMMAND --help lists every setting with its default. Start with `npr demo`, or on real models with
  npr stage1 configs/stage1.toml --model.path MODEL --data.train PROBLEMS.jsonl
Many processes: torchrun --nproc-per-node 8 -m megatron_npr stage1 ..., or sbatch launch/stage1.sh."""


def stage_help(command: str, stage: Stage, keys: Sequence[Key]) -> str:
    """All settings of a stage by table, with kind, meaning and default; lines of at most 120 characters."""
    names = max(len(key.name) for key in keys) + 2
    kinds = max(len(key.kind) for key in keys)
    lines = [f"usage: npr {command} [CONFIG.toml] [--table.key VALUE ...]", "", f"{stage.summary}.", ""]
    table = ""
    for key in keys:
        if key.name.split(".")[0] != table:
            table = key.name.split(".")[0]
            lines.append(f"[{table}]")
        default = f"(default {key.default})" if key.default else "(required)"
        head = f"  {'--' + key.name:<{names}}  {key.kind:<{kinds}}  "
        lines += textwrap.wrap(
            f"{key.description} {default}", 120, initial_indent=head, subsequent_indent=" " * len(head)
        )
    return "\n".join(lines)


def suggestion(command: str) -> str:
    """The command that is spelled most like this one; all of them where none is close."""
    known = [*STAGES, *TOOLS]
    close = difflib.get_close_matches(command, known, n=1)
    return f"did you mean {close[0]}?" if close else f"commands: {', '.join(known)}"
