"""What `make gpu` leaves: the records of its parts, the file that they stand in, the thresholds on them. No torch.

part ─► record ─► tests/bench/results/<device>.json (measured again, a part replaces its own figures) ─► table
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npr.report import Threshold
from megatron_npr.runtime.whole_file import write_whole

Parts = Mapping[str, Any]
"""Figures by part, as they stand in the file."""


@dataclass(frozen=True)
class LayoutFigures:
    """A packed batch of standard layouts; the block lists are of one row. `waits`: calls in which the host waited."""

    sequences: int
    tokens: int
    layout_us: float
    block_mask_us: float
    waits: list[str]


@dataclass(frozen=True)
class AttentionFigures:
    """Forward and backward of one standard row, on its visible pairs; causal: the same row and kernel without branches."""

    density: float
    branching_ms: float
    causal_ms: float
    branching_tflops: float
    causal_tflops: float
    branching_over_causal: float


@dataclass(frozen=True)
class DecodeFigures:
    """Steady decoding. `roofline_share`: seconds that reading the weights takes at the measured copy bandwidth, over a step's.
    `graph_share`: steps that replayed a CUDA graph; `waits_per_step`: times that the host waited for the device."""

    rows: int
    ms_per_step: float
    tokens_per_second: float
    roofline_share: float
    graph_share: float
    waits_per_step: float


@dataclass(frozen=True)
class ForkFigures:
    """A fork and the join after it, medians over blocks.

    `operations_us`: what the scheduler takes longer in the steps that fork and join than in those that only decode, and the
    update of the table on the device for the branches' and the joined rows. `steps_us`: by how much these two steps are longer
    in all; they also compute the forced tokens.
    """

    branches: int
    prefix_tokens: int
    operations_us: float
    steps_us: float


@dataclass(frozen=True)
class EngineFigures:
    """`versus_transformers`: seconds of transformers.generate over ours, same prompts and tokens; None: not installed."""

    model: str
    dtype: str
    copy_bandwidth: float
    decoding: dict[str, DecodeFigures]
    fork_join: ForkFigures
    transformers_batch: int
    versus_transformers: float | None


@dataclass(frozen=True)
class LogProbFigures:
    """Log-probs of a row's tokens, forward and backward: bytes beside the hidden states, their gradient and the weights'."""

    vocab_size: int
    added_bytes: dict[str, int]
    ms: dict[str, float]


@dataclass(frozen=True)
class TrainingFigures:
    """Optimizer steps on packed standard layouts. `mfu`: model FLOPs on visible pairs over the measured matmul rate.
    `planned_over_measured`: bytes of `npr plan`'s memory model over torch's peak; None without a GPU."""

    precision: str
    library: str
    row_tokens: int
    rows: int
    density: float
    recompute: str
    seconds: float
    model_tflops: float
    mfu: float
    peak_gb: float
    planned_over_measured: float | None


@dataclass(frozen=True)
class PhaseFigures:
    """One phase of a PAPO step; `peak_gb` is of torch's allocator (of the process on a CPU)."""

    seconds: float
    peak_gb: float


@dataclass(frozen=True)
class PapoFigures:
    """One PAPO step of a colocated trainer and engine: random weights, scripted branching responses, rewards by chance."""

    responses: int
    response_tokens: int
    trained_tokens: int
    phases: dict[str, PhaseFigures]
    zero_copy_ms: float
    zero_copy_bytes: int


def result_file(folder: Path, device_name: str) -> Path:
    """Named after the device."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read_result(path: Path) -> dict[str, Any]:
    """What earlier runs have left; a record without figures where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {"parts": {}, "not_measured": {}} | found


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """There whole or as it was."""
    write_whole(path, json.dumps(result, indent=2) + "\n")


