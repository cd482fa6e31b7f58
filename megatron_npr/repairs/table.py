"""All repairs of foreign libraries, as the table of README.md shows them: python -m megatron_npr.repairs.table."""

from __future__ import annotations

from megatron_npr.repairs import megatron_core, megatron_on_cpu, process, pytorch, sglang, transformer_engine
from megatron_npr.repairs.repair import Repair

REPAIRS: tuple[Repair, ...] = (
    *megatron_core.REPAIRS,
    *megatron_on_cpu.REPAIRS,
    *transformer_engine.REPAIRS,
    *pytorch.REPAIRS,
    *sglang.REPAIRS,
    *process.REPAIRS,
)


def markdown() -> str:
    """One row a repair."""
    rows = [
        f"| {_code(each.symbol)} | {each.seen_in} | {each.why} | {each.until} | {each.where} |"
        for each in REPAIRS
    ]
    return "\n".join(
        (
            "| symbol | seen in | why | no longer needed when | where, how long |",
            "|---|---|---|---|---|",
            *rows,
        )
    )


def _code(symbol: str) -> str:
    """A dotted name as code; a setting in words, or what brings its own marks, as it is."""
    return symbol if " " in symbol else f"`{symbol}`"


if __name__ == "__main__":
    print(markdown())
