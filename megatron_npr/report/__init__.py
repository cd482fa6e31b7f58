"""The demo's report: report.html (self-contained) and report.json, from one record of what was measured.

DemoResult ──► save ──► result.json ──► rebuild (`npr report`)
    └──► write_report ──► report.json ──► thresholds ──► the lines that `make demo` fails with
             └──► report.html
"""

import json
from pathlib import Path

from megatron_npr.report.page import page
from megatron_npr.report.records import DemoResult, Speedup, StageFigures, Timeline
from megatron_npr.report.thresholds import Threshold, check, missed_thresholds
from megatron_npr.runtime.whole_file import write_whole
from npr_ext.errors import UserError

__all__ = [
    "DemoResult",
    "Speedup",
    "StageFigures",
    "Threshold",
    "Timeline",
    "check",
    "missed_thresholds",
    "rebuild",
    "write_report",
]


def write_report(folder: Path, result: DemoResult) -> list[str]:
    """Write report.html, report.json and result.json into `folder`; returns the thresholds that are missed."""
    report = result.to_report()
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(folder / "report.html", page(folder, result))
    result.save(folder / "result.json")
    return missed_thresholds(report)


def rebuild(folder: Path) -> Path:
    """Draw the report of a finished demo again; returns the page's path."""
    saved = folder / "result.json"
    if not saved.is_file():
        raise UserError(f"{saved}: no such file; `npr demo` writes it when it ends")
    try:
        result = DemoResult.load(saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{saved} is damaged ({type(error).__name__} {error}): run `npr demo` again"
        ) from None
    write_report(folder, result)
    return folder / "report.html"
