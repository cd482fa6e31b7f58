"""What updates the policy: Megatron's DDP around its chunks, the distributed optimizer and the learning-rate schedule."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_npr.config import OptimizerSettings
from megatron_npr.model.policy import Policy, PolicyChunk


def wrap_chunks(
    policy: Policy, *, bucket_size: int | None, overlap_grad_reduce: bool, overlap_param_gather: bool
) -> list[DistributedDataParallel]:
    """The policy's chunks, each with gradient buffers in fp32 and their reduction; within `megatron_context`.

    `bucket_size`: parameters of one message.
    """
    chunks = []
    for number, chunk in enumerate(policy.chunks):
        wrapped = DistributedDataParallel(
            config=policy.config,
            # One each: Megatron writes the bucket size that it chose into it.
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap_grad_reduce,
                overlap_param_gather=overlap_param_gather,
                bucket_size=bucket_size,
                fp8_param_gather=policy.config.fp8_param,
            ),
            module=chunk,
            # Only the first chunk's reduction ends behind all the others.
            disable_bucketing=number > 0,
        )
        if overlap_param_gather:
            _gather_head_in_time(wrapped, chunk)
        chunks.append(wrapped)
    return chunks


def _gather_head_in_time(wrapped: DistributedDataParallel, chunk: PolicyChunk) -> None:
    """Log-probs read the head's weight itself, so Megatron's hook on its module does not wait for it."""
    if chunk.post_process:
        group = wrapped.param_to_bucket_group[chunk.head_weight]
        chunk.decoder.final_layernorm.register_forward_pre_hook(lambda *_: group.finish_param_sync())


def build_optimizer(
    chunks: list[DistributedDataParallel],
    policy: Policy,
    settings: OptimizerSettings,
    *,
    overlap_param_gather: bool,
) -> MegatronOptimizer:
    """Adam whose state each data-parallel rank holds a part of; `chunks`: what `wrap_chunks` returned."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap_param_gather,
        bf16=policy.config.bf16,
        params_dtype=policy.config.params_dtype,
        fp8_recipe=policy.config.fp8_recipe if policy.config.fp8 else None,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=policy.world.device.type == "cuda")


def build_schedule(
    optimizer: MegatronOptimizer, settings: OptimizerSettings, num_updates: int
) -> OptimizerParamScheduler:
    """Learning rate: linear warm-up from 0, then `settings.schedule` down to `min_lr` over `num_updates` updates."""
    warmup = min(settings.warmup(num_updates), max(num_updates - 1, 0))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_updates, warmup + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(num_updates, 1),
        wd_incr_style="constant",
        # A run that resumes counts on from its checkpoint, on the schedule of its own settings.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
