"""A policy in training on this rank, with its checkpoints: what the three learning stages share.

Learner ──► trainer.step(...) ──► update_engine() (zero copy where the layouts agree) ──► engine.generate(...)
steps() yields the steps still to do, checkpoints between them, and stops cleanly on Ctrl-C
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist

from megatron_npr.config import MemorySettings, RolloutSettings, TrainingConfig
from megatron_npr.hf.huggingface import export_model
from megatron_npr.model.linears import describe, require_fp8
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.policy_weights import load_policy_weights
from megatron_npr.monitoring.monitor import mean
from megatron_npr.monitoring.spans import span
from megatron_npr.rollout.engine_groups import engine_layout
from megatron_npr.run_folder.claim import CHECKPOINTS
from megatron_npr.run_folder.resumption import INPUTS, input_sums, settings_of
from megatron_npr.runtime.interrupt import stop_requests
from megatron_npr.training.checkpoint import Checkpoints
from megatron_npr.training.engine_weights import EngineWeights, full_weights
from megatron_npr.training.offload import TrainerMemory, rollout_memory
from megatron_npr.training.session import Session, build_engine
from megatron_npr.training.step_report import StepReport
from megatron_npr.training.trainer import Trainer
from megatron_npr.weight_sync.exchange import Exchanged
from npr_engine.backend import Backend
from npr_ext.errors import UserError


class Learner:
    """Policy, optimizer, engine weights and checkpoints of one run."""

    def __init__(
        self,
        session: Session,
        config: TrainingConfig,
        *,
        num_updates: int,
        overlap_param_gather: bool = False,
        entropy_coefficient: float | None = None,
    ) -> None:
        """A fresh policy from model.path, or the one of the run's latest checkpoint; collective.

        `num_updates` of the whole run, for the learning-rate schedule; `entropy_coefficient` None: the entropy is not computed.
        """
        self.session, self._every = session, config.checkpoint.every
        in_fp8 = session.model.dtype == "fp8"
        if in_fp8:
            require_fp8(session.world.device, config.fp8.recipe)
        if session.world.is_main and session.world.device.type == "cuda":
            print(f"npr: {describe(session.world.device, fp8=in_fp8)}", file=sys.stderr)
        policy = build_policy(
            session.model_config,
            session.world,
            dtype=session.dtype,
            parallel=session.parallel,
            recompute=session.model.recompute,
            router_aux_loss=session.model.router_aux_loss,
            fp8=config.fp8 if in_fp8 else None,
            unused_ids=session.vocabulary.unused_ids(session.model_config.vocab_size).tolist(),
            entropy_coefficient=entropy_coefficient,
        )
        load_policy_weights(policy, session.model.path)
        self.trainer = Trainer(
            policy,
            session.world,
            optimizer=config.optimizer,
            batch=config.batch,
            tags=session.vocabulary.tags,
            pad_id=session.pad_id,
            num_updates=num_updates,
            overlap_param_gather=overlap_param_gather,
        )
        self.checkpoints = Checkpoints(
            session.run.dir / CHECKPOINTS,
            session.world,
            keep=config.checkpoint.keep,
            model_folder=session.model.path,
            config=session.config.model_dump(mode="json"),
            # Without a GPU the copy to host memory is no copy: the forked writer would double the memory of every page
            # that training touches meanwhile.
            asynchronous=config.checkpoint.async_save and session.world.device.type == "cuda",
        )
        # Of the files as the run found them: a checkpoint says with which data it was made.
        self._progress = {INPUTS: input_sums(settings_of(session.config))} if session.world.is_main else {}
        self.first_step = self._resume() if session.continued else 0

    def build_engine(self, settings: RolloutSettings) -> Backend:
        """The colocated engine over this learner's weights; collective."""
        session = self.session
        layout = engine_layout(settings, session.parallel, session.model_config, session.world.size)
        fp8 = settings.fp8 and settings.backend == "native"
        self.weights = EngineWeights(self.trainer.policy, layout, fp8=fp8)
        engine = build_engine(session, self.weights.tensors, settings)
        if settings.backend != "native" and self.first_step:
            self.update_engine(engine)  # it has read the folder, not the checkpoint
        return engine

    def rollout_memory(self, engine: Backend, settings: MemorySettings) -> AbstractContextManager[None]:
        """The with-block in which the engine decodes: the device is the engine's in it and the trainer's outside."""
        return rollout_memory(TrainerMemory(self.trainer, settings), engine, settings)

    def update_engine(self, engine: Backend) -> Exchanged:
        """After an optimizer step: the next rollout uses the new weights. Our engine reads the very tensors."""
        with span("weight_sync"):
            self.trainer.gather()
            report = self.weights.update()
            engine.update_weights(self.weights.tensors, report.version)
        return report

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, with a checkpoint every few, at the end, and before a Ctrl-C takes effect.

        UserError where the run has had more steps already.
        """
        if total < self.first_step:
            raise UserError(
                f"these settings ask for {total} steps, the checkpoint in {self.session.run.dir} is of step {self.first_step}: "
                "give at least as many, or start in another run.dir"
            )
        with stop_requests() as stop:
            for step in range(self.first_step, total):
                yield step
                stopping = stop.agreed()
                last = stopping or step + 1 == total
                due = self._every > 0 and (step + 1) % self._every == 0
                with span("save"):
                    if last or due:
                        self.trainer.gather()
                        self.checkpoints.save(step + 1, self.trainer, self._progress)
                    self.checkpoints.finish(wait=last)
                if stopping and step + 1 < total:
                    raise KeyboardInterrupt

    def metrics(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """The figures of a step's updates (means, sums of seconds, the largest memory), and of how evenly experts are loaded
        where a loss balances them; those of no update are NaN."""
        values = {
            "loss": mean(report.loss for report in reports),
            "grad_norm": mean(report.grad_norm for report in reports),
            "train_seconds": sum(report.seconds for report in reports),
            "train_memory_gb": max((report.memory_gb for report in reports), default=math.nan),
            "imbalance": mean(report.imbalance for report in reports),
            "lr": self.trainer.lr,
        }
        if self.trainer.balances_experts:
            values["load_balance"] = mean(report.load_balance for report in reports)
        return values

    def export(self) -> None:
        """Write the policy as a Hugging Face folder, run.dir/model; collective."""
        self.trainer.gather()
        full = full_weights(self.trainer.policy)
        if self.session.world.is_main:
            export_model(
                full, self.session.model_config, self.session.model.path, self.session.run.dir / "model"
            )
        dist.barrier()

    def _resume(self) -> int:
        restored = self.checkpoints.resume(self.trainer)
        return 0 if restored is None else restored[0]
