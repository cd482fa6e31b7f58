"""Products of Megatron's layers on the CPU: the same as in float64, whichever library computes them."""

import pytest
import torch

from megatron_npr.repairs.cpu_matmul import product, takes
from npr_engine.model.linear import HAS_ONEDNN


@pytest.mark.parametrize("tokens", [1, 2, 37, 1500])
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 96), (96, 320), (2, 64), (64, 1), (48, 48)])
def test_outputs_and_both_gradients_are_those_of_float64(tokens: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(tokens * outputs + inputs)
    x, weight, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    with torch.no_grad():
        for left, right in ((x, weight.t()), (grad, weight), (grad.t(), x)):
            wanted = left.double() @ right.double()
            assert takes(left, right) == (right.shape[0] <= 1024 or (right is x and HAS_ONEDNN))
            bound = 4 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs())
            assert ((product(left, right).double() - wanted).abs() <= bound + 1e-30).all()


def test_a_batch_of_rows_keeps_its_shape() -> None:
    x, weight = torch.randn(3, 5, 16), torch.randn(16, 7)
    with torch.no_grad():
        assert takes(x, weight)
        torch.testing.assert_close(product(x, weight), x @ weight)


def test_what_autograd_records_or_is_empty_is_left_to_torch() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 6, requires_grad=True)
    assert not takes(x, weight)
    with torch.no_grad():
        assert takes(x, weight)
        assert not takes(torch.empty(0, 8), weight)
        assert not takes(torch.empty(6, 0), torch.empty(0, 8))
