"""Large clouds: the dense layer's numbers and derivatives, blocks that change nothing, memory, maps, failures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from benchmarks.timing import peak_memory
from difflayers.errors import InfeasibleError, NotConvergedError, ShapeError
from difflayers.solution import Status
from difflayers.transport import entropic_map, sinkhorn, sinkhorn_divergence, sinkhorn_points
from tests.transport.problems import marginal, random_cost


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.floats(-2.5, 1), st.integers(1, 10), st.integers(0, 10_000))
def test_equals_the_dense_layer(n: int, m: int, d: int, log_epsilon: float, block: int, seed: int) -> None:
    x, y, a, b = random_cost(n, d, seed=seed), random_cost(m, d, seed=seed + 1), marginal(n, seed=seed), marginal(m, seed=seed + 1)
    leaves = [part.requires_grad_() for part in (x, y, a, b)]
    epsilon = 10**log_epsilon
    exact = sinkhorn(_cost(x, y), a, b, epsilon=epsilon, tol=1e-12)
    found = sinkhorn_points(*leaves, epsilon=epsilon, block_size=block, tol=1e-12)
    torch.testing.assert_close(found.dual_value, exact.dual_value, rtol=0, atol=1e-10)
    slopes, wanted = (torch.autograd.grad(part.dual_value, leaves) for part in (found, exact))
    for slope, true in zip(slopes[:2], wanted[:2], strict=True):
        torch.testing.assert_close(slope, true, rtol=0, atol=1e-8)
    for slope, true in zip(slopes[2:], wanted[2:], strict=True):
        torch.testing.assert_close(slope - slope.mean(), true - true.mean(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)])
def test_potentials_and_second_derivatives(cost: object) -> None:
    x, y, a = random_cost(9, 2).requires_grad_(), random_cost(7, 2, seed=1).requires_grad_(), marginal(9).requires_grad_()
    matrix = {"sqeuclidean": _cost(x, y), "euclidean": _cost(x, y).sqrt()}.get(cost) if isinstance(cost, str) else cost(x, y)
    exact = sinkhorn(matrix, a, epsilon=0.1, tol=1e-13)
    for block in (1, 4, 100):
        found = sinkhorn_points(x, y, a, epsilon=0.1, cost=cost, block_size=block, tol=1e-13)
        for name in ("f", "g", "dual_value"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0, atol=1e-10)
        gradients = []
        for part in (found, exact):
            loss = part.f.square().sum() + (part.g * torch.arange(7)).sum() + part.dual_value
            first = torch.autograd.grad(loss, (x, y), create_graph=True)
            second = torch.autograd.grad(sum(slope.square().sum() for slope in first), (x, y), retain_graph=True)
            hessian = torch.autograd.grad(part.dual_value, x, create_graph=True)[0]
            gradients.append([*first, *second, torch.autograd.grad(hessian[0, 0], y, retain_graph=True)[0]])
        for slope, true in zip(*gradients, strict=True):
            torch.testing.assert_close(slope, true, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory(order: int) -> None:
    # One matrix of these clouds takes 122 MB.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()

    def run() -> None:
        value = sinkhorn_points(x, y, epsilon=2.0, tol=1e-2 if order == 1 else 1e-6).dual_value
        (slope,) = torch.autograd.grad(value, x, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad(slope.square().sum(), x)

    assert peak_memory(run) < 45 * 2**20


@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_temperatures(epsilon: float, dtype: torch.dtype) -> None:
    x, y = random_cost(60, 2).to(dtype).requires_grad_(), (random_cost(50, 2, seed=1) + 0.3).to(dtype).requires_grad_()
    found = sinkhorn_points(x, y, epsilon=epsilon)
    assert found.f.dtype == dtype
    exact = sinkhorn(_cost(x.double(), y.double()), epsilon=epsilon)
    torch.testing.assert_close(found.dual_value.double(), exact.dual_value, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-5)
    loss = found.dual_value + found.f.square().sum()
    assert all(bool(torch.isfinite(slope).all()) for slope in torch.autograd.grad(loss, (x, y)))


def test_a_cloud_beside_itself_takes_few_sweeps() -> None:
    x, a = random_cost(80, 2), marginal(80)
    for epsilon in (0.1, 1e-2, 1e-4):
        found = sinkhorn_points(x, x, a, a, epsilon=epsilon)
        assert int(found.iterations) <= 80
        torch.testing.assert_close(found.f, found.g, rtol=0, atol=1e-9)


def test_zero_masses() -> None:
    x, y = random_cost(6, 2).requires_grad_(), random_cost(5, 2, seed=1).requires_grad_()
    a = torch.tensor([0.3, 0.0, 0.3, 0.0, 0.2, 0.2], dtype=torch.float64)
    b = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25], dtype=torch.float64)
    rows, columns = a.nonzero().squeeze(-1), b.nonzero().squeeze(-1)
    found = sinkhorn_points(x, y, a, b, epsilon=0.1, block_size=2)
    small = sinkhorn_points(x[rows], y[columns], a[rows], b[columns], epsilon=0.1)
    assert torch.equal(found.f.isneginf(), a == 0)
    torch.testing.assert_close(found.g[columns], small.g, rtol=0, atol=1e-9)
    for part in (found.dual_value, found.f[rows].square().sum()):
        slope = torch.autograd.grad(part, (x, y), retain_graph=True)
        assert not slope[0][a == 0].any()
        assert not slope[1][b == 0].any()
        assert all(bool(torch.isfinite(entry).all()) for entry in slope)
    nothing = sinkhorn_points(x, y, 0 * a, 0 * b, epsilon=0.1)
    assert nothing.dual_value == 0


def test_batches() -> None:
    x, y, epsilon = random_cost(2, 5, 2).requires_grad_(), random_cost(4, 2, seed=1).requires_grad_(), torch.tensor([0.1, 0.5]).double()
    found = sinkhorn_points(x, y, epsilon=epsilon, block_size=2)
    parts = [sinkhorn_points(x[i], y, epsilon=float(epsilon[i])) for i in range(2)]
    torch.testing.assert_close(found.g, torch.stack([part.g for part in parts]), rtol=0, atol=1e-9)
    slopes = torch.autograd.grad(found.dual_value.sum(), (x, y))
    exact = torch.autograd.grad(sum(part.dual_value for part in parts), (x, y))
    for slope, true in zip(slopes, exact, strict=True):
        torch.testing.assert_close(slope, true, rtol=0, atol=1e-9)
    mapped = vmap(lambda x, e: sinkhorn_points(x, y, epsilon=e).g)(x, epsilon)
    torch.testing.assert_close(mapped, found.g, rtol=0, atol=1e-9)


def test_the_divergence_in_blocks() -> None:
    x, y, logits = random_cost(2, 9, 2).requires_grad_(), random_cost(7, 2, seed=1).requires_grad_(), random_cost(9).requires_grad_()
    a = logits.softmax(-1)
    exact = sinkhorn_divergence(x, y, a, epsilon=0.05, tol=1e-12)
    wanted = torch.autograd.grad(exact.value.square().sum(), (x, y, logits), retain_graph=True)
    for block in (4, "auto"):
        found = sinkhorn_divergence(x, y, a, epsilon=0.05, tol=1e-12, block_size=block)
        torch.testing.assert_close(found.value, exact.value, rtol=0, atol=1e-10)
        slopes = torch.autograd.grad(found.value.square().sum(), (x, y, logits), retain_graph=True)
        for slope, true in zip(slopes, wanted, strict=True):
            torch.testing.assert_close(slope, true, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="do not go together"):
        sinkhorn_divergence(x, y, epsilon=0.1, block_size=4, marginal_penalty=1.0)


def test_the_entropic_map_is_the_barycentric_projection_and_tends_to_the_optimal_map() -> None:
    x = random_cost(200, 2) - 0.5
    A = torch.tensor([[1.5, 0.3], [0.3, 0.7]], dtype=torch.float64)
    y = x @ A
    dense = sinkhorn(_cost(x, y), epsilon=0.01)
    barycentre = dense.plan @ y / dense.plan.sum(-1, keepdim=True)
    mapped = entropic_map(x, y, dense.g, epsilon=0.01, block_size=7)
    torch.testing.assert_close(mapped, barycentre, rtol=0, atol=1e-9)
    found = sinkhorn_points(x, y, epsilon=1e-3)
    inside = 0.6 * (random_cost(50, 2, seed=5) - 0.5)
    assert float((entropic_map(inside, y, found.g, epsilon=1e-3) - inside @ A).norm(dim=-1).mean()) < 0.05
    # A point without mass attracts nothing, whether g or b says so.
    b = torch.ones(200, dtype=torch.float64)
    b[0] = 0
    far = torch.cat([torch.zeros(1, 2, dtype=torch.float64), y[1:]])
    lost = torch.cat([torch.full((1,), -math.inf, dtype=torch.float64), found.g[1:]])
    left = entropic_map(inside, far, found.g, b, epsilon=1e-3)
    torch.testing.assert_close(left, entropic_map(inside, far, lost, epsilon=1e-3))
    torch.testing.assert_close(left, entropic_map(inside, y[1:], found.g[1:], epsilon=1e-3))


def test_failures() -> None:
    x, y = random_cost(2, 4, 2), random_cost(3, 2, seed=1)
    a, b = torch.full((4,), 0.25, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    with pytest.raises(InfeasibleError, match="same total mass"):
        sinkhorn_points(x, y, a, 2 * b, epsilon=0.1)
    with pytest.raises(NotConvergedError):
        sinkhorn_points(x, y, epsilon=1e-5, max_iter=3, block_size=2)
    spoiled = torch.stack([x[0], x[1] * torch.nan]).requires_grad_()
    found = sinkhorn_points(spoiled, y, epsilon=0.1, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR]
    assert found.dual_value.isnan().tolist() == [False, True]
    (slope,) = torch.autograd.grad(found.dual_value.nan_to_num().sum(), spoiled)
    assert slope[0].any()
    assert not slope[1].any()
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="would be lost"):
        sinkhorn_points(x, y, epsilon=0.1, cost=lambda p, q: _cost(p * weight, q * weight))
    for options, message in (
        ({"epsilon": 0.0}, "must be positive"),
        ({"epsilon": 0.1, "cost": "cosine"}, "cost='cosine'"),
        ({"epsilon": 0.1, "block_size": 0}, "block_size"),
        ({"epsilon": 0.1, "max_iter": 0}, "max_iter"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn_points(x, y, **options)
    for wrong in ((x[0, 0], y), (x.long(), y), (x, y.float()), (x, y[:, :1]), (x, y, b), (x, y, [1.0]), (x[:, :0], y)):
        with pytest.raises(ShapeError):
            sinkhorn_points(*wrong, epsilon=0.1)
    with pytest.raises(ShapeError, match="g must have"):
        entropic_map(x, y, a, epsilon=0.1)
