"""Certificates of conic programs: what proves, and what only looks like it."""

import pytest
import torch

from difflayers.convex import Cones, solve_cone
from difflayers.convex.cone_certificates import proves_infeasible, proves_unbounded
from difflayers.convex.cone_structure import Pattern, Structure
from difflayers.errors import InfeasibleError, UnboundedError

FLOAT = {"dtype": torch.float64}


def structure(rows: int, columns: int, cones: Cones) -> Structure:
    i = torch.arange(rows).repeat_interleave(columns)
    return Structure((1,), cones, None, Pattern(i, torch.arange(columns).repeat(rows), (rows, columns)))


def test_a_farkas_vector_proves_and_its_negative_does_not():
    # x ≤ −1 and −x ≤ −1
    A, b = torch.tensor([[1.0, -1.0]], **FLOAT), torch.tensor([[-1.0, -1.0]], **FLOAT)
    where = structure(2, 1, Cones(nonneg=2))
    theta, y = (None, torch.zeros(1, 1, **FLOAT), A, b), torch.ones(1, 2, **FLOAT)
    for scale in (1e-9, 1.0, 1e9):
        assert proves_infeasible(where, theta, scale * y).all()
    assert not proves_infeasible(where, theta, -y).any()
    assert not proves_infeasible(where, theta, y + torch.tensor([[1e-3, 0.0]], **FLOAT)).any()
    assert not proves_infeasible(where, theta, torch.full_like(y, torch.nan)).any()
    feasible = (None, theta[1], A, -b)
    assert not proves_infeasible(where, feasible, y).any()


def test_a_ray_proves_while_it_stays_in_the_cone():
    # min −x₁ with ‖x₂‖ ≤ x₁
    where = structure(2, 2, Cones(soc=(2,)))
    theta = (None, torch.tensor([[-1.0, 0.0]], **FLOAT), -torch.eye(2, **FLOAT).reshape(1, 4), torch.zeros(1, 2, **FLOAT))
    assert proves_unbounded(where, theta, torch.tensor([[1.0, 0.5]], **FLOAT)).all()
    assert not proves_unbounded(where, theta, torch.tensor([[1.0, 1.1]], **FLOAT)).any()
    assert not proves_unbounded(where, theta, torch.tensor([[-1.0, 0.0]], **FLOAT)).any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_layer_says_which_is_which(scale):
    # The disc ‖x‖ ≤ 1 beside the half-plane x₁ ≥ 2; the half-plane alone.
    disc = torch.cat([torch.zeros(1, 2, **FLOAT), -torch.eye(2, **FLOAT)])
    A = scale * torch.cat([torch.tensor([[-1.0, 0.0]], **FLOAT), disc])
    b = scale * torch.tensor([-2.0, 1.0, 0.0, 0.0], **FLOAT)
    with pytest.raises(InfeasibleError):
        solve_cone(None, torch.ones(2, **FLOAT), A, b, Cones(nonneg=1, soc=(3,)), solver="CLARABEL")
    with pytest.raises(UnboundedError):
        solve_cone(None, -torch.ones(2, **FLOAT), A[:1], b[:1], Cones(nonneg=1), solver="CLARABEL")
