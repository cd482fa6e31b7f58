"""Every key of every command as Markdown tables: `python -m megatron_npr.config.reference` prints what configs/README.md holds.

schema ─► keys of each command ─► one table a section: key, type, default by command, meaning
"""

from __future__ import annotations

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
        f"Of {', '.join(commands)}.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, found in rows.items():
        key = next(iter(found.values()))
        cells = (name.partition(".")[2], key.kind, _defaults(found), key.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _defaults(found: dict[str, Key]) -> str:
    """One default where all commands agree, else the commands that differ from the first by name."""
    values = {command: key.default or "required" for command, key in found.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return "; ".join(f"{command} {value}" for command, value in values.items())


if __name__ == "__main__":
    print(reference(), end="")
