"""What all tests share: the skip rules of the markers, how hypothesis judges, one world, one real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.places import SHARED, TESTS

if TYPE_CHECKING:
    from megatron_npr.runtime.process_world import World

# As `make test` sets it: small tensors gain nothing from a second thread, threads that wait for a busy core lose much,
# and the model that the engine's tests train has the same weights everywhere. Tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A verdict depends on results, never on how busy the machine is: hypothesis' time limits fail the first run of a fresh
# clone (nothing is cached, another build may run) and no other.
settings.register_profile("npr", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("npr")

SHARES_A_MODEL = (TESTS / "unit" / "engine",)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(_group_of(item.path)))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} does not exist; set NPR_SHARED"))


def _group_of(path: Path) -> str:
    """What `pytest -n` gives to one process: a file, for its fixtures; all files of a folder whose model takes long to make."""
    whole_folder = next((folder for folder in SHARES_A_MODEL if path.is_relative_to(folder)), path)
    return str(whole_folder.relative_to(TESTS))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="module")
def world() -> World:
    """A world of this process alone. Left open: Megatron's groups are made once a process."""
    from megatron_npr.runtime.process_world import init_world

    return init_world()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file of its package; skips where the packages of the extra smollm2 are missing."""
    from megatron_npr.hf.gguf.file import find_gguf
    from npr_ext.errors import UserError

    pytest.importorskip("gguf", reason="gguf is not installed (extra smollm2)")
    try:
        return find_gguf("smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder with the tags."""
    from megatron_npr.hf.convert import convert_gguf

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(str(smollm2_gguf), folder)
    return folder
