from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difflayers.prox import L2, Blur, Mask, MatrixOperator
from difflayers.prox.linear_operators import Operator


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "identity": (None, (2, 3)),
    "mask": (Mask(randn(3)), (2, 3)),
    "matrix": (MatrixOperator(randn(2, 6), shape=(2, 3)), (2, 2, 3)),
    "blur": (Blur(randn(2, 2)), (2, 1, 3, 3)),
}


@pytest.mark.parametrize(("operator", "shape"), CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("weight", [1.0, 0.4, torch.tensor([0.4, 3.0]).double()], ids=["one", "number", "each its own"])
def test_gradient_and_prox_are_those_of_the_value(operator: Operator | None, shape: tuple[int, ...], weight: Tensor | float) -> None:
    fidelity = L2(operator, weight)
    x, y = randn(*shape, seed=1).requires_grad_(), randn(*shape, seed=2)
    y = y if operator is None else operator.A(y)
    value = fidelity(x, y)
    assert value.shape == (2,)
    torch.testing.assert_close(fidelity.grad(x, y), torch.autograd.grad(value.sum(), x)[0])
    # u = prox(x) satisfies x − u = γ ∇f(u).
    gamma = torch.tensor([0.3, 1.5]).double()
    u = fidelity.prox(x, y, gamma=gamma)
    torch.testing.assert_close(x - u, gamma.reshape(2, *[1] * (x.dim() - 1)) * fidelity.grad(u, y))


def test_an_operator_at_the_call_takes_the_place_of_the_first() -> None:
    first, second = Mask(randn(3)), Mask(randn(3, seed=1))
    x, y = randn(2, 3, seed=2), randn(2, 3, seed=3)
    for method, options in (("forward", {}), ("grad", {}), ("prox", {"gamma": 0.5})):
        found = getattr(L2(first), method)(x, y, second, **options)
        torch.testing.assert_close(found, getattr(L2(second), method)(x, y, **options), rtol=0, atol=0)
    torch.testing.assert_close(L2(first).start(y, second), second.mask * y, rtol=0, atol=0)


def test_weight_and_operator_are_learned_if_they_are_parameters() -> None:
    fidelity = L2(Blur(nn.Parameter(randn(2, 2))), nn.Parameter(torch.tensor(1.0).double()))
    assert {name for name, _ in fidelity.named_parameters()} == {"weight", "operator.kernel"}
    fidelity.prox(randn(1, 1, 3, 3), randn(1, 1, 3, 3, seed=1)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in fidelity.parameters())
    assert "weight=1" in repr(fidelity)
