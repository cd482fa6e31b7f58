"""The tables of a configuration file, one frozen model each; defaults are the paper's where it gives one.

Nothing here imports torch: the command line has to answer `--help` and report mistakes at once.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_npr.config.section import (
    MOST_RESPONSES,
    MOST_THREADS,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Recompute = Literal["none", "selective", "full"]


class RunSettings(Section):
    dir: Path = Field(description="folder of this run: checkpoints, metrics, the resolved configuration")
    seed: NonNegativeInt = Field(0, description="root of every random number; samples derive theirs from it")
    resume: bool | Literal["auto"] = Field(
        False, description="continue the run in run.dir; auto = if there is something to continue, else start"
    )
    overwrite: bool = Field(
        False, description="start anew and move the run in run.dir aside (DIR.1, DIR.2, ...)"
    )
    threads: Annotated[int, Field(ge=0, le=MOST_THREADS)] = Field(
        0, description="CPU threads of one process; 0 shares the cores among the processes"
    )

    @field_validator("resume", mode="before")
    @classmethod
    def _known_resume(cls, value: object) -> object:
        if isinstance(value, bool) or str(value).lower() in ("true", "false", "auto"):
            return value.lower() if isinstance(value, str) else value
        raise ValueError(f"run.resume = {value!r} is none of false, true and auto")

    @model_validator(mode="after")
    def _one_way_to_start(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError(
                f"run.resume = {str(self.resume).lower()} continues a run, run.overwrite = true starts anew: leave one out"
            )
        return self


class ModelSettings(Section):
    path: Path = Field(description="Hugging Face folder: config.json, *.safetensors, tokenizer.json")
    dtype: Literal["fp32", "bf16", "fp8"] = Field(
        "bf16",
        description="of weights and activations; fp8 = bf16, the layers' projections trained in FP8 (see fp8)",
    )
    recompute: Recompute = Field(
        "none", description="activations that backward computes again: selective = MLPs, full = whole layers"
    )
    router_aux_loss: NonNegativeFloat = Field(
        0.0,
        description="weight of the loss that balances experts over the global batch; costs one more forward pass; "
        "0 = off",
    )


class Fp8Settings(Section):
    recipe: Literal["delayed", "tensorwise", "blockwise"] = Field(
        "tensorwise",
        description="scales: from earlier steps, of the tensor at hand (the one recipe without transformer-engine), of its "
        "blocks",
    )
    format: Literal["hybrid", "e4m3"] = Field("hybrid", description="hybrid = gradients in e5m2")
    first_layers_bf16: NonNegativeInt = Field(0, description="layers at the beginning that stay in bf16")
    last_layers_bf16: NonNegativeInt = Field(0, description="layers at the end that stay in bf16")
    parameters: bool = Field(
        False,
        description="hold projections in FP8, gathered so over data-parallel ranks (optimizer: fp32); needs "
        "transformer-engine",
    )

    @model_validator(mode="after")
    def _delayed_scales_are_of_all_layers(self) -> "Fp8Settings":
        if self.recipe == "delayed" and (self.first_layers_bf16 or self.last_layers_bf16):
            raise ValueError(
                "fp8.recipe delayed scales all layers at once: first_layers_bf16 and last_layers_bf16 need another recipe"
            )
        return self


class ParallelSettings(Section):
    tp: PositiveInt = Field(1, description="tensor-parallel ranks")
    pp: PositiveInt = Field(1, description="pipeline stages")
    cp: PositiveInt = Field(1, description="context-parallel ranks")
    vpp: PositiveInt = Field(1, description="chunks of layers on each pipeline stage (interleaved schedule)")
    ep: PositiveInt = Field(1, description="expert-parallel ranks (mixture-of-experts models)")
    first_layers: PositiveInt | None = Field(
        None, description="layers of the first pipeline stage; none = all stages hold equally many"
    )
    last_layers: PositiveInt | None = Field(
        None, description="layers of the last pipeline stage; none = all stages hold equally many"
    )
    sequence_parallel: bool = Field(
        False, description="shard activations along the sequence between TP regions"
    )

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> "ParallelSettings":
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tp >= 2")
        return self

    @model_validator(mode="after")
    def _stages_need_a_pipeline(self) -> "ParallelSettings":
        if self.pp == 1 and self.vpp > 1:
            raise ValueError(f"parallel.vpp {self.vpp} needs parallel.pp >= 2")
        if self.pp == 1 and (self.first_layers or self.last_layers):
            raise ValueError("parallel.first_layers and parallel.last_layers need parallel.pp >= 2")
        return self


class DataSettings(Section):
    table: ClassVar[str] = "data"
    train: str = Field(
        description='training problems: a JSON or JSONL file, or "demo" for the generated ones'
    )
    count: PositiveInt | None = Field(None, description="use only the first problems; none = all")
    max_prompt_tokens: PositiveInt = Field(2048, description="longer prompts are skipped and counted")
    mode: Literal["parallel", "sequential"] = Field(
        "parallel", description="which instruction the prompt carries"
    )
    instruction: Path | None = Field(
        None, description="instruction text of one's own; none = the shipped one"
    )


class RolloutSettings(Section):
    prompts_per_step: PositiveInt = Field(16, description="problems of one rollout round")
    samples_per_prompt: PositiveInt = Field(
        16, description="responses to each of them (the group of the advantage)"
    )
    max_tokens: PositiveInt = Field(30_000, description="budget of one response, all branches together")
    temperature: NonNegativeFloat = Field(1.0, description="0 = greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus; 1 = off")
    top_k: NonNegativeInt = Field(0, description="0 = off")
    min_p: Fraction = Field(0.0, description="0 = off")
    repetition_penalty: PositiveFloat = Field(1.0, description="inside steps; 1 = off = strictly on-policy")
    max_branches: PositiveInt = Field(8, description="plans of one block")
    max_blocks: PositiveInt = Field(16, description="blocks of one response")
    branching: bool = Field(True, description="fork at </guideline> and join after the last </step>")
    backend: Literal["native", "sglang"] = Field("native", description="who decodes")
    tp: PositiveInt | None = Field(
        None, description="tensor-parallel ranks of one engine; none = parallel.tp"
    )
    ep: PositiveInt | None = Field(
        None,
        description="ranks that share the experts: a multiple of rollout.tp (engines in step) or a divisor; "
        "none = parallel.ep",
    )
    kv_slots: PositiveInt = Field(
        524_288, description="token slots of the KV cache of one engine; their bytes: npr plan"
    )
    block_size: PositiveInt = Field(4, description="token slots of one KV block")
    max_running_requests: PositiveInt = Field(
        256,
        description="responses that each of the world / rollout.tp engines decodes at once, max_branches branches each",
    )
    max_batch_tokens: PositiveInt = Field(16_384, description="tokens of one engine step, prefill and decode")
    fp8: bool = Field(
        False,
        description="decode with projections in e4m3, a scale a channel; where layouts differ they travel to the engine so",
    )

    @model_validator(mode="after")
    def _one_response_fits_the_engine(self) -> "RolloutSettings":
        if self.max_tokens > self.kv_slots:
            raise ValueError(f"rollout.max_tokens {self.max_tokens} exceeds rollout.kv_slots {self.kv_slots}")
        if self.block_size > self.kv_slots:
            raise ValueError(f"rollout.block_size {self.block_size} exceeds rollout.kv_slots {self.kv_slots}")
        if self.branching and self.max_branches >= self.max_batch_tokens:
            raise ValueError(
                f"rollout.max_batch_tokens {self.max_batch_tokens} must exceed rollout.max_branches {self.max_branches}: "
                "they decode in one step"
            )
        return self

    def require_feasible_round(self) -> None:
        """ValueError where a round of training has more responses than any machine holds, before it tries to list them."""
        if self.prompts_per_step * self.samples_per_prompt > MOST_RESPONSES:
            raise ValueError(
                f"rollout.prompts_per_step {self.prompts_per_step} times rollout.samples_per_prompt "
                f"{self.samples_per_prompt} are more than {MOST_RESPONSES:,} responses a round: lower one of them"
            )

    def require_differences(self) -> None:
        """ValueError where all responses of a group are the same one, from which advantages teach nothing."""
        if self.samples_per_prompt == 1:
            raise ValueError(
                "rollout.samples_per_prompt 1: a group of one has no advantage, so nothing is learned; give at least 2"
            )
        if self.temperature == 0 or self.top_k == 1:
            setting = "rollout.temperature 0" if self.temperature == 0 else "rollout.top_k 1"
            raise ValueError(
                f"{setting}: a group of equal responses has no advantage, so nothing is learned; sample them"
            )


class OptimizerSettings(Section):
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of the schedule")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="decay from lr to min_lr"
    )
    warmup_steps: NonNegativeInt = Field(0, description="updates of linear warm-up")
    warmup_fraction: Fraction = Field(
        0.0, description="the same as a share of all updates; the larger one holds"
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled (AdamW)")
    beta1: Decay = Field(0.9, description="decay of the first moment")
    beta2: Decay = Field(0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    grad_clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 = off")
    overlap: bool | None = Field(
        None,
        description="reduce gradients, and in stage 2 gather weights, beside the computation; unset: on a GPU",
    )
    bucket_size: PositiveInt | None = Field(
        None,
        description="parameters that travel together where communication overlaps; unset: Megatron's choice",
    )

    @model_validator(mode="after")
    def _decay_goes_down(self) -> "OptimizerSettings":
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr {self.min_lr:g} exceeds optimizer.lr {self.lr:g}")
        return self

    def warmup(self, num_updates: int) -> int:
        """Updates of warm-up in a run of `num_updates`."""
        return max(self.warmup_steps, round(self.warmup_fraction * num_updates))


class BatchSettings(Section):
    micro_batch_tokens: PositiveInt = Field(32_768, description="length T of a packed row, one micro-batch")
    share_prompts: bool = Field(
        True, description="pack the prompt of a group once instead of once a response"
    )


class RlTrainSettings(Section):
    steps: PositiveInt = Field(200, description="rollout rounds")
    entropy: bool = Field(
        True, description="the policy's entropy among the metrics, for one more pass over the logits"
    )
    entropy_coefficient: NonNegativeFloat = Field(
        0.0, description="the entropy times this is subtracted from the loss; 0 = off"
    )

    agreement_warning: NonNegativeFloat = Field(
        0.005, description="mean |log-prob of the trainer - the engine's| that is warned of; 0 = off"
    )
    agreement_limit: NonNegativeFloat = Field(
        0.0, description="mean |log-prob of the trainer - the engine's| that ends the run; 0 = off"
    )

    @model_validator(mode="after")
    def _a_bonus_needs_the_entropy(self) -> "RlTrainSettings":
        if self.entropy_coefficient and not self.entropy:
            raise ValueError(
                f"train.entropy_coefficient {self.entropy_coefficient:g} needs train.entropy = true"
            )
        return self

    @property
    def entropy_weight(self) -> float | None:
        """The coefficient; None: the entropy is not computed."""
        return self.entropy_coefficient if self.entropy else None


class DapoTrainSettings(RlTrainSettings):
    updates_per_step: PositiveInt = Field(32, description="optimizer updates on the samples of one round")


class SftTrainSettings(Section):
    epochs: PositiveInt = Field(1, description="passes over the samples")
    global_batch: PositiveInt = Field(8, description="sequences of one update")
    steps: PositiveInt | None = Field(
        None, description="number of updates instead of epochs (none: by epochs)"
    )


class DapoSettings(Section):
    clip_low: Fraction = Field(0.2, description="ratio is clipped below at 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.28, description="ratio is clipped above at 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1)] = Field(
        10.0, description="bound of the loss at negative advantages"
    )
    overlong_buffer: NonNegativeInt = Field(
        10, description="last tokens of the budget, where length costs reward"
    )
    dynamic_sampling: bool = Field(True, description="drop groups whose rewards are all equal")


class PapoSettings(Section):
    train_forced: bool = Field(False, description="count tokens that the engine forced in the loss, too")
    std_epsilon: PositiveFloat = Field(1e-6, description="added to the standard deviation over the batch")


class SampleSettings(Section):
    trials: PositiveInt = Field(8, description="tries a problem; the first right and valid response is kept")
    target: PositiveInt | None = Field(8000, description="stop at so many samples; none = try every problem")
    out: Path = Field(Path("samples.jsonl"), description="file of the kept samples, relative to run.dir")


class SftSettings(Section):
    data: Path = Field(description="samples.jsonl of `npr sample`")


class CheckpointSettings(Section):
    every: NonNegativeInt = Field(10, description="steps between checkpoints; 0 = only at the end")
    keep: PositiveInt = Field(2, description="latest checkpoints that stay on disk")
    async_save: bool = Field(
        True, description="on a GPU: write while training goes on; without one every save waits"
    )


class MemorySettings(Section):
    offload_optimizer: bool = Field(
        False, description="optimizer state lies in (pinned) host memory during rollouts"
    )
    offload_gradients: bool = Field(False, description="gradient buffers are freed during rollouts")
    release_kv: bool = Field(False, description="the engine's KV cache is freed while the policy trains")


class LogSettings(Section):
    backend: Literal["tensorboard", "wandb", "none"] = Field(
        "tensorboard", description="besides metrics.jsonl"
    )
    progress: bool = Field(True, description="progress bar with throughput and remaining time")


EvalMode = Literal["parallel", "unforced", "sequential"]


class EvalSettings(Section):
    table: ClassVar[str] = "eval"
    problems: str = Field(
        description='problems: a JSON or JSONL file, or "demo" for the held-out generated ones'
    )
    count: PositiveInt | None = Field(None, description="use only the first problems; none = all")
    samples_per_problem: Annotated[int, Field(ge=1, le=MOST_RESPONSES)] = Field(
        8, description="responses to each problem"
    )
    modes: tuple[EvalMode, ...] = Field(
        ("parallel",),
        description="parallel: the engine branches; unforced: same prompt, plain decoding; sequential: "
        "sequential prompt, plain decoding",
        min_length=1,
    )
    max_prompt_tokens: PositiveInt = Field(2048, description="longer prompts are skipped and counted")
    instruction: Path | None = Field(
        None, description="instruction text of one's own; none = the shipped one"
    )
    out: Path = Field(Path("eval.json"), description="file of the figures, relative to run.dir")
