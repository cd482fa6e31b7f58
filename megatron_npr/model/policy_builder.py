"""Builds the policy: the layers that each rank holds, as Megatron modules with random weights.

    ModelConfig, World, ParallelSettings ──► trainer_layout ──► transformer_config ──► PolicyChunk x vpp ──► Policy

UserError where the model does not go with the parallel settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_npr.config import Fp8Settings, ParallelSettings, Recompute
from megatron_npr.model.fp8_linears import LinearConfig
from megatron_npr.model.layers import LayoutCache, RMSNorm, layer_spec
from megatron_npr.model.linears import LinearModules, layer_linears, linear_modules
from megatron_npr.model.policy import Policy, PolicyChunk
from megatron_npr.model.transformer_config import transformer_config
from megatron_npr.repairs.megatron_core import mark_expert_weights
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.sharding.layouts import EngineLayout, TrainerLayout, check_layouts, split_layers
from megatron_npr.sharding.weights import padded_vocabulary
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError

NO_AXES = ParallelSettings()


def trainer_layout(model: ModelConfig, world: World, parallel: ParallelSettings) -> TrainerLayout:
    """The grid of this world; UserError where the layers cannot be split so."""
    return TrainerLayout(
        layers=split_layers(
            model.num_layers,
            pp=world.pp_size,
            vpp=world.vpp_size,
            first=parallel.first_layers,
            last=parallel.last_layers,
        ),
        tp=world.tp_size,
        pp=world.pp_size,
        dp_cp=world.cp_size * world.dp_size,
        ep=world.ep_size,
    )


def build_policy(
    model: ModelConfig,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelSettings = NO_AXES,
    recompute: Recompute = "none",
    router_aux_loss: float = 0.0,
    fp8: Fp8Settings | None = None,
    unused_ids: Sequence[int] = (),
    entropy_coefficient: float | None = None,
    linears: LinearModules | None = None,
) -> Policy:
    """The policy's part on this rank, randomly initialised.

    The sizes of the axes are those of `world`, `parallel` tells how layers and activations go with them. `unused_ids` are
    the vocabulary's rows that no token has (Vocabulary.unused_ids): they take no probability. With an
    `entropy_coefficient` the entropy is computed beside the log-probs, with gradient unless it is 0. `linears`: the
    device's by default.
    """
    linears = linears or linear_modules(world.device, fp8=fp8 is not None)
    layout = trainer_layout(model, world, parallel)
    check_layouts(model, layout, EngineLayout())
    if model.num_experts and world.tp_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "a model with experts under parallel.tp >= 2 needs parallel.sequence_parallel = true: Megatron dispatches "
            "sharded tokens"
        )
    config = transformer_config(
        model,
        world,
        dtype=dtype,
        parallel=parallel,
        recompute=recompute,
        router_aux_loss=router_aux_loss,
        fp8=fp8,
        linears=linears,
    )
    layouts = LayoutCache()
    with megatron_context():
        chunks = [
            _build_chunk(
                model,
                world,
                config,
                linears,
                number,
                unused_ids,
                entropy_coefficient,
                layouts,
            )
            for number in range(world.vpp_size)
        ]
    return Policy([chunk.to(world.device) for chunk in chunks], layout)


def _build_chunk(
    model: ModelConfig,
    world: World,
    config: LinearConfig,
    linears: LinearModules,
    number: int,
    unused_ids: Sequence[int],
    entropy_coefficient: float | None,
    layouts: LayoutCache,
) -> PolicyChunk:
    stage = number if world.vpp_size > 1 else None  # Megatron's name for "not interleaved"
    first = get_transformer_layer_offset(config, vp_stage=stage, pp_rank=world.pp_rank)
    layers = range(first, first + get_num_layers_to_build(config, stage))
    chunk = PolicyChunk(
        model_config=model,
        world=world,
        unused_ids=unused_ids,
        entropy_coefficient=entropy_coefficient,
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[
                layer_spec(
                    layouts,
                    qk_norm=model.qk_norm,
                    experts=model.num_experts > 0,
                    linears=layer_linears(linears, config, layer),
                )
                for layer in layers
            ],
            layer_norm=RMSNorm,
        ),
        vocab_size=padded_vocabulary(model.vocab_size, world.tp_size),
        max_sequence_length=1 << 30,  # positions come from the layout; nothing is sized by this
        pre_process=world.pp_rank == 0 and number == 0,
        post_process=world.is_last_stage and number == world.vpp_size - 1,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="mrope",
        rotary_base=model.rope_theta,
        vp_stage=stage,
    )
    mark_expert_weights(chunk, config)
    return chunk
