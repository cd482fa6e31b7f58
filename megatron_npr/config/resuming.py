"""What a changed setting means for training that continues: each of its keys stands in one of three tables.

KEPT      the run's state or identity depends on the value: another one is refused
BY_SUM    the key names a file or folder: it may lie elsewhere, but must hold what the run began with (so for sample and eval)
HONOURED  holds from the next step on: the checkpoint has nothing of it, or restores it at the new value
"""

KEPT = {
    "run.seed": "its samples and the order of its data follow from it",
    "model.dtype": "its weights are stored in it",
    "fp8.recipe": "its scales are stored with the weights",
    "fp8.format": "its scales are stored with the weights",
    "fp8.first_layers_bf16": "its scales are stored with the weights",
    "fp8.last_layers_bf16": "its scales are stored with the weights",
    "fp8.parameters": "its weights are stored so",
    "data.count": "the order of its data follows from it",
    "data.max_prompt_tokens": "which problems it has follows from it",
    "data.mode": "its prompts follow from it",
    "rollout.prompts_per_step": "its place in the data is counted in it",
    "train.global_batch": "its place in the data is counted in it",
}
"""Key -> why the run keeps its value."""

BY_SUM = frozenset(
    {"model.path", "data.train", "data.instruction", "sft.data", "eval.problems", "eval.instruction"}
)

HONOURED = frozenset(
    f"{table}.{key}"
    for table, keys in {
        "run": "dir resume overwrite threads",
        "model": "recompute router_aux_loss",
        "parallel": "tp pp cp vpp ep first_layers last_layers sequence_parallel",
        "rollout": "samples_per_prompt max_tokens temperature top_p top_k min_p repetition_penalty max_branches "
        "max_blocks branching backend tp ep kv_slots block_size max_running_requests max_batch_tokens fp8",
        "optimizer": "lr min_lr schedule warmup_steps warmup_fraction weight_decay beta1 beta2 eps grad_clip overlap "
        "bucket_size",
        "batch": "micro_batch_tokens share_prompts",
        "train": "steps epochs updates_per_step entropy entropy_coefficient agreement_warning agreement_limit",
        "dapo": "clip_low clip_high dual_clip overlong_buffer dynamic_sampling",
        "papo": "train_forced std_epsilon",
        "memory": "offload_optimizer offload_gradients release_kv",
        "checkpoint": "every keep async_save",
        "log": "backend progress",
    }.items()
    for key in keys.split()
)
