"""All repairs of foreign libraries, as the table of README.md shows them: python -m megatron_npr.repairs.table."""

from __future__ import annotations

from itertools import groupby

from megatron_npr.repairs import megatron_core, megatron_on_cpu, process, pytorch, sglang, transformer_engine
from megatron_npr.repairs.repair import Repair, Replacement

REPAIRS: tuple[Repair, ...] = (
    *megatron_core.REPAIRS,
    *megatron_on_cpu.REPAIRS,
    *transformer_engine.REPAIRS,
    *pytorch.REPAIRS,
    *sglang.REPAIRS,
    *process.REPAIRS,
)


def markdown() -> str:
    """One row a repair; those for one reason share a row, which names the first of them and how many more."""
    rows = []
    for (seen_in, why, until, where), same in groupby(REPAIRS, _reason):
        first, *more = same
        symbol = _code(first.symbol) + f" and {len(more)} more" * bool(more)
        kind = "replacement" if isinstance(first, Replacement) else ""
        rows.append(f"| {symbol} | {kind} | {seen_in} | {why} | {until} | {where} |")
    return "\n".join(
        (
            "| symbol | kind | seen in | why | no longer needed when | where, how long |",
            "|---|---|---|---|---|---|",
            *rows,
        )
    )


def _reason(repair: Repair) -> tuple[str, str, str, str]:
    """All that a row says beside the symbol."""
    return repair.seen_in, repair.why, repair.until, repair.where


def _code(symbol: str) -> str:
    """A dotted name as code; a setting in words, or what brings its own marks, as it is."""
    return symbol if " " in symbol else f"`{symbol}`"


if __name__ == "__main__":
    print(markdown())
