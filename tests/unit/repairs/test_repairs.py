"""Repairs of foreign libraries: one table, each undone on exit, none outside of its folder."""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_npr.repairs.megatron_on_cpu import cpu_runtime
from megatron_npr.repairs.process import process_settings
from megatron_npr.repairs.repair import Repair, Replacement, applied
from megatron_npr.repairs.sglang import handles_by_uuid, policy_log_probs
from megatron_npr.repairs.table import REPAIRS, markdown
from megatron_npr.runtime.process_world import World
from npr_ext.errors import UserError
from npr_ext.ops.flex import MAX_BUCKETS, compiled_attention
from tests.support.places import ROOT

FOLDER = ROOT / "megatron_npr" / "repairs"
REPLACEMENTS = [each for each in REPAIRS if isinstance(each, Replacement)]


def test_the_page_shows_the_table() -> None:
    """After a change: python -m megatron_npr.repairs.table."""
    assert markdown() in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_table_counts_every_repair_and_marks_the_replacements() -> None:
    rows = markdown().splitlines()[2:]
    counts = [1 + int((re.search(r"and (\d+) more \|", row) or [0, 0])[1]) for row in rows]
    assert sum(counts) == len(REPAIRS) > len(rows)
    replaced = [count for row, count in zip(rows, counts, strict=True) if "| replacement |" in row]
    assert sum(replaced) == len(REPLACEMENTS)


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.symbol)
def test_a_repair_is_of_the_version_that_we_pin_and_lies_where_it_says(repair: Repair) -> None:
    """Another pin: look whether the new version still needs it, then write down that one."""
    assert f'"{repair.seen_in}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    place, *more = re.findall(r"`([^`]+)`", repair.where)
    if place.endswith(".py"):
        (path,) = [
            each for each in (ROOT / "megatron_npr" / place, ROOT / "cuda_ext" / place) if each.exists()
        ]
        (name,) = more
    else:
        module, name = place.split(".")
        path = FOLDER / f"{module}.py"
    assert re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("repair", REPLACEMENTS, ids=lambda repair: repair.symbol)
def test_a_symbol_is_the_original_object_again(repair: Replacement) -> None:
    owner, name, original = repair.find()
    with contextlib.suppress(ZeroDivisionError), applied(repair):
        outer = vars(owner)[name]
        assert outer is not original
        with applied(repair):
            pass
        assert vars(owner)[name] is outer
        raise ZeroDivisionError
    assert vars(owner)[name] is original


@pytest.mark.parametrize(
    "symbol", ["torch.nn:Module.gone", "torch.nn:Gone.cuda", "torch.gone:cuda", "torch.nn:Linear.cuda"]
)
def test_a_symbol_that_is_gone_is_a_line_and_nothing_is_half_replaced(symbol: str) -> None:
    """The last one is inherited: put back on the subclass it would not be what it was."""
    first, gone = REPLACEMENTS[0], replace(REPLACEMENTS[0], symbol=symbol)
    owner, name, original = first.find()
    line = f"^{symbol}, which megatron_npr replaces, is not in .* install megatron"
    with pytest.raises(UserError, match=line), applied(first, gone):
        pass
    assert vars(owner)[name] is original


def test_megatron_on_a_cpu_leaves_neither_mode_nor_filter_behind() -> None:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    before = list(logger.filters)
    with cpu_runtime():
        with cpu_runtime():
            pass
        assert len(logger.filters) == len(before) + 1
        assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert logger.filters == before
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2, device="cuda")


