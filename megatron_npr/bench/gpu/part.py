"""One part of the GPU bench in a process of its own: python -m megatron_npr.bench.gpu.part NAME FILE [--tiny].

NAME ─► its module's measure(device, tiny) ─► record ─► FILE (JSON)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import warnings
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_npr.repairs.process import process_settings


@dataclass(frozen=True)
class Part:
    """A function `measure(device, *, tiny)`, and what has to be installed for it: {module: package}."""

    module: str
    function: str
    what: str
    needs: dict[str, str]

    def missing(self) -> list[str]:
        """The packages that are not there."""
        return [package for module, package in self.needs.items() if importlib.util.find_spec(module) is None]


_TRAINER = {"megatron": "megatron-core", "pydantic": "pydantic", "transformers": "transformers"}
PARTS = {
    "layout": Part("layout", "measure_layout", "branch layouts and block lists", {}),
    "attention": Part("layout", "measure_attention", "branch attention", {}),
    "log_probs": Part("log_probs", "measure", "log-probs of a large vocabulary", {}),
    "engine": Part("engine", "measure", "decoding, forks and joins", {}),
    "training": Part("training", "measure", "training steps", _TRAINER),
    "papo": Part("papo", "measure", "a PAPO step", _TRAINER),
}


def plain(record: Any) -> Any:
    """Records as JSON takes them."""
    if isinstance(record, dict):
        return {name: plain(value) for name, value in record.items()}
    if isinstance(record, list):
        return [plain(value) for value in record]
    return asdict(record) if is_dataclass(record) and not isinstance(record, type) else record


def main() -> None:
    """Measures and writes; what goes wrong is raised."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    arguments = parser.parse_args()
    with process_settings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        measured = _measure(PARTS[arguments.name], tiny=arguments.tiny)
    arguments.file.write_text(json.dumps(plain(measured)))


def _measure(part: Part, *, tiny: bool) -> Any:
    measure = vars(importlib.import_module(f"megatron_npr.bench.gpu.{part.module}"))[part.function]
    return measure(torch.device("cpu") if tiny else torch.device("cuda", 0), tiny=tiny)


if __name__ == "__main__":
    main()
