from pathlib import Path

import pytest

from megatron_npr.config import (
    CONFIGS,
    EvalConfig,
    SampleConfig,
    Section,
    Stage1Config,
    Stage2Config,
    Stage3Config,
    load_config,
)

CLASSES: dict[str, type[Section]] = {
    "stage1": Stage1Config,
    "sample": SampleConfig,
    "stage2": Stage2Config,
    "stage3": Stage3Config,
    "sequential_rl": Stage3Config,
    "eval": EvalConfig,
}
FILES = sorted(CONFIGS.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_file_loads(path: Path) -> None:
    load_config(CLASSES[path.stem], path)


def test_the_paper_files_keep_the_papers_values() -> None:
    """Among what they change is only where things lie, layout and memory, and the published repetition penalty."""
    npr = load_config(Stage3Config, CONFIGS / "stage3.toml")
    assert npr.rollout.repetition_penalty == 1.02
    assert (npr.rollout.prompts_per_step, npr.rollout.samples_per_prompt, npr.optimizer.lr) == (16, 16, 1e-7)
    zero = load_config(Stage1Config, CONFIGS / "stage1.toml")
    assert zero.rollout.repetition_penalty == 1.0
