"""Relaxed permutation matrices: their convention, their sums, their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.sorting import SortingNetwork, soft_argsort

CLOSED = ["softsort", "neuralsort"]
each = pytest.mark.parametrize("method", CLOSED)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neuralsort_is_the_matrix_of_the_paper() -> None:
    x, tau = rows(6), 0.4
    far = (x.unsqueeze(-1) - x).abs()
    paper = torch.stack([torch.softmax(((6 + 1 - 2 * i) * x - far @ torch.ones_like(x)) / tau, 0) for i in range(1, 7)])
    found = soft_argsort(x, method="neuralsort", regularization_strength=tau, descending=True)
    torch.testing.assert_close(found, paper.mT, rtol=0, atol=1e-14)


def test_softsort_is_the_matrix_of_the_paper() -> None:
    x, tau = rows(6), 0.4
    ordered = x.sort(descending=True).values
    paper = torch.softmax(-(ordered.unsqueeze(-1) - x).abs() / tau, -1)
    torch.testing.assert_close(soft_argsort(x, regularization_strength=tau, descending=True), paper.mT, rtol=0, atol=1e-14)


@each
@pytest.mark.parametrize("descending", [False, True])
def test_columns_are_weights_and_show_the_permutation(method: str, descending: bool) -> None:
    x = rows(5, 7, seed=1)
    P = soft_argsort(x, method=method, regularization_strength=0.5, descending=descending)
    torch.testing.assert_close(P.sum(-2), torch.ones_like(x))
    assert (P >= 0).all()
    assert torch.equal(P.argmax(-2), x.argsort(descending=descending))
    # Rows are not promised to sum to one, and here they do not.
    assert ((P.sum(-1) - 1).abs() > 1e-3).any()
    hard = soft_argsort(x, method=method, regularization_strength=1e-6, descending=descending)
    torch.testing.assert_close((x.unsqueeze(-2) @ hard).squeeze(-2), x.sort(descending=descending).values)


@each
def test_descending_is_the_mirror(method: str) -> None:
    x = rows(2, 4)
    torch.testing.assert_close(soft_argsort(x, method=method, descending=True), soft_argsort(-x, method=method))


@each
def test_shapes_strengths_and_precision(method: str) -> None:
    x, strength = rows(3, 4, 2), torch.tensor([[0.5, 1.0]] * 3, dtype=torch.float64)
    found = soft_argsort(x, method=method, regularization_strength=strength, dim=1)
    assert found.shape == (3, 2, 4, 4)
    torch.testing.assert_close(found[1, 0], soft_argsort(x[1, :, 0], method=method, regularization_strength=0.5))
    assert soft_argsort(x.float(), method=method).dtype == torch.float32
    assert soft_argsort(torch.zeros(0, 3), method=method).shape == (0, 3, 3)
    assert soft_argsort(torch.zeros(2, 0), method=method).shape == (2, 0, 0)
    assert soft_argsort(torch.tensor([5.0]), method=method).tolist() == [[1.0]]


@pytest.mark.parametrize("descending", [False, True])
def test_a_network_is_its_permutation(descending: bool) -> None:
    x = rows(2, 3, 5)
    for options in ({}, {"network": "odd_even", "distribution": "logistic"}):
        layer = SortingNetwork(5, steepness=4.0, descending=descending, **options)
        found = soft_argsort(x, method="network", regularization_strength=0.25, descending=descending, **options)
        torch.testing.assert_close(found, layer.sort(x).permutation, rtol=0, atol=0)
        assert torch.equal(soft_argsort(x, method="network", steepness=4.0, descending=descending, **options), found)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(x))
        torch.testing.assert_close(found.sum(-2), torch.ones_like(x))
    assert soft_argsort(x.float().mT, method="network", dim=-2).dtype == torch.float32
    assert soft_argsort(torch.zeros(2, 0), method="network").shape == (2, 0, 0)
    with pytest.raises(ShapeError, match="number"):
        soft_argsort(x, method="network", regularization_strength=torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("descending", [False, True])
def test_a_transport_plan_is_doubly_stochastic_and_sorts_when_cold(descending: bool) -> None:
    x = rows(2, 3, 5)
    P = soft_argsort(x, method="sinkhorn", regularization_strength=0.5, descending=descending)
    torch.testing.assert_close(P.sum(-1), torch.ones_like(x))
    torch.testing.assert_close(P.sum(-2), torch.ones_like(x))
    torch.testing.assert_close(soft_argsort(x + 100, method="sinkhorn", regularization_strength=0.5, descending=descending), P)
    torch.testing.assert_close(soft_argsort(-x, method="sinkhorn", regularization_strength=0.5, descending=not descending), P)
    cold = soft_argsort(x, method="sinkhorn", regularization_strength=1e-3, descending=descending)
    assert torch.equal(cold.argmax(-2), x.argsort(-1, descending=descending))
    assert soft_argsort(x.float().mT, method="sinkhorn", dim=-2).dtype == torch.float32
    assert soft_argsort(torch.zeros(2, 0), method="sinkhorn").shape == (2, 0, 0)
    assert soft_argsort(torch.zeros(0, 3), method="sinkhorn").shape == (0, 3, 3)


def test_a_transport_that_is_cut_short_says_so() -> None:
    with pytest.raises(NotConvergedError):
        soft_argsort(rows(8), method="sinkhorn", regularization_strength=0.3, max_iter=1)
    assert soft_argsort(rows(8), method="sinkhorn", regularization_strength=0.3, max_iter=1, on_failure="nan").isnan().all()


def test_a_transport_beside_a_row_that_is_not_finite() -> None:
    x = rows(3, 4)
    good = soft_argsort(x, method="sinkhorn")
    x[1, 0] = float("inf")
    x.requires_grad_()
    P = soft_argsort(x, method="sinkhorn")
    assert P[1].isnan().all()
    torch.testing.assert_close(P[[0, 2]], good[[0, 2]])
    (gradient,) = torch.autograd.grad(P[[0, 2]].square().sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


@each
def test_what_is_not_finite(method: str) -> None:
    x = rows(3, 4)
    x[1, 0] = torch.nan
    found = soft_argsort(x, method=method)
    assert found[1].isnan().all()
    assert torch.isfinite(found[[0, 2]]).all()
    spoiled = soft_argsort(rows(2, 3), method=method, regularization_strength=torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert torch.isfinite(spoiled[0]).all()
    assert spoiled[1].isnan().all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="bubble"):
        soft_argsort(torch.zeros(3), method="bubble")  # ty: ignore[invalid-argument-type]
    with pytest.raises(TypeError, match="steepness"):
        soft_argsort(torch.zeros(3), steepness=2.0)
    with pytest.raises(ShapeError, match="int64"):
        soft_argsort(torch.arange(3))
    with pytest.raises(ValueError, match="positive"):
        soft_argsort(torch.zeros(3), regularization_strength=0.0)
