"""Experts: each the solution of its own constraint, all in one batch, put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from difflayers.errors import NotConvergedError, ShapeError, SingularError
from difflayers.pde import HardConstraint, MixtureOfConstraints, dirichlet, finite_difference, initial, pde
from difflayers.solution import Status

GRID = (9, 11)  # times, points


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(basis: Tensor, *args: Any) -> dict[str, Tensor]:
    return {
        "u": basis,
        "u_t": finite_difference(basis, 0.2, dim=-3),
        "u_x": finite_difference(basis, 0.3, dim=-2),
    }


def residual(z: dict[str, Tensor], u0: Tensor, speed: Tensor) -> Tensor:
    return z["u_t"] + speed * z["u"] * z["u_x"] + 0.1 * z["u"]


ROWS = (initial(lambda u0, speed: u0, weight=2.0), dirichlet(0.3, dim=1))


def inputs(*batch: int, grid: tuple[int, int] = GRID, basis: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Basis functions, initial values and a speed at every point."""
    return randn(0, *batch, *grid, basis), randn(1, *batch, grid[1]), 0.3 + 0.1 * randn(2, *batch, *grid)


def constraint(*rows: Any, **options: Any) -> HardConstraint:
    return HardConstraint(residual, features=features, rows=(*ROWS, *rows), grid_ndim=2, **({"ridge": 0.1, "tol": 1e-12} | options))


def one_expert(where: Tensor | tuple[slice, slice], **options: Any) -> HardConstraint:
    """The constraint of one expert: the equation in its block, or where a mask is one."""
    kind: dict[str, Any] = {"region": where} if isinstance(where, tuple) else {"weight": where}
    return HardConstraint(None, rows=(pde(residual, features, **kind), *ROWS), grid_ndim=2, **({"ridge": 0.1, "tol": 1e-12} | options))


def gradients(layer: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(layer(*leaves).sin().sum(), leaves))


