"""What each subcommand is configured by: the tables put together, with each stage's own values."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from megatron_npr.config.sections import (
    BatchSettings,
    CheckpointSettings,
    DapoSettings,
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
    Section,
    SftSettings,
    SftTrainSettings,
)


class StageConfig(Section):
    """A subcommand's configuration."""

    command: ClassVar[str]
    run: RunSettings


class Stage1Config(StageConfig):
    """`npr stage1`: DAPO, decoded sequentially, that teaches the format."""

    command: ClassVar[str] = "stage1"
    run: RunSettings = RunSettings(dir=Path("runs/stage1"))
    model: ModelSettings
    fp8: Fp8Settings = Fp8Settings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=32, branching=False)
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-6, schedule="cosine", warmup_steps=10)
    batch: BatchSettings = BatchSettings()
    train: RlTrainSettings = RlTrainSettings(updates_per_step=32)
    dapo: DapoSettings = DapoSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _groups_can_differ(self) -> "Stage1Config":
        self.rollout.require_differences()
        return self


class SampleConfig(StageConfig):
    """`npr sample`: rejection sampling from stage 1's model."""

    command: ClassVar[str] = "sample"
    run: RunSettings = RunSettings(dir=Path("runs/sample"))
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=4096, samples_per_prompt=1, branching=False)
    sample: SampleSettings = SampleSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _one_response_a_trial(self) -> "SampleConfig":
        if self.rollout.samples_per_prompt != 1:
            raise ValueError(
                f"rollout.samples_per_prompt {self.rollout.samples_per_prompt}: npr sample takes one response a problem and "
                "try; leave it at 1 and set sample.trials"
            )
        return self


class Stage2Config(StageConfig):
    """`npr stage2`: parallel supervised fine-tuning of the base model on those samples."""

    command: ClassVar[str] = "stage2"
    run: RunSettings = RunSettings(dir=Path("runs/stage2"))
    model: ModelSettings
    fp8: Fp8Settings = Fp8Settings()
    parallel: ParallelSettings = ParallelSettings()
    sft: SftSettings
    optimizer: OptimizerSettings = OptimizerSettings(
        lr=1e-6, min_lr=5e-7, schedule="cosine", warmup_fraction=0.05, beta2=0.95
    )
    batch: BatchSettings = BatchSettings()
    train: SftTrainSettings = SftTrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings(every=100)
    log: LogSettings = LogSettings()


class Stage3Config(StageConfig):
    """`npr stage3`: PAPO, native parallel RL on rollouts of the branching engine."""

    command: ClassVar[str] = "stage3"
    run: RunSettings = RunSettings(dir=Path("runs/stage3"))
    model: ModelSettings
    fp8: Fp8Settings = Fp8Settings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-7, min_lr=1e-7)
    batch: BatchSettings = BatchSettings()
    train: RlTrainSettings = RlTrainSettings()
    papo: PapoSettings = PapoSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _groups_can_differ(self) -> "Stage3Config":
        self.rollout.require_differences()
        return self


class EvalConfig(StageConfig):
    """`npr eval`: accuracy, validity, parallelism and speed on held-out problems."""

    command: ClassVar[str] = "eval"
    run: RunSettings = RunSettings(dir=Path("runs/eval"))
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=256, top_p=0.7)
    eval: EvalSettings = Field()
    log: LogSettings = LogSettings()
