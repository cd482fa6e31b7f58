"""One FP8 linear layer under any tensor-parallel layout against float64: for the unit tests and the worlds of processes."""

from __future__ import annotations

import numpy as np
import torch

from megatron_npr.config import Fp8Settings, ParallelSettings
from megatron_npr.model.fp8_linears import Fp8ColumnParallelLinear, Fp8RowParallelLinear, LinearConfig
from megatron_npr.model.fp8_matmul import Fp8Format
from megatron_npr.model.transformer_config import transformer_config
from megatron_npr.runtime.process_world import World, megatron_context
from npr_engine.model.transformer import ModelConfig
from tests.support.fp8.truth import E4M3, E5M2, Array, quantised

MODEL = ModelConfig(4, 64, 4, 2, 16, 96, 97)
TOKENS, INPUTS, OUTPUTS = 24, 40, 56  # 24 and 56 are no multiples of 16, half of 40 and 56 neither
KINDS = {"column": Fp8ColumnParallelLinear, "row": Fp8RowParallelLinear}


def config_of(
    world: World, format: Fp8Format, dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False
) -> LinearConfig:
    return transformer_config(
        MODEL,
        world,
        dtype=dtype,
        parallel=ParallelSettings(tp=world.tp_size, sequence_parallel=sequence_parallel),
        fp8=Fp8Settings(format=format),
    )


def new_layer(kind: str, config: LinearConfig, weight_NK: torch.Tensor) -> torch.nn.Module:
    """A layer with a bias, holding this weight (or this part of one)."""
    ends = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    with megatron_context():
        layer = KINDS[kind](
            INPUTS,
            OUTPUTS,
            config=config,
            init_method=torch.nn.init.normal_,
            bias=True,
            skip_bias_add=False,
            **ends,
        )
    with torch.no_grad():
        layer.weight.copy_(weight_NK)
        layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    return layer


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Parts of very different sizes: ranks that took scales of their own parts would be seen."""
    generator = torch.Generator().manual_seed(seed)
    row, column = (torch.linspace(0.1, 2.0, count).exp() for count in shape)
    return torch.randn(shape, generator=generator) * row[:, None] * column


def rounded_terms(x: Array, w: Array, dy: Array, format: Fp8Format) -> dict[str, tuple[Array, Array]]:
    """Factors of y, dx and dW as an FP8 layer has them."""
    qx, qw = quantised(x, E4M3), quantised(w, E4M3)
    qdy = quantised(dy, E5M2 if format == "hybrid" else E4M3)
    return {"y": (qx, qw.T), "dx": (qdy, qw), "dw": (qdy.T, qx)}


def errors(
    world: World,
    kind: str,
    format: Fp8Format,
    dtype: torch.dtype = torch.float32,
    *,
    sequence_parallel: bool = False,
) -> dict[str, float]:
    """Largest |ours - truth| of y, dx, dW on this rank, over what the magnitudes of its terms sum to."""
    x, w, dy = numbers(0, TOKENS, INPUTS), numbers(1, OUTPUTS, INPUTS), numbers(2, TOKENS, OUTPUTS)
    x, w, dy = (tensor.to(dtype) for tensor in (x, w, dy))
    terms = rounded_terms(*(tensor.double().numpy() for tensor in (x, w, dy)), format)
    columns = {"column": {"y", "dy"}, "row": {"x", "dx", "w", "dw"}}[kind]  # split along the last dim
    rows = {"column": {"w", "dw"}, "row": set()}[kind]
    tokens = ({"column": {"x", "dx"}, "row": {"y", "dy"}}[kind]) if sequence_parallel else set()

    def part(name: str, tensor: Array | torch.Tensor) -> Array | torch.Tensor:
        """This rank's."""
        rank, size = world.tp_rank, world.tp_size
        if name in rows | tokens:
            share = len(tensor) // size
            return tensor[rank * share : (rank + 1) * share]
        if name in columns:
            share = tensor.shape[1] // size
            return tensor[:, rank * share : (rank + 1) * share]
        return tensor

    config = config_of(world, format, dtype, sequence_parallel=sequence_parallel)
    layer = new_layer(kind, config, part("w", w))
    own = part("x", x)[:, None].clone().requires_grad_()
    with megatron_context():
        y, _ = layer(own)
        y.backward(part("dy", dy)[:, None])
    bias = layer.bias.detach()
    ours = {"y": (y.detach() - bias)[:, 0], "dx": own.grad[:, 0], "dw": layer.weight.grad}
    found = {}
    for name, (left, right) in terms.items():
        truth, size = (part(name, each) for each in (left @ right, np.abs(left) @ np.abs(right)))
        assert ours[name].dtype == dtype and ours[name].shape == truth.shape
        # y comes with the bias in it
        size = size + float(bias.abs().max()) if name == "y" else size
        found[name] = float((np.abs(ours[name].double().numpy() - truth) / size).max())
    return found