def close(values: Any, exact: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(values, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [((4, 5), (3, 3, 5)), ((9,), (3, 3, 3, 2))])
def test_experts_in_a_batch_are_separate_solves(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    data = inputs(2)
    # As numbers of blocks where these are the default sizes, as sizes else.
    mixture = MixtureOfConstraints(constraint(), sizes if sizes[0] != (9,) else (1, 4))

    def separately(*data: Tensor) -> Tensor:
        rows, start = [], 0
        for height in sizes[0]:
            row, left = [], 0
            for width in sizes[1]:
                block = slice(start, start + height), slice(left, left + width)
                row.append(one_expert(block)(*data)[:, block[0], block[1]])
                left += width
            rows.append(torch.cat(row, -1))
            start += height
        return torch.cat(rows, -2)

    close(mixture(*data), separately(*data))
    close(gradients(mixture, *data), gradients(separately, *data))


def test_a_hundred_and_one_points_over_four_experts() -> None:
    data = inputs(1, grid=(101, 4))
    mixture = MixtureOfConstraints(constraint(), (4, 1))
    found = mixture.solve(*data)
    assert found.u.shape == (1, 101, 4)
    assert found.weights.shape == (1, 4, 3)
    assert found.status.shape == found.residual_norm.shape == found.gradient_norm.shape == found.iterations.shape == (1, 4)
    alone = one_expert((slice(26, 51), slice(None))).solve(*data)
    close(found.weights[:, 1], alone.weights)
    close(found.u[:, 26:51], alone.u[:, 26:51])
    close(found.residual_norm[:, 1], alone.residual_norm)


def disk() -> Tensor:
    t, x = torch.meshgrid(torch.linspace(-1, 1, GRID[0]), torch.linspace(-1, 1, GRID[1]), indexing="ij")
    return ((t**2 + x**2) < 0.5).long()


def test_labels_of_any_shape() -> None:
    data, labels = inputs(2), disk()
    mixture = MixtureOfConstraints(constraint(), labels)

    def separately(*data: Tensor) -> Tensor:
        u = [one_expert((labels == e).double())(*data) for e in range(2)]
        return torch.where(labels == 1, u[1], u[0])

    close(mixture(*data), separately(*data))
    close(gradients(mixture, *data), gradients(separately, *data))
    assert "labels" in mixture.state_dict()


def test_labels_of_each_sample_and_a_router_that_returns_them() -> None:
    data = inputs(2)
    labels = torch.stack([disk(), torch.arange(GRID[1]).expand(GRID) // 4])
    batched = MixtureOfConstraints(constraint(), labels, overlap=1, interface_weight=0.5)
    loop = [
        MixtureOfConstraints(constraint(), part, overlap=1, interface_weight=0.5).solve(*(tensor[i] for tensor in data))
        for i, part in enumerate(labels)
    ]
    found = batched.solve(*data)
    close(found.u, torch.stack([part.u for part in loop]))
    assert found.weights.shape == (2, 3, 3)  # the disk has no third expert: it repeats the fullest
    routed = MixtureOfConstraints(constraint(), lambda basis, *args: labels, overlap=1, interface_weight=0.5)
    close(routed(*data), found.u)
    close(gradients(routed, *data), gradients(batched, *data))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, basis: Tensor, *args: Any) -> Tensor:
        return self.linear(basis)


def test_a_soft_router_is_trained_by_the_gradient() -> None:
    data, router = inputs(2), Router()
    mixture = MixtureOfConstraints(constraint(), router)
    assert len(list(mixture.parameters())) == 2
    assert mixture.solve(*data).weights.shape == (2, 2, 3)

    def call(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(mixture, {"router.linear.weight": weight, "router.linear.bias": bias}, data)

    assert gradcheck(call, tuple(router.linear.parameters()), fast_mode=True)


def test_a_soft_router_that_is_sure_is_a_hard_one() -> None:
    data, labels = inputs(2), disk()
    logits = 60.0 * torch.nn.functional.one_hot(labels, 2)
    soft = MixtureOfConstraints(constraint(), lambda basis, *args: logits)
    close(soft(*data), MixtureOfConstraints(constraint(), labels)(*data), 1e-9)


def test_interface_rows_lower_the_jumps() -> None:
    data = inputs(2)

    def jumps(weight: float) -> float:
        weights = MixtureOfConstraints(constraint(), ((5, 4), 1), interface_weight=weight).solve(*data).weights
        beside = data[0][:, 4:6].flatten(1, 2)  # the points on both sides of the border
        return float((beside @ (weights[:, 0] - weights[:, 1]).unsqueeze(-1)).square().mean().sqrt())

    heights = [jumps(weight) for weight in (0.0, 1.0, 10.0, 1000.0)]
    assert heights == sorted(heights, reverse=True)
    assert heights[3] < 0.05 * heights[0]
    # What couples the experts at 2 × 11 points makes three unknowns of each the same in the end.
    stiff = MixtureOfConstraints(constraint(), ((5, 4), 1), interface_weight=1e5).solve(*data)
    close(stiff.weights[:, 0], stiff.weights[:, 1], 1e-6)
    assert stiff.status.shape == (2,)


def test_coupled_experts_are_one_least_squares_problem() -> None:
    """Linear rows: the minimizer is that of the stacked system, whatever the blocks."""
    basis, weight = randn(3, 12, 2), 0.7
    layer = HardConstraint(lambda z, f: z["u"] - f, features=lambda b, *args: {"u": b}, rows=[dirichlet(0.5, dim=0)])
    found = MixtureOfConstraints(layer, ((5, 4, 3),), interface_weight=weight).solve(basis, randn(4, 12))
    rows, target = torch.zeros(12 + 3 + 4, 6, dtype=torch.float64), torch.zeros(12 + 3 + 4, dtype=torch.float64)
    for e, block in enumerate([slice(0, 5), slice(5, 9), slice(9, 12)]):
        rows[block, 2 * e : 2 * e + 2] = basis[block]
        rows[12 + e, 2 * e : 2 * e + 2] = basis[0]
    target[:12], target[12:15] = randn(4, 12), 0.5
    for k, (point, first) in enumerate([(4, 0), (5, 0), (8, 1), (9, 1)]):
        rows[15 + k, 2 * first : 2 * first + 2] = weight * basis[point]
        rows[15 + k, 2 * first + 2 : 2 * first + 4] = -weight * basis[point]
    exact = torch.linalg.lstsq(rows, target.unsqueeze(-1)).solution.reshape(3, 2)
    close(found.weights, exact)
    close(found.residual_norm, (rows @ exact.flatten() - target).norm())


def test_overlapping_domains_are_blended() -> None:
    data = inputs(2)
    found = MixtureOfConstraints(constraint(), (1, 2), overlap=1).solve(*data)
    # Six and five columns of points: the seventh one is in both domains, and so is the sixth.
    close(found.weights[:, 0], one_expert((slice(None), slice(0, 7))).solve(*data).weights)
    close(found.weights[:, 1], one_expert((slice(None), slice(5, 11))).solve(*data).weights)
    values = (data[0].unsqueeze(1) * found.weights[:, :, None, None]).sum(-1)
    close(found.u[..., :5], values[:, 0, :, :5])
    close(found.u[..., 5], (2 * values[:, 0, :, 5] + values[:, 1, :, 5]) / 3)
    close(found.u[..., 6], (values[:, 0, :, 6] + 2 * values[:, 1, :, 6]) / 3)


def test_a_singular_expert_leaves_its_neighbours_exact() -> None:
    basis = randn(5, 3, 12, 3)
    source = randn(6, 3, 12)
    layer = HardConstraint(lambda z, f: z["u"] + 0.1 * z["u"] ** 2 - f, features=lambda b, *args: {"u": b}, on_failure="nan")
    bad = basis.clone()
    bad[1, 4:8] = bad[1, 4:5]  # the second expert of the second sample sees one and the same row four times
    mixture = MixtureOfConstraints(layer, (3,))
    found, good = mixture.solve(bad, source), mixture.solve(basis, source)
    assert found.status.tolist() == [[0, 0, 0], [0, int(Status.SINGULAR), 0], [0, 0, 0]]
    assert found.u[1, 4:8].isnan().all()
    assert found.weights[1, 1].isnan().all()
    spared = torch.ones(3, 12, dtype=torch.bool)
    spared[1, 4:8] = False
    close(found.u[spared], good.u[spared])
    slopes, exact = (gradients(lambda *data: mixture(*data)[spared], part, source) for part in (bad, basis))
    for slope, right in zip(slopes, exact, strict=True):
        close(slope[spared], right[spared])
        assert not slope[~spared].any()
    with pytest.raises(SingularError) as caught:
        MixtureOfConstraints(HardConstraint(layer.residual_fn, features=layer.features), (3,))(bad, source)
    assert caught.value.indices == [(1, 1)]
    assert "MixtureOfConstraints" in str(caught.value)


def test_points_are_shared_out() -> None:
    data = inputs(2)
    every = constraint(points=99)
    close(MixtureOfConstraints(every, (3, 1))(*data), MixtureOfConstraints(constraint(), (3, 1))(*data))
    some = MixtureOfConstraints(constraint(points=60), (3, 1))
    first, again, other = (some(*data, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    counted = []

    def counting(z: dict[str, Tensor], *args: Tensor) -> Tensor:
        counted.append(tuple(z["u"].shape))
        return residual(z, *args)

    sampled = HardConstraint(counting, features=features, rows=ROWS, grid_ndim=2, ridge=0.1, points=60)
    MixtureOfConstraints(sampled, (3, 1))(*data)
    assert set(counted) == {(2, 3, 20)}
    soft = MixtureOfConstraints(constraint(points=60), lambda basis, *args: basis[..., :2])
    assert soft(*data).shape == (2, *GRID)


def test_rows_of_a_region_and_their_weights_are_cut_too() -> None:
    data, weights = inputs(2), 1 + randn(7, *GRID).abs()
    inside = pde(lambda z, u0, speed: z["u_x"] - speed, region=(slice(2, None), slice(1, -1)), weight=weights)
    mixture = MixtureOfConstraints(constraint(inside), (1, (4, 7)))
    mask = torch.zeros(GRID, dtype=torch.float64)
    mask[2:, 1:4] = weights[2:, 1:4]
    alone = HardConstraint(
        None,
        rows=(pde(residual, features, region=(slice(None), slice(0, 4))), pde(inside.residual_fn, features, weight=mask), *ROWS),
        grid_ndim=2,
        ridge=0.1,
        tol=1e-12,
    )
    close(mixture.solve(*data).weights[:, 0], alone.solve(*data).weights)


def test_an_argument_for_each_sample_gets_a_dimension_for_the_experts() -> None:
    basis, rate = randn(8, 2, 8, 2), torch.tensor([0.5, 2.0], dtype=torch.float64)
    layer = HardConstraint(lambda z, rate: z["u"] + rate[..., None] * z["u"] ** 3 - 1, features=lambda b, *args: {"u": b})
    mixture = MixtureOfConstraints(layer, (2,))
    close(mixture(basis, rate), torch.stack([mixture(basis[i], rate[i]) for i in range(2)]))


def test_float32_comes_back_and_other_meshes_are_cut_anew() -> None:
    data = inputs(2)
    mixture = MixtureOfConstraints(constraint(tol=1e-8), (2, 2))
    u = mixture(*(tensor.float() for tensor in data))
    assert u.dtype == torch.float32
    close(u.double(), mixture(*data), 1e-4)
    assert mixture(*inputs(1, grid=(7, 6))).shape == (1, 7, 6)
    assert mixture(*data).shape == (2, *GRID)


def test_the_cut_of_a_call_without_gradients_serves_one_with() -> None:
    data = inputs(2)
    mixture = MixtureOfConstraints(constraint(), (2, 2), interface_weight=1.0)
    with torch.inference_mode():
        mixture(*data)
    torch.func.vmap(mixture)(*data)
    close(gradients(mixture, *data), gradients(MixtureOfConstraints(constraint(), (2, 2), interface_weight=1.0), *data))


def test_new_labels_are_seen() -> None:
    data = inputs(2)
    mixture = MixtureOfConstraints(constraint(), disk())
    before = mixture(*data)
    mixture.load_state_dict({"labels": 1 - disk()})
    close(mixture(*data), before)
    mixture.load_state_dict({"labels": torch.arange(GRID[1]).expand(GRID) // 6})
    close(mixture(*data), MixtureOfConstraints(constraint(), (1, 2))(*data))


def test_what_cannot_be_cut_is_refused() -> None:
    data = inputs(2)
    with pytest.raises(ValueError, match="features="):
        MixtureOfConstraints(HardConstraint(lambda u: u), (2,))
    with pytest.raises(ValueError, match="not be negative"):
        MixtureOfConstraints(constraint(), (1, 2), overlap=-1)
    with pytest.raises(ShapeError, match="2 dimensions"):
        MixtureOfConstraints(constraint(), (2,))(*data)
    with pytest.raises(ShapeError, match="with the grid"):
        MixtureOfConstraints(constraint(), disk()[1:])(*data)
    with pytest.raises(ShapeError, match="a router returns"):
        MixtureOfConstraints(constraint(), lambda basis, *args: basis[..., 0])(*data)
    with pytest.raises(ShapeError, match="no point has label 1"):
        MixtureOfConstraints(constraint(), 2 * disk())(*data)
    with pytest.raises(ValueError, match="no borders"):
        MixtureOfConstraints(constraint(), Router(), interface_weight=1.0)(*data)
    with pytest.raises(NotConvergedError) as caught:
        MixtureOfConstraints(constraint(), (1, 2))(data[0], data[1], data[2].index_fill(0, torch.tensor([1]), torch.nan))
    assert caught.value.indices == [(1, 0), (1, 1)]
