"""Soft sort and soft rank: against the projection on the permutahedron by other means, in their limits, at their edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import jacrev, vmap

from difflayers.convex import solve_qp
from difflayers.errors import ShapeError
from difflayers.sorting import soft_rank, soft_sort

FUNCTIONS = [soft_sort, soft_rank]
REGULARIZATIONS = ["l2", "kl"]
both = pytest.mark.parametrize("function", FUNCTIONS)
each = pytest.mark.parametrize("regularization", REGULARIZATIONS)

values = arrays(np.float64, st.integers(1, 9), elements=st.floats(-4, 4, width=32))
strengths = st.floats(1e-3, 1e3)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_minimax(z: np.ndarray, w: np.ndarray, regularization: str) -> np.ndarray:
    """The projection of z on the permutahedron of w, both descending, in extended precision: z − v, v by the minimax formula."""

    def pooled(part: slice) -> np.longdouble:
        if regularization == "l2":
            return z[part].mean() - w[part].mean()
        return np.logaddexp.reduce(z[part]) - np.logaddexp.reduce(w[part])

    n = len(z)
    level = {(a, b): pooled(slice(a, b + 1)) for a in range(n) for b in range(a, n)}
    return z - np.array([min(max(level[a, b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


def reference(function: Callable[..., Tensor], x: Tensor, strength: float, regularization: str) -> Tensor:
    row, rho = x.numpy().astype(np.longdouble), np.arange(len(x), 0, -1).astype(np.longdouble)
    strength = np.longdouble(strength)
    if function is soft_sort:
        return torch.from_numpy(-by_minimax(rho / strength, np.sort(-row)[::-1], regularization).astype(np.float64))
    order = np.argsort(-row, kind="stable")
    kl = regularization == "kl"
    ranks = by_minimax(row[order] / strength, np.log(rho) if kl else rho, regularization)
    return torch.empty_like(x).index_put_((torch.from_numpy(order),), torch.from_numpy((np.exp(ranks) if kl else ranks).astype(np.float64)))


@both
@each
@pytest.mark.parametrize("strength", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_against_the_minimax_formula(function: Callable[..., Tensor], regularization: str, strength: float, scale: float) -> None:
    for n in (1, 2, 7):
        x = scale * rows(n, seed=n)
        exact = reference(function, x, strength, regularization)
        found = function(x, regularization=regularization, regularization_strength=strength)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("scale", [300.0, 5000.0])
def test_kl_where_exponentials_overflow(function: Callable[..., Tensor], scale: float) -> None:
    for strength in (1e-3, 1.0, 100.0):
        x = scale * rows(8, seed=9)
        exact = reference(function, x, strength, "kl")
        found = function(x, regularization="kl", regularization_strength=strength)
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_kl_of_a_long_row_with_little_strength() -> None:
    x = rows(1024, seed=1).requires_grad_()
    for function in FUNCTIONS:
        y = function(x, regularization="kl", regularization_strength=1e-3)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(y).all()
        assert torch.isfinite(slope).all()
    ranks = soft_rank(x, regularization="kl", regularization_strength=1e-9)
    torch.testing.assert_close(ranks, x.argsort().argsort().double() + 1, rtol=0, atol=1e-9)


def test_l2_against_a_quadratic_program() -> None:
    # All faces of the permutahedron: the sum of a subset is at most that of as many of the largest weights.
    n, strength = 4, 0.8
    subsets = [list(s) for size in range(1, n) for s in itertools.combinations(range(n), size)]
    G = torch.zeros(len(subsets), n, dtype=torch.float64)
    for i, subset in enumerate(subsets):
        G[i, subset] = 1
    eye, ones = torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
    for seed in range(5):
        x = rows(n, seed=seed)
        rho = torch.arange(n, 0, -1, dtype=torch.float64)
        h = torch.stack([rho[: len(subset)].sum() for subset in subsets])
        ranks = solve_qp(eye, -x / strength, G, h, ones, rho.sum(0, keepdim=True)).x
        torch.testing.assert_close(soft_rank(x, regularization_strength=strength), ranks, rtol=0, atol=1e-9)
        largest = (-x).sort(descending=True).values.cumsum(0)
        h = torch.stack([largest[len(subset) - 1] for subset in subsets])
        values = -solve_qp(eye, -rho / strength, G, h, ones, -x.sum(0, keepdim=True)).x
        torch.testing.assert_close(soft_sort(x, regularization_strength=strength), values, rtol=0, atol=1e-9)


@both
@each
def test_descending(function: Callable[..., Tensor], regularization: str) -> None:
    x = rows(3, 6)
    exact = -soft_sort(-x, regularization=regularization) if function is soft_sort else soft_rank(-x, regularization=regularization)
    torch.testing.assert_close(function(x, regularization=regularization, descending=True), exact, rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(values, strengths, st.sampled_from(REGULARIZATIONS))
def test_properties(row: np.ndarray, strength: float, regularization: str) -> None:
    x, n = torch.from_numpy(row), len(row)
    options = {"regularization": regularization, "regularization_strength": strength}
    ordered, ranks = soft_sort(x, **options), soft_rank(x, **options)
    near = 1e-10 * max(1, 1 / strength)
    assert (ordered.diff() >= -near).all()
    assert (ranks >= 1 - 1e-10).all()
    assert (ranks <= n + 1e-10).all()
    assert abs(float(ranks.sum()) - n * (n + 1) / 2) <= 1e-9
    assert (ranks[x.argsort()].diff() >= -1e-10).all()
    if regularization == "l2":
        assert abs(float(ordered.sum() - x.sum())) <= n * near
    shuffle = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_sort(x[shuffle], **options), ordered, rtol=0, atol=1e-10)
    torch.testing.assert_close(soft_rank(x[shuffle], **options), ranks[shuffle], rtol=0, atol=1e-10)
    torch.testing.assert_close(soft_rank(x + 2, **options), ranks, rtol=0, atol=1e-8 * max(1, 1 / strength))


@each
def test_little_strength_sorts_and_much_averages(regularization: str) -> None:
    x = torch.tensor([[0.3, -1.2, 2.0, 0.9], [5.0, 4.0, 3.0, -7.0]], dtype=torch.float64)
    little = {"regularization": regularization, "regularization_strength": 1e-3}
    assert torch.equal(soft_sort(x, **little), x.sort().values)
    torch.testing.assert_close(soft_rank(x, **little), x.argsort().argsort().double() + 1, rtol=0, atol=1e-12)
    much = {"regularization": regularization, "regularization_strength": 1e9}
    torch.testing.assert_close(soft_rank(x, **much), torch.full_like(x, 2.5), rtol=0, atol=1e-7)
    if regularization == "l2":
        assert torch.equal(soft_rank(x, **little), x.argsort().argsort().double() + 1)
        torch.testing.assert_close(soft_sort(x, **much), x.mean(-1, keepdim=True).expand_as(x), rtol=0, atol=1e-7)


def test_equal_entries_share_their_rank() -> None:
    x = torch.tensor([1.0, 1.0, 3.0, 1.0])
    assert soft_rank(x, regularization_strength=1e-6).tolist() == [2.0, 2.0, 4.0, 2.0]
    assert soft_sort(x, regularization_strength=1e-6).tolist() == [1.0, 1.0, 1.0, 3.0]


@each
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(regularization: str, dim: int) -> None:
    x = rows(4, 5, 3)
    for function in FUNCTIONS:
        found = function(x, regularization=regularization, dim=dim)
        moved = function(x.movedim(dim, -1), regularization=regularization).movedim(-1, dim)
        assert found.shape == x.shape
        assert torch.equal(found, moved)


@both
@each
def test_shapes_without_entries(function: Callable[..., Tensor], regularization: str) -> None:
    for shape in ((0,), (3, 0), (0, 4), (2, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        y = function(x, regularization=regularization)
        assert y.shape == shape
        y.sum().backward()
    torch.testing.assert_close(
        function(torch.tensor([7.0]), regularization=regularization), torch.tensor([7.0 if function is soft_sort else 1.0])
    )


@both
@each
def test_low_precision_is_as_good_as_its_dtype(function: Callable[..., Tensor], regularization: str) -> None:
    x = rows(2, 1000, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        found = function(low, regularization=regularization, regularization_strength=0.1)
        assert found.dtype == dtype
        assert torch.equal(found, function(low.double(), regularization=regularization, regularization_strength=0.1).to(dtype))


@both
@each
def test_a_row_with_nan_is_nan_and_its_neighbours_do_not_notice(function: Callable[..., Tensor], regularization: str) -> None:
    x = rows(3, 5)
    exact = function(x, regularization=regularization)
    x[1, 2] = torch.nan
    found = function(x, regularization=regularization)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], exact[[0, 2]])


@each
def test_infinite_entries(regularization: str) -> None:
    x = rows(2, 4)
    inf = torch.full((2, 2), torch.inf, dtype=torch.float64)
    options = {"regularization": regularization, "regularization_strength": 0.5}
    padded = torch.cat([x, inf], -1).requires_grad_()
    ranks = soft_rank(padded, **options)
    torch.testing.assert_close(ranks[:, :4], soft_rank(x, **options))
    torch.testing.assert_close(ranks[:, 4:], torch.full_like(inf, 5.5))
    slope = jacrev(lambda p: soft_rank(p, **options)[:, :4].square().sum())(padded.detach())
    torch.testing.assert_close(slope[:, :4], jacrev(lambda p: soft_rank(p, **options).square().sum())(x))
    assert not slope[:, 4:].any()
    surrounded = soft_rank(torch.cat([-inf, x, inf], -1), **options)
    torch.testing.assert_close(surrounded[:, [0, 1, 6, 7]], torch.tensor([[1.5, 1.5, 7.5, 7.5]], dtype=torch.float64).expand(2, 4))
    if regularization == "l2":
        torch.testing.assert_close(surrounded[:, 2:6], soft_rank(x, **options) + 2)
    assert soft_rank(torch.tensor([torch.inf, -torch.inf]), **options).tolist() == [2.0, 1.0]
    assert soft_sort(padded, **options).isnan().all()


@both
@each
def test_the_strength_is_differentiated(function: Callable[..., Tensor], regularization: str) -> None:
    x, strength = rows(3, 5).requires_grad_(), torch.tensor([0.3, 1.1, 2.7], dtype=torch.float64, requires_grad=True)
    call = lambda x, s: function(x, regularization=regularization, regularization_strength=s)  # noqa: E731
    assert gradcheck(call, (x, strength), check_forward_ad=True)
    for i in range(3):
        torch.testing.assert_close(call(x, strength)[i], call(x[i], strength[i].item()))
    torch.testing.assert_close(vmap(call)(x, strength), call(x, strength))
    spoiled = call(x, torch.tensor([0.3, -1.0, torch.nan], dtype=torch.float64))
    assert spoiled[1:].isnan().all()
    assert torch.isfinite(spoiled[0]).all()


@both
def test_what_is_refused(function: Callable[..., Tensor]) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="int64"):
        function(torch.arange(3))
    with pytest.raises(ShapeError, match="shape"):
        function(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="dim 2"):
        function(x, dim=2)
    with pytest.raises(ValueError, match="entropic"):
        function(x, regularization="entropic")
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            function(x, regularization_strength=strength)
    with pytest.raises(ShapeError, match="regularization_strength"):
        function(x, regularization_strength=torch.ones(3))
