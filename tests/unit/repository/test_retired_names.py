"""Retired names stay away: identifiers, configuration keys and metric names speak the field's words; prose is free.

ast of the three packages ─► identifiers, keywords (metrics are logged as such), keys of dictionaries ─┐
tables of the configuration ─► table.key ──────────────────────────────────────────────────────────────┴─► none is retired
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npr.config import (
    EvalConfig,
    SampleConfig,
    Section,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    load_config,
)
from npr_ext.errors import UserError
from tests.support.places import ROOT

PACKAGES = (ROOT / "megatron_npr", ROOT / "engine" / "npr_engine", ROOT / "cuda_ext" / "npr_ext")
CONFIGURATIONS = (Stage1Config, Stage2Config, Stage3Config, SampleConfig, EvalConfig)

RETIRED_WORDS = {
    "watched": "metrics",
    "floors": "thresholds",
    "road": "main",
    "beside": "background",
    "reshard": "weight_sync",
    "resharding": "weight_sync",
    "seat": "request_slot",
    "seats": "request_slots",
    "promised": "num_scheduled_tokens",
    "fed": "num_computed_tokens",
    "told": "num_streamed",
    "birth": "generation",
    "births": "generations",
    "quantise": "quantize",
    "quantised": "quantized",
    "maxima": "amax",
}
"""No identifier has one of these between its underscores or capitals -> the word for it."""

RETIRED_NAMES = {
    "late_gather": "overlap_param_gather",
    "trained": "loss_mask",
    "come_back": "onload",
    "Floor": "Threshold",
    "Seats": "RequestSlots",
    "max_running": "max_running_requests, max_running_branches",
    "tensor_rank": "tp_rank",
    "tensor_size": "tp_size",
    "tensor_group": "tp_group",
    "pipeline_rank": "pp_rank",
    "pipeline_size": "pp_size",
    "pipeline_group": "pp_group",
    "context_rank": "cp_rank",
    "context_size": "cp_size",
    "context_group": "cp_group",
    "virtual_size": "vpp_size",
    "expert_rank": "ep_rank",
    "expert_size": "ep_size",
    "data_rank": "dp_rank",
    "data_size": "dp_size",
    "data_group": "dp_group",
}
"""No identifier is one of these -> the name for it."""

KEY = re.compile(r"\w+(/\w+)*")


def identifiers(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of all that a file names itself: also keywords of calls, and keys of dictionaries that are names."""
    for node in ast.walk(ast.parse(path.read_text())):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, line
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, line
            case ast.keyword(arg=str(name)) | ast.alias(asname=str(name)):
                yield name, line
            case ast.Dict(keys=keys):
                for key in keys:
                    if (
                        isinstance(key, ast.Constant)
                        and isinstance(key.value, str)
                        and KEY.fullmatch(key.value)
                    ):
                        yield from ((part, key.lineno) for part in key.value.split("/"))


def successor(name: str) -> str | None:
    """What a retired name is called today; None where it is not retired."""
    bare = name.strip("_")
    if bare in RETIRED_NAMES:
        return RETIRED_NAMES[bare]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower().split("_")
    return next((RETIRED_WORDS[word] for word in words if word in RETIRED_WORDS), None)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_identifier_and_no_key_of_a_record_or_metric_is_retired(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    assert len(files) > 10
    names = [
        (path.relative_to(ROOT), 0, part)
        for path in files
        for part in path.relative_to(package).with_suffix("").parts
    ]
    names += [(path.relative_to(ROOT), line, name) for path in files for name, line in identifiers(path)]
    found = [
        f"{path}:{line}: {name} is called {successor(name)}" for path, line, name in names if successor(name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.command)
def test_no_configuration_key_is_retired(configuration: type[Section]) -> None:
    keys = [
        (table, key)
        for table, field in configuration.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    assert len(keys) > 20
    assert [f"{table}.{key}" for table, key in keys if successor(table) or successor(key)] == []


@pytest.mark.parametrize("configuration", [Stage1Config, Stage3Config], ids=lambda each: each.command)
def test_the_old_key_of_a_file_is_told_the_new_one(configuration: type[Section], tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text("[rollout]\nmax_running = 8\n")
    with pytest.raises(
        UserError, match=r"rollout\.max_running; did you mean rollout\.max_running_requests\?"
    ):
        load_config(configuration, file, [])


def test_words_are_seen_in_any_spelling() -> None:
    assert [
        successor(name) for name in ("_late_gather", "ROAD_SHARES", "TheRoad", "Floor", "max_running")
    ] == [
        "overlap_param_gather",
        "main",
        "main",
        "Threshold",
        "max_running_requests, max_running_branches",
    ]
    assert [successor(name) for name in ("broad", "max_running_requests", "fully_reshardable", "tensor")] == [
        None
    ] * 4
