"""What all tests share: the skip rules of the markers, and the folder of the `shared` ones."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("NPR_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} does not exist; set NPR_SHARED"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder that tests marked `shared` read."""
    return SHARED


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder with the tags; skips where its packages are missing."""
    from megatron_npr.convert import convert_gguf
    from npr_ext.errors import UserError

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    try:
        convert_gguf("smollm2", folder)
    except UserError as error:
        pytest.skip(str(error))
    return folder
