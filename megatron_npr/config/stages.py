"""What each subcommand is configured by: the tables put together, with each stage's own values."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from megatron_npr.config.section import Section
from megatron_npr.config.sections import (
    BatchSettings,
    CheckpointSettings,
    DapoSettings,
    DapoTrainSettings,
    DataSettings,
    EvalSettings,
    Fp8Settings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    OptimizerSettings,
    PapoSettings,
    ParallelSettings,
    RlTrainSettings,
    RolloutSettings,
    RunSettings,
    SampleSettings,
    SftSettings,
    SftTrainSettings,
)


class StageConfig(Section):
    """What every subcommand is told: its run folder, its model, the layout of its processes."""

    command: ClassVar[str]
    run: RunSettings
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    log: LogSettings = LogSettings()


class TrainingConfig(StageConfig):
    """What every stage that trains is told beside that."""

    fp8: Fp8Settings = Fp8Settings()
    optimizer: OptimizerSettings
    batch: BatchSettings = BatchSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


class RlConfig(TrainingConfig):
    """What the stages that learn from rollouts are told beside that."""

    data: DataSettings
    rollout: RolloutSettings
    train: RlTrainSettings
    memory: MemorySettings = MemorySettings()

    @model_validator(mode="after")
    def _groups_can_differ(self) -> "RlConfig":
        self.rollout.require_differences()
        self.rollout.require_feasible_round()
        return self


class Stage1Config(RlConfig):
    """`npr stage1`: DAPO, decoded sequentially, that teaches the format."""

    command: ClassVar[str] = "stage1"
    run: RunSettings = RunSettings(dir=Path("runs/stage1"))
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=32, branching=False)
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-6, schedule="cosine", warmup_steps=10)
    train: DapoTrainSettings = DapoTrainSettings()
    dapo: DapoSettings = DapoSettings()


class SampleConfig(StageConfig):
    """`npr sample`: rejection sampling from stage 1's model."""

    command: ClassVar[str] = "sample"
    run: RunSettings = RunSettings(dir=Path("runs/sample"))
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=4096, samples_per_prompt=1, branching=False)
    sample: SampleSettings = SampleSettings()

    @model_validator(mode="after")
    def _one_response_a_trial(self) -> "SampleConfig":
        if self.rollout.samples_per_prompt != 1:
            raise ValueError(
                f"rollout.samples_per_prompt {self.rollout.samples_per_prompt}: npr sample takes one response a problem and "
                "try; leave it at 1 and set sample.trials"
            )
        return self


class Stage2Config(TrainingConfig):
    """`npr stage2`: parallel supervised fine-tuning of the base model on those samples."""

    command: ClassVar[str] = "stage2"
    run: RunSettings = RunSettings(dir=Path("runs/stage2"))
    sft: SftSettings
    optimizer: OptimizerSettings = OptimizerSettings(
        lr=1e-6, min_lr=5e-7, schedule="cosine", warmup_fraction=0.05, beta2=0.95
    )
    train: SftTrainSettings = SftTrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings(every=100)


class Stage3Config(RlConfig):
    """`npr stage3`: PAPO, native parallel RL on rollouts of the branching engine."""

    command: ClassVar[str] = "stage3"
    run: RunSettings = RunSettings(dir=Path("runs/stage3"))
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-7, min_lr=1e-7)
    train: RlTrainSettings = RlTrainSettings()
    papo: PapoSettings = PapoSettings()


class EvalConfig(StageConfig):
    """`npr eval`: accuracy, validity, parallelism and speed on held-out problems."""

    command: ClassVar[str] = "eval"
    taken_from: ClassVar[Mapping[str, str]] = {
        "rollout.samples_per_prompt": "eval.samples_per_problem",
        "rollout.branching": "eval.modes",
    }
    run: RunSettings = RunSettings(dir=Path("runs/eval"))
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=256, top_p=0.7)
    eval: EvalSettings = Field()
