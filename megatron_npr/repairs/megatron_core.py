"""Repairs of Megatron-Core on any device: the distributed optimizer's state in a checkpoint, routers and weights of experts.

Those of the optimizer's state are applied around save and load only; without them a resumed run silently differs.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_npr.repairs.repair import Repair, Replacement

_MEGATRON = "megatron-core==0.16.1"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def _set_with_own_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """torch's AdamW (no apex, no Transformer Engine) keeps a `step` tensor for each parameter. Megatron saves it once, then
    looks for it among the loaded tensors (KeyError), and hands one tensor to all parameters, which then counts each of them.
    """

    def set_main_param_and_optimizer_states(
        self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    return set_main_param_and_optimizer_states


def _gather_with_padding(gather_states: Callable[..., Any]) -> Callable[..., Any]:
    """The gathered buckets are joined without their end padding, then cut by offsets that include it: with more than one bucket
    (a tied embedding under pipeline parallelism has its own) and a padded one, states land on other parameters."""

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = gather_states(self, *args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(self.buffers):
                for tensors in state[index].values():
                    for name in ("param", "exp_avg", "exp_avg_sq"):
                        if name in tensors:
                            tensors[name] = _padded(tensors[name], buffer)
        return state

    return get_parameter_state_dp_zero


def _padded(joined: Tensor, buffer: Any) -> Tensor:
    """Unpadded buckets end to end -> each at its own offset of the buffer."""
    padded = joined.new_zeros(buffer.numel)
    offset = 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        padded[start : start + bucket.numel_unpadded] = joined[offset : offset + bucket.numel_unpadded]
        offset += bucket.numel_unpadded
    return padded


RESULTS_OF_WRITERS = Replacement(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    _MEGATRON,
    "a save in this process starts another for a queue: seconds of imports, and 500 MB that outlive a kill -9",
    "it asks for that process for asynchronous saves alone",
    "`megatron_core.RESULTS_OF_WRITERS`, around saves that wait",
    make=lambda _: queue.Queue,
)

OPTIMIZER_STATE = (
    Replacement(
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        _MEGATRON,
        "the state of torch's AdamW is not loaded (KeyError: step), and its parameters share one step count",
        "it takes tensors without `step`, and each parameter counts its own steps",
        "`megatron_core.OPTIMIZER_STATE`, around save and load",
        make=_set_with_own_step,
    ),
    Replacement(
        f"{_OPTIMIZER}.get_parameter_state_dp_zero",
        _MEGATRON,
        "with several buckets, one of them padded, moments land on other parameters",
        "what it returns is as long as the buffer, padding included",
        "`megatron_core.OPTIMIZER_STATE`, around save and load",
        make=_gather_with_padding,
    ),
)


class RouterInPyTorch(TopKRouter):
    """Megatron's top-k router, whose logits do not ask for Transformer Engine."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] in fp32, whatever the model's type (fp64 for fp64)."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return functional.linear(input.to(wide), self.weight.to(wide))


ROUTER = Repair(
    "megatron.core.transformer.moe.router:Router.gating",
    _MEGATRON,
    "it asks for a function of Transformer Engine that is not defined where that is not installed (NameError)",
    "it looks whether Transformer Engine is installed",
    "`megatron_core.RouterInPyTorch`, the base class of our router",
)


def mark_expert_weights(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Marks the weights of experts whose gradients are sums over another group of ranks than the other weights'.

    Megatron marks them under expert parallelism alone. Under tensor parallelism, too, experts are whole and each rank has
    tokens of its own: unmarked, every rank would train experts of its own.
    """
    if config.tensor_model_parallel_size == config.expert_tensor_parallel_size:
        return
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for weight in layer.experts.parameters():
                weight.allreduce = False


EXPERT_WEIGHTS = Repair(
    "megatron.core.tensor_parallel.layers:ColumnParallelLinear.weight.allreduce",
    _MEGATRON,
    "whole experts under tensor parallelism are not marked: each rank trains experts of its own",
    "it marks them wherever tp differs from the experts' tp",
    "`megatron_core.mark_expert_weights`, on our policy when it is built",
)

OUTSIDE = (
    Repair(
        "megatron.core.models.gpt:GPTModel.forward",
        _MEGATRON,
        "under sequence parallelism `padding_mask` is cut on the first pipeline stage alone",
        "it cuts the mask on every stage",
        "`model/policy.py`: `forward` of our subclass",
    ),
    Repair(
        "megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight",
        _MEGATRON,
        "untied, it gives the input embedding wherever a chunk has one",
        "it gives the output layer's weight where that is not shared",
        "`model/policy.py`: `head_weight` of our subclass",
    ),
    Repair(
        "megatron.core.pipeline_parallel.schedules:deallocate_output_tensor",
        _MEGATRON,
        "interleaved stages free outputs before gloo has sent them: the receiver reads garbage",
        "it waits for the send, or does not free on a CPU",
        "`model/transformer_config.py`: `deallocate_pipeline_outputs` is off there",
    ),
    Repair(
        f"{_OPTIMIZER}.sharded_state_dict",
        _MEGATRON,
        "an optimizer that has not stepped can neither be saved nor loaded",
        "it makes the state that is missing",
        "`training/optimizer_state.py`: `allocate_optimizer_state`",
    ),
    Repair(
        f"{_OPTIMIZER}.load_state_dict",
        _MEGATRON,
        "rates, betas and the like are taken over from the checkpoint",
        "it can load moments and steps alone",
        "`training/optimizer_state.py`: `own_settings`, around load",
    ),
    Repair(
        "megatron.core.optimizer:ChainedOptimizer.load_state_dict",
        _MEGATRON,
        "experts have an optimizer of their own in some layouts: a checkpoint of another does not load",
        "it loads the state of one optimizer into two and back",
        "`training/optimizer_state.py`: `regrouped_state`",
    ),
)
"""Gaps that need no other code of Megatron's, only other calls: met where we make them."""

REPAIRS: tuple[Repair, ...] = (*OPTIMIZER_STATE, RESULTS_OF_WRITERS, ROUTER, EXPERT_WEIGHTS, *OUTSIDE)
