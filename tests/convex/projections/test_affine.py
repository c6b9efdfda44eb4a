"""Affine sets with redundant, dependent and broken rows, and polyhedra against their definition."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from difflayers.convex.projections import projection_affine_set, projection_halfspace, projection_polyhedron
from difflayers.errors import InfeasibleError, ShapeError
from tests.convex.projections.checks import rows


def test_redundant_rows_change_nothing() -> None:
    x, A, b = rows(4, 5, seed=0), rows(2, 5, seed=1), rows(2, seed=2)
    doubled = torch.cat([A, 2 * A[:1], A.sum(0, keepdim=True)]), torch.cat([b, 2 * b[:1], b.sum(0, keepdim=True)])
    torch.testing.assert_close(projection_affine_set(x, doubled), projection_affine_set(x, (A, b)), rtol=0, atol=1e-13)


def test_derivative_with_redundant_rows() -> None:
    # A and b move together so that the third row stays the sum of the others.
    def call(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        A, b = torch.cat([A, A.sum(0, keepdim=True)]), torch.cat([b, b.sum(0, keepdim=True)])
        return projection_affine_set(x, (A, b))

    arguments = [part.requires_grad_() for part in (rows(4, seed=3), rows(2, 4, seed=4), rows(2, seed=5))]
    assert gradcheck(call, arguments, check_forward_ad=True)
    assert gradgradcheck(call, arguments, check_fwd_over_rev=True)


def test_a_matrix_for_the_whole_batch() -> None:
    x, A, b = rows(6, 4, seed=6), rows(2, 4, seed=7), rows(6, 2, seed=8)
    together = projection_affine_set(x, (A, b))
    torch.testing.assert_close(together, torch.stack([projection_affine_set(x[i], (A, b[i])) for i in range(6)]))
    torch.testing.assert_close(together @ A.mT, b)


def test_more_equations_than_unknowns_and_none() -> None:
    point = rows(3, seed=9)
    A = rows(7, 3, seed=10)
    torch.testing.assert_close(projection_affine_set(rows(3, seed=11), (A, A @ point)), point)
    x = rows(2, 3, seed=12)
    assert torch.equal(projection_affine_set(x, (A[:0], point[:0])), x)


def test_contradictory_and_broken_equations_stay_alone() -> None:
    A = rows(3, 2, 3, seed=13)
    b = rows(3, 2, seed=14)
    A[1, 1] = A[1, 0]
    with pytest.raises(InfeasibleError) as caught:
        projection_affine_set(rows(3, 3, seed=15), (A, b))
    assert caught.value.indices == [(1,)]
    good = projection_affine_set(rows(3, 3, seed=15), (A, b), on_failure="nan")
    assert good[1].isnan().all()
    A[1, 1, 1] = torch.nan
    p = projection_affine_set(rows(3, 3, seed=15), (A, b))
    assert p[1].isnan().all()
    assert torch.equal(p[[0, 2]], good[[0, 2]])


def test_a_polyhedron_of_one_half_space() -> None:
    x, a, b = rows(10, 3, seed=16), rows(3, seed=17), rows(seed=18)
    half = projection_polyhedron(x, (None, None, a.unsqueeze(0), b.unsqueeze(0)))
    torch.testing.assert_close(half, projection_halfspace(x, (a, b)), rtol=0, atol=1e-10)
    plane = projection_polyhedron(x, (a.unsqueeze(0), b.unsqueeze(0), None, None))
    torch.testing.assert_close(plane @ a, b.expand(10))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="A must"):
        projection_affine_set(torch.zeros(3), (torch.zeros(2, 4), torch.zeros(2)))
    with pytest.raises(ShapeError, match="b must"):
        projection_affine_set(torch.zeros(3), (torch.zeros(2, 3), torch.zeros(3)))
    with pytest.raises(ShapeError, match="broadcast"):
        projection_affine_set(torch.zeros(2, 3), (torch.zeros(5, 2, 3), torch.zeros(2)))
    with pytest.raises(InfeasibleError):
        projection_polyhedron(torch.zeros(1), (None, None, torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -1.0])))
