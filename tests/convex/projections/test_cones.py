"""The four curved cones: by Moreau's theorem, by gradients off the kinks, finite on them, at any magnitude."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

from difflayers.convex.projections import (
    projection_exponential_cone,
    projection_power_cone,
    projection_psd_cone,
    projection_second_order_cone,
)
from difflayers.errors import ShapeError
from tests.convex.projections.checks import rows, wide_rows

Projection = Callable[[Tensor], Tensor]

ROWS: dict[str, Projection] = {
    "second order": projection_second_order_cone,
    "exponential": projection_exponential_cone,
    "power 0.5": projection_power_cone,
    "power 0.3": lambda x: projection_power_cone(x, 0.3),
    "power 0.9": lambda x: projection_power_cone(x, 0.9),
    "psd": lambda x: _matrix_to_row(projection_psd_cone(_row_to_matrix(x))),
}
E = float(torch.e)
KINKS = [
    *([0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]),
    *([-1.0, 0.0, 1.0], [0.0, -1.0, 1.0], [5.0, -1.0, 0.0], [-1.0, 5.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]),
    *([1.0, 1.0, E], [0.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, 0.0], [1.0, 1.0, -E]),
    *([1e-8, 1e8, -1.0], [1e8, -1e-8, 1e-8], [-1e8, 1e-8, -1e8], [1e-300, -1.0, -1.0], [-1e-100, 1e-100, 1e-100], [1.0, 1e-300, 0.5]),
]


def _row_to_matrix(x: Tensor) -> Tensor:
    """The symmetric 2 × 2 matrix of a row, with the same norm."""
    off = x[..., 2] / 2**0.5
    return torch.stack([torch.stack([x[..., 0], off], -1), torch.stack([off, x[..., 1]], -1)], -2)


def _matrix_to_row(X: Tensor) -> Tensor:
    return torch.stack([X[..., 0, 0], X[..., 1, 1], X[..., 0, 1] * 2**0.5], -1)


def _violation(name: str, point: Tensor) -> Tensor:
    """How far a point is from satisfying the cone's inequality."""
    x, y, z = point.unbind(-1)
    if name == "second order":
        return torch.hypot(y, z) - x
    if name == "exponential":
        steep = torch.where(y > 0, y * torch.exp(x / torch.where(y > 0, y, 1)) - z, torch.maximum(x, -z))
        return torch.maximum(steep, -y)
    if name == "psd":
        return -torch.linalg.eigvalsh(_row_to_matrix(point))[..., 0]
    alpha = float(name.split()[1])
    return torch.maximum(z.abs() - x.clamp(min=0) ** alpha * y.clamp(min=0) ** (1 - alpha), -torch.minimum(x, y))


@functools.cache
def _members(name: str) -> Tensor:
    """Unit vectors of the cone, its edges and boundary among them."""
    points = wide_rows(400, 3, seed=99)
    members = ROWS[name](points)
    members = members[members.abs().amax(-1) > 0.1 * points.abs().amax(-1)]
    return members / torch.linalg.vector_norm(members, dim=-1, keepdim=True)


def _check_moreau(name: str, v: Tensor) -> None:
    """p in K, v − p orthogonal to p and in the polar cone: then and only then p is the projection of v."""
    p = ROWS[name](v)
    scale = v.abs().amax(-1).clamp(min=1e-300)
    assert (_violation(name, p) / scale).max() <= 2e-13
    assert (((p / scale[:, None]) * ((v - p) / scale[:, None])).sum(-1).abs()).max() <= 2e-15
    members = _members(name)
    assert (((v - p) / scale[:, None]) @ members.mT).max() <= 2e-15
    assert ((ROWS[name](p) - p).abs().amax(-1) / scale).max() <= 1e-15


@pytest.mark.parametrize("name", ROWS)
def test_moreau(name: str) -> None:
    _check_moreau(name, rows(3000, 3, seed=0))
    _check_moreau(name, wide_rows(3000, 3, seed=1))
    _check_moreau(name, torch.tensor(KINKS, dtype=torch.float64))


sizes = st.floats(1e-10, 1e8) | st.floats(0.1, 2.0) | st.just(1.0)
entries = st.just(0.0) | sizes | sizes.map(lambda x: -x)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=20)
@given(v=st.lists(st.tuples(entries, entries, entries), min_size=12, max_size=12))
def test_moreau_and_nonexpansive(name: str, v: list[tuple[float, ...]]) -> None:
    x = torch.tensor(v, dtype=torch.float64)
    _check_moreau(name, x)
    p = ROWS[name](x)
    gaps, scale = torch.cdist(x, x), torch.maximum(x.abs().amax(-1), x.abs().amax(-1, keepdim=True))
    assert (torch.cdist(p, p) <= gaps + 1e-7 * scale).all()


@pytest.mark.parametrize("name", ROWS)
def test_homogeneous(name: str) -> None:
    v = rows(200, 3, seed=2)
    for scale in (1e-8, 1e8):
        error = (ROWS[name](scale * v) / scale - ROWS[name](v)).abs().max()
        assert error <= 5e-15


