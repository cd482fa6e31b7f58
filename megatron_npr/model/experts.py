"""Mixture of experts: Megatron's layer with a router that runs where Transformer Engine is not installed.

hidden states ──► Router (fp32) ──► Megatron's all-to-all dispatcher over parallel.ep ranks ──► local experts ──► back, summed

Local experts are one grouped GEMM a projection where the library has it, one MLP after the other elsewhere. Either way a weight
an expert; `weights.global_name` gives them one name.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_npr.model.linears import LinearModules
from megatron_npr.model.load_balance import ExpertLoad
from megatron_npr.repairs.megatron_core import RouterInPyTorch


class Router(RouterInPyTorch):
    """Megatron's top-k router, [S, B, D] -> probabilities and map [S * B, E], with a balancing loss of our own.

    While `load` is set, tokens outside of `padding_mask` are counted in (`counting`) or add their part of `load`'s loss to the
    gradient, `load_weight` times. Megatron's own loss knows one micro-batch, and scales with all of its tokens.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.load: ExpertLoad | None = None
        self.load_weight = 0.0
        self.counting = False

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and map [S * B, E] from logits [S, B, E]; `padding_mask` bool [S, B], True: not counted."""
        probabilities_SE, chosen_SE = super().routing(logits)
        if self.load is None or padding_mask is None:
            return probabilities_SE, chosen_SE
        counted_S1 = ~padding_mask.reshape(-1, 1)
        all_SE = logits.reshape(-1, logits.shape[-1]).softmax(-1) * counted_S1
        if self.counting:
            self.load.add(chosen_SE & counted_S1, all_SE)
        elif torch.is_grad_enabled():  # without, it is the first of two passes under recompute
            loss = self.load_weight * self.load.part(all_SE)
            probabilities_SE = MoEAuxLossAutoScaler.apply(probabilities_SE, loss)
        return probabilities_SE, chosen_SE


def experts_spec(linears: LinearModules) -> ModuleSpec:
    """The MLP of a layer with experts; the configuration's `moe_grouped_gemm` has to go with it."""
    module, (column, row) = (
        (SequentialMLP, (linears.column, linears.row))
        if linears.grouped is None
        else (TEGroupedMLP, linears.grouped)
    )
    mlp = MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=linears.activation)
    experts = ModuleSpec(module=module, submodules=mlp)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
