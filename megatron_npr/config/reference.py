"""Every key of every command as Markdown tables: `python -m megatron_npr.config.reference` prints what configs/README.md holds.

schema ─► keys of each command ─► one table a section: key; type, default and meaning, by command where they differ
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_npr.config.loading import Key, keys
from megatron_npr.config.stages import (
    EvalConfig,
    SampleConfig,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    StageConfig,
)

COMMANDS: dict[str, type[StageConfig]] = {
    "stage1": Stage1Config,
    "sample": SampleConfig,
    "stage2": Stage2Config,
    "stage3": Stage3Config,
    "eval": EvalConfig,
}


def reference() -> str:
    """A Markdown table for each section of the schema, in the schema's order; ends with a newline."""
    by_name: dict[str, dict[str, Key]] = {}
    for command, cls in COMMANDS.items():
        for key in keys(cls):
            by_name.setdefault(key.name, {})[command] = key
    sections = list(dict.fromkeys(name.partition(".")[0] for name in by_name))
    return "\n".join(_section(section, by_name) for section in sections)


def _section(section: str, by_name: dict[str, dict[str, Key]]) -> str:
    rows = {name: found for name, found in by_name.items() if name.partition(".")[0] == section}
    commands = [name for name in COMMANDS if any(name in found for found in rows.values())]
    lines = [
        f"### [{section}]",
        "",
        f"Used by {', '.join(commands)}.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, found in rows.items():
        kinds = {command: key.kind for command, key in found.items()}
        defaults = {command: key.default or "required" for command, key in found.items()}
        meanings = {command: key.description for command, key in found.items()}
        cells = (
            name.partition(".")[2],
            _by_command(kinds),
            _by_command(defaults, named=len(found) < len(commands)),
            _by_command(meanings),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _by_command(texts: Mapping[str, str], *, named: bool = False) -> str:
    """The text by command: alone where all commands agree (with them where `named`), else each with its commands."""
    commands_of: dict[str, list[str]] = {}
    for command, text in texts.items():
        commands_of.setdefault(text, []).append(command)
    if len(commands_of) == 1 and not named:
        return next(iter(commands_of))
    return "; ".join(f"{', '.join(commands)}: {text}" for text, commands in commands_of.items())


if __name__ == "__main__":
    print(reference(), end="")