@pytest.mark.parametrize("name", ROWS)
def test_gradients(name: str) -> None:
    v = rows(8, 3, seed=3).requires_grad_()
    assert gradcheck(ROWS[name], v, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(ROWS[name], v, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ROWS)
def test_derivatives_at_kinks_are_finite_and_one(name: str) -> None:
    v = torch.tensor(KINKS, dtype=torch.float64)
    v.requires_grad_()
    reverse, forward = vmap(jacrev(ROWS[name]))(v), vmap(jacfwd(ROWS[name]))(v)
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-12)
    assert torch.isfinite(vmap(hessian(lambda x: ROWS[name](x).sum()))(v)).all()
    # An element of the generalized Jacobian of a projection: symmetric, with eigenvalues in [0, 1].
    assert (reverse - reverse.mT).abs().max() <= 1e-9
    values = torch.linalg.eigvalsh(reverse)
    assert values.min() >= -1e-9
    assert values.max() <= 1 + 1e-9


@pytest.mark.parametrize("name", ROWS)
def test_derivatives_at_any_magnitude(name: str) -> None:
    v = wide_rows(2000, 3, seed=4)
    jacobian = vmap(jacrev(ROWS[name]))(v)
    assert torch.isfinite(jacobian).all()
    # Π is homogeneous: its Jacobian reproduces it.
    p = ROWS[name](v)
    scale = v.abs().amax(-1)
    assert ((((jacobian @ v.unsqueeze(-1)).squeeze(-1) - p).abs().amax(-1)) / scale).max() <= 1e-9
    values = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    assert values.min() >= -1e-9
    assert values.max() <= 1 + 1e-9


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_stays_alone(name: str) -> None:
    v = rows(4, 3, seed=5)
    good = ROWS[name](v)
    v[1, 2], v[2, 0] = torch.nan, torch.nan
    v.requires_grad_()
    p = ROWS[name](v)
    assert p[1:3].isnan().any(-1).all()
    assert torch.equal(p[[0, 3]], good[[0, 3]])
    (slope,) = torch.autograd.grad(p[[0, 3]].sum(), v)
    assert torch.isfinite(slope[[0, 3]]).all()
    assert not slope[1:3].nan_to_num(nan=0.0).any()


@pytest.mark.parametrize("name", ROWS)
def test_float32_and_empty(name: str) -> None:
    v = rows(50, 3, seed=6)
    half = ROWS[name](v.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), ROWS[name](v), rtol=0, atol=2e-6)
    assert ROWS[name](v[:0]).shape == (0, 3)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_second_order_cone_of_any_size(n: int) -> None:
    v = rows(20, n, seed=7)
    p = projection_second_order_cone(v)
    assert (torch.linalg.vector_norm(p[:, 1:], dim=-1) <= p[:, 0] + 1e-14).all()
    assert ((p * (v - p)).sum(-1).abs() <= 1e-14).all()


def test_psd_matches_the_clamped_eigenvalues() -> None:
    X = rows(7, 5, 5, seed=8)
    symmetric = (X + X.mT) / 2
    values, Q = torch.linalg.eigh(symmetric)
    torch.testing.assert_close(projection_psd_cone(X), Q @ torch.diag_embed(values.clamp(min=0)) @ Q.mT, rtol=0, atol=1e-14)


@pytest.mark.parametrize("eigenvalues", [(2.0, 2.0, 2.0, -1.0, -1.0), (1.0, 1.0, -1.0, -1.0, -1.0), (3.0, 2.0, 1.0, -1.0, -2.0)])
def test_psd_with_repeated_eigenvalues(eigenvalues: tuple[float, ...]) -> None:
    Q = torch.linalg.qr(rows(5, 5, seed=9)).Q
    X = ((Q * torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.mT).requires_grad_()
    assert gradcheck(projection_psd_cone, X, check_forward_ad=True)
    assert gradgradcheck(projection_psd_cone, X, check_fwd_over_rev=True)


def test_psd_first_derivative_is_the_loewner_formula() -> None:
    Q = torch.linalg.qr(rows(4, 4, seed=10)).Q
    values = torch.tensor([2.0, 0.5, 0.5, -1.0], dtype=torch.float64)
    H = rows(4, 4, seed=11)
    H = H + H.mT
    plus, gap = values.clamp(min=0), values[:, None] - values
    omega = torch.where(gap == 0, (values > 0).double()[:, None], (plus[:, None] - plus) / torch.where(gap == 0, 1, gap))
    exact = Q @ (omega * (Q.mT @ H @ Q)) @ Q.mT
    pushed = torch.func.jvp(projection_psd_cone, ((Q * values) @ Q.mT,), (H,))[1]
    torch.testing.assert_close(pushed, exact, rtol=0, atol=1e-13)


def test_power_cone_in_its_exponent() -> None:
    v = torch.tensor([[1.0, -0.5, 2.0], [-1.0, 0.5, 2.0], [0.2, 0.3, -1.0], [-0.1, -0.2, 1.0], [1.0, 2.0, 0.1]], dtype=torch.float64)
    v.requires_grad_()
    shared = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    for alpha in (shared, own):
        assert gradcheck(projection_power_cone, (v, alpha), check_forward_ad=True)
        assert gradgradcheck(projection_power_cone, (v, alpha), check_fwd_over_rev=True, fast_mode=True)
    assert projection_power_cone(v[0], own).shape == (5, 3)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="3"):
        projection_exponential_cone(torch.zeros(4))
    with pytest.raises(ShapeError, match="n, n"):
        projection_psd_cone(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="floating"):
        projection_second_order_cone(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="at least 1"):
        projection_second_order_cone(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        projection_power_cone(torch.zeros(3), 1.0)
    with pytest.raises(ShapeError, match="alpha"):
        projection_power_cone(torch.zeros(2, 3), torch.full((3,), 0.5))
