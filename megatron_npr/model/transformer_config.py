"""Megatron's configuration of the policy, from the model's shape, the world and the run's settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from megatron_npr.config import Fp8Settings, ParallelSettings, Recompute
from megatron_npr.model.fp8_linears import LinearConfig
from megatron_npr.model.linears import LinearModules, fp8_options, fuses_gradients, linear_modules
from megatron_npr.runtime.process_world import World
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError

RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    # Attention keeps O(T) already; the widest activations are the MLP's.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    model: ModelConfig,
    world: World,
    *,
    dtype: torch.dtype,
    parallel: ParallelSettings,
    recompute: Recompute = "none",
    router_aux_loss: float = 0.0,
    fp8: Fp8Settings | None = None,
    linears: LinearModules | None = None,
) -> LinearConfig:
    """Megatron's configuration of a model in this world; `linears`: the device's by default."""
    linears = linears or linear_modules(world.device, fp8=fp8 is not None)
    for name, count in (
        ("num_attention_heads", model.num_heads),
        ("num_key_value_heads", model.num_kv_heads),
    ):
        if count % world.tp_size:
            raise UserError(
                f"parallel.tp {world.tp_size} does not divide the model's {name} {count}: choose a divisor"
            )
    return LinearConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_te_activation_func=linears.activation is not None,  # the name means: a module, whoever's
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fuses_gradients(world.device),
        use_cpu_initialization=world.device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=world.tp_size,
        pipeline_model_parallel_size=world.pp_size,
        virtual_pipeline_model_parallel_size=world.vpp_size if world.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_layers,
        num_layers_in_last_pipeline_stage=parallel.last_layers,
        context_parallel_size=world.cp_size,
        sequence_parallel=parallel.sequence_parallel and world.tp_size > 1,
        calculate_per_token_loss=True,
        mrope_section=[model.head_dim // 2, 0, 0],
        softmax_scale=_softmax_scale(model),
        perform_initialization=True,
        # The overlapped schedule frees outputs before their send has ended: NCCL's stream orders that, gloo reads garbage.
        deallocate_pipeline_outputs=world.vpp_size == 1 or world.device.type == "cuda",
        # Interleaved chunks send both ways between the same two ranks: one batch of messages would mix them up under pp 2.
        overlap_p2p_comm=world.vpp_size > 1,
        batch_p2p_comm=world.vpp_size == 1,
        **(
            RECOMPUTE[recompute]
            | (_moe_settings(model, world, recompute, router_aux_loss, linears) if model.num_experts else {})
            | (fp8_options(fp8, linears, num_layers=model.num_layers, stages=world.pp_size) if fp8 else {})
        ),
    )


def _softmax_scale(model: ModelConfig) -> float | None:
    """1 / sqrt(H) (None), times the factor that stretched RoPE gives to queries and to keys: Megatron rotates without it."""
    if model.rope_scaling is None:
        return None
    return model.rope_scaling.attention_factor**2 / math.sqrt(model.head_dim)


def _moe_settings(
    model: ModelConfig, world: World, recompute: Recompute, router_aux_loss: float, linears: LinearModules
) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts: no token is dropped, the router computes in fp32."""
    settings: dict[str, Any] = {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.experts_per_token,
        # softmax over the chosen experts alone IS softmax over all of them, divided by the sum of the chosen
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # Megatron's own; ours is `load_balance`
        "moe_aux_loss_coeff": router_aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": linears.grouped is not None,
        "expert_model_parallel_size": world.ep_size,
        "expert_tensor_parallel_size": 1,
    }
    return settings | ({"recompute_modules": ["moe"]} if recompute == "selective" else {})
