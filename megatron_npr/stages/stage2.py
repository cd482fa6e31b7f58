"""Stage 2, NPR-Beta: supervised fine-tuning of the BASE model on its own accepted responses, under branch layouts.

samples.jsonl ─► shuffled global batches ─► packed rows with branch masks and positions ─► token-mean NLL ─► update
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from megatron_npr.config import Stage2Config
from megatron_npr.data.packing import PackedRow, TrainSample
from megatron_npr.data.rounds import round_places
from megatron_npr.data.samples import read_samples
from megatron_npr.monitoring.monitor import monitored
from megatron_npr.rl.losses import LossSum, sft_loss
from megatron_npr.runtime.process_world import on_first_rank
from megatron_npr.training.learner import Learner
from megatron_npr.training.room import check_sample_room
from megatron_npr.training.session import open_session


def run(config: Stage2Config) -> None:
    """Train, checkpoint, and leave the model in run.dir/model."""
    session = open_session(config)
    read = on_first_rank(session.world, lambda: read_samples(config.sft.data, session.vocabulary))
    samples = [sample.train_sample() for sample in read]
    check_sample_room(session, samples, config.sft.data, config.batch)
    total = num_updates(samples, config)
    learner = Learner(session, config, num_updates=total, overlap_param_gather=True)
    first = learner.first_step
    with monitored("stage 2", config.run, config.log, session.world, total=total, first=first) as monitor:
        for step in learner.steps(total):
            chosen = round_places(len(samples), config.train.global_batch, step, config.run.seed)
            report = learner.trainer.step([samples[place.row] for place in chosen], objective, branching=True)
            monitor.step(step, learner.metrics([report]), tokens=report.num_tokens, shown=("loss",))
    learner.export()


def num_updates(samples: Sequence[TrainSample], config: Stage2Config) -> int:
    """`train.steps`, or as many as `train.epochs` passes take."""
    return config.train.steps or config.train.epochs * math.ceil(len(samples) / config.train.global_batch)


def objective(log_probs: Tensor, row: PackedRow) -> LossSum:
    """Next-token likelihood of all assistant tokens."""
    return sft_loss(log_probs)
