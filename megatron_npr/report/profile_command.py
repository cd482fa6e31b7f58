"""The `npr profile` command: where the time of a run goes, phase by phase."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_npr.monitoring.metrics import METRICS, read_metrics
from megatron_npr.report.phases import phase_shares
from npr_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/stage3")
    parser.add_argument("--json", action="store_true", help="JSON in the place of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print seconds a step and share of every phase, over all steps of the run."""
    path = arguments.run / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the run.dir of a stage that has made a step")
    shares = phase_shares(read_metrics(path))
    if shares is None:
        raise UserError(f"{path} has no times of phases: no step of this run has ended yet")
    print(json.dumps(shares.to_json(), indent=1) if arguments.json else shares.table())
    return 0
