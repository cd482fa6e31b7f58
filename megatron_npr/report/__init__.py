"""The demo's report: report.html (self-contained) and report.json, from one record of what was measured.

DemoResult ──► save ──► result.json ──► rebuild (`npr report`)
    └──► write_report ──► report.json ──► floors ──► the lines that `make demo` fails with
             └──► report.html
"""

import json
from pathlib import Path

from megatron_npr.report.floors import Floor, check, floors
from megatron_npr.report.page import page
from megatron_npr.report.records import DemoResult, Speedup, StageFigures, Timeline
from npr_ext.errors import UserError

__all__ = [
    "DemoResult",
    "Floor",
    "Speedup",
    "StageFigures",
    "Timeline",
    "check",
    "floors",
    "rebuild",
    "write_report",
]


def write_report(folder: Path, result: DemoResult) -> list[str]:
    """Write report.html, report.json and result.json into `folder`; returns the floors that are missed."""
    folder.mkdir(parents=True, exist_ok=True)
    report = result.to_report()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.html").write_text(page(folder, result))
    result.save(folder / "result.json")
    return floors(report)


def rebuild(folder: Path) -> Path:
    """Draw the report of a finished demo again; returns the page's path."""
    saved = folder / "result.json"
    if not saved.is_file():
        raise UserError(f"{saved}: no such file; `npr demo` writes it when it ends")
    try:
        result = DemoResult.load(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{saved} is damaged ({type(error).__name__} {error}): run `npr demo` again"
        ) from None
    write_report(folder, result)
    return folder / "report.html"