def thresholds(parts: Parts) -> Iterator[Threshold]:
    """Those on the parts that were measured, in their order."""
    if "layout" in parts:
        layout = parts["layout"]
        yield Threshold(f"layout of {layout['tokens']:,} tokens", layout["layout_us"], "<=", 300, " us")
        yield Threshold("host waits while laying out", len(layout["waits"]), "<=", 0)
    for tokens, figures in parts.get("attention", {}).items():
        if int(tokens) >= 32_768:
            name = f"attention at {tokens}, TFLOP/s of branches / dense causal"
            yield Threshold(name, figures["branching_over_causal"], ">=", 0.8)
    if "engine" in parts:
        yield from _engine_thresholds(parts["engine"])
    if "log_probs" in parts:
        added = parts["log_probs"]["added_bytes"].values()
        yield Threshold("memory of log-probs, longest / shortest row", max(added) / min(added), "<=", 1.05)
    yield from _training_thresholds(parts.get("training", []))
    if "papo" in parts:
        yield Threshold("zero-copy update", parts["papo"]["zero_copy_ms"], "<=", 5.0, " ms")
        yield Threshold("zero-copy update moves", parts["papo"]["zero_copy_bytes"], "<=", 0, " bytes")


def _engine_thresholds(engine: Mapping[str, Any]) -> Iterator[Threshold]:
    for name, least in (("batch 1", 0.75), ("64 branches", 0.60)):
        if name not in engine["decoding"]:
            continue  # other sizes were measured
        figures = engine["decoding"][name]
        yield Threshold(f"decoding, {name}: share of the roofline", figures["roofline_share"], ">=", least)
        yield Threshold(f"decoding, {name}: steps that replay a graph", figures["graph_share"], ">=", 1.0)
    yield Threshold(
        "fork and join, without forced tokens", engine["fork_join"]["operations_us"], "<=", 200, " us"
    )
    if engine["versus_transformers"] is not None:
        batch = engine["transformers_batch"]
        name = f"times faster than transformers.generate at batch {batch}"
        yield Threshold(name, engine["versus_transformers"], ">=", 3.0, "x")


def _training_thresholds(training: list[Mapping[str, Any]]) -> Iterator[Threshold]:
    seconds = {}
    for figures in training:
        tokens, precision = figures["row_tokens"], figures["precision"]
        seconds[precision, tokens] = figures["seconds"]
        name = f"training in {precision} at {tokens}"
        least = {("bf16", 8192): 0.45, ("bf16", 32_768): 0.38}.get((precision, tokens))
        if least is not None:
            yield Threshold(f"{name}: MFU", figures["mfu"], ">=", least)
        planned = figures["planned_over_measured"]
        if planned is not None and precision == "bf16":
            yield Threshold(f"{name}: planned / measured memory", planned, ">=", 0.9)
            yield Threshold(f"{name}: planned / measured memory", planned, "<=", 1.1)
        bf16 = seconds.get(("bf16", tokens))
        if precision == "fp8" and bf16 is not None:
            least = 1.25 if tokens < 32_768 else 1.1
            yield Threshold(f"{name}: times faster than bf16", bf16 / figures["seconds"], ">=", least, "x")


def table(parts: Parts) -> str:
    """threshold, measured, held; then the phases of the PAPO step."""
    rows = [
        (
            threshold.name,
            f"{threshold.relation} {threshold.bound:g}{threshold.unit}",
            f"{threshold.measured:.4g}{threshold.unit}",
            threshold.held,
        )
        for threshold in thresholds(parts)
    ]
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [
        f"{name:{width}}  threshold {bound:>10}  measured {measured:>12}  {'held' if held else 'MISSED'}"
        for name, bound, measured, held in rows
    ]
    if "papo" in parts:
        papo = parts["papo"]
        lines += ["", f"one PAPO step: {papo['responses']} responses of {papo['response_tokens']} tokens"]
        lines += [
            f"  {name:12} {phase['seconds']:8.2f} s  peak {phase['peak_gb']:6.1f} GB"
            for name, phase in papo["phases"].items()
        ]
    return "\n".join(lines)
