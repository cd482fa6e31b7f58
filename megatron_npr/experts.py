"""Mixture of experts: Megatron's layer with a router that runs where Transformer Engine is not installed.

hidden states ──► Router (fp32) ──► Megatron's all-to-all dispatcher over parallel.ep ranks ──► local experts ──► back, summed

Local experts are one grouped GEMM a projection where the library has it, one MLP after the other elsewhere. Either way a weight
an expert; `weights.global_name` gives them one name.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional

from megatron_npr.linears import LinearModules


class Router(TopKRouter):
    """Megatron's top-k router, [S, B, D] -> probabilities and map [S * B, E].

    Megatron-Core 0.16.1 asks for a function of Transformer Engine before it looks whether that is installed.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] in fp32, whatever the model's type (fp64 for fp64)."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return functional.linear(input.to(wide), self.weight.to(wide))


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