@pytest.mark.parametrize("spins", [None, "7"])
def test_a_command_leaves_the_process_as_it_was(spins: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if spins is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", spins)
    before = list(warnings.filters)
    with process_settings():
        assert os.environ["GOMP_SPINCOUNT"] == (spins or "20000")
        assert list(warnings.filters) != before
    assert list(warnings.filters) == before
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_command_begins_without_torchs_warnings_of_collectives_that_megatron_calls_by_old_names(
    world: World,
) -> None:
    def reduced() -> None:
        torch.distributed.reduce_scatter_tensor(torch.zeros(2), torch.zeros(2))
        torch.distributed.all_gather_into_tensor(torch.zeros(2), torch.zeros(2))

    with pytest.warns(FutureWarning, match="all_gather_into_tensor"):
        reduced()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with process_settings():
            reduced()
            warnings.warn("of others", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["of others"]


@pytest.mark.parametrize("value", [None, "0"])
def test_sglang_reads_its_variable_while_its_engine_is_made(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "SGLANG_RETURN_ORIGINAL_LOGPROB"
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with policy_log_probs():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == value


def _patch_as_sglang_does() -> None:
    namespace: Any = reductions
    namespace._reduce_tensor_original = namespace.reduce_tensor
    namespace._rebuild_cuda_tensor_original = namespace.rebuild_cuda_tensor
    namespace.reduce_tensor = functools.partial(namespace.reduce_tensor)
    namespace.rebuild_cuda_tensor = functools.partial(namespace.rebuild_cuda_tensor)
    namespace.init_reductions()


def test_the_pickling_of_tensors_is_torchs_again_after_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("sglang.srt.utils.patch_torch")
    module.monkey_patch_torch_reductions = _patch_as_sglang_does
    monkeypatch.setitem(sys.modules, module.__name__, module)
    reducers: Any = vars(ForkingPickler)["_extra_reducers"]
    before, registered = dict(vars(reductions)), reducers[torch.Tensor]
    with handles_by_uuid():
        assert reducers[torch.Tensor] is not registered
        with handles_by_uuid():  # done already: left as it is
            pass
        assert "_reduce_tensor_original" in vars(reductions)
    assert vars(reductions) == before and reducers[torch.Tensor] is registered


def test_torch_compiles_attention_anew_for_every_bucket_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for torch.compile: what counts is the limit that it sees."""
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda: torch._dynamo.config.recompile_limit)
    compiled_attention.cache_clear()
    try:
        attend: Any = compiled_attention()
        assert attend() == max(limit, MAX_BUCKETS)
        assert torch._dynamo.config.recompile_limit == limit < MAX_BUCKETS
    finally:
        compiled_attention.cache_clear()


OWN = ("megatron_npr", "npr_engine", "npr_ext", "tests")
ALLOWED = {
    "bench/cpu/plan.py": "os.environ",  # glibc's allocator in the processes that it measures; put back
    "bench/gpu/part.py": "warnings.filterwarnings",  # within `process_settings`
    "rl/verifier_worker.py": "logging.getLogger",  # in the table: a process of its own
    "runtime/lasting_output.py": "sys.std",  # Python's own; put back
    "hf/fp8_export.py": "warnings.simplefilter",  # in the table: within catch_warnings
}
"""Settings outside of the folder, and why they may be there."""


def _foreign_names(tree: ast.Module) -> set[str]:
    """Names that stand for what was imported from other packages, so that an assignment to their attributes changes those."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(each.asname or each.name).split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in OWN:
            names |= {each.asname or each.name for each in node.names}
    return names - set(OWN)


def _changes(tree: ast.Module) -> Iterator[str]:
    """What a module changes of others: attributes, the environment, filters of warnings, loggers that are not its own."""
    foreign = _foreign_names(tree)
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in (
            targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)) else []
        ):
            dotted = ast.unparse(target)
            if isinstance(target, (ast.Attribute, ast.Subscript)) and re.split(r"\W", dotted)[0] in foreign:
                yield dotted
        if isinstance(node, ast.Call):
            call, arguments = ast.unparse(node.func), [ast.unparse(each) for each in node.args]
            if call in ("setattr", "delattr") and arguments[0].split(".")[0] in foreign:
                yield f"{call} {arguments[0]}"
            if re.fullmatch(
                r"os\.environ\.(setdefault|pop|update)|warnings\.\w*filter\w*|.*getLogger\(.*\.setLevel", call
            ):
                yield call


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.cuda.current_device = lambda: 0",
        "from megatron.core import parallel_state as p\nsetattr(p, 'x', 1)",
        "import os\nos.environ['A'] = '1'",
        "import os\ndel os.environ['A']",
        "import os\nos.environ.setdefault('A', '1')",
        "import warnings\nwarnings.filterwarnings('ignore')",
        "import logging\nlogging.getLogger('megatron').setLevel(logging.ERROR)",
    ],
)
def test_a_change_of_a_foreign_library_is_seen(text: str) -> None:
    assert len(list(_changes(ast.parse(text)))) == 1


def test_foreign_libraries_are_changed_in_one_folder() -> None:
    found: dict[str, set[str]] = {}
    for package in (ROOT / "megatron_npr", ROOT / "engine" / "npr_engine", ROOT / "cuda_ext" / "npr_ext"):
        for path in package.rglob("*.py"):
            changes = set(_changes(ast.parse(path.read_text(encoding="utf-8"))))
            if changes and path.parent != FOLDER:
                found[path.relative_to(package).as_posix()] = changes
    unexpected = {
        name: changes
        for name, changes in found.items()
        if not all(change.removeprefix("del ").startswith(ALLOWED.get(name, "?")) for change in changes)
    }
    assert unexpected == {}
    assert found.keys() == ALLOWED.keys()
