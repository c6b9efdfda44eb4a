"""What every projection on a convex set is: feasible, idempotent, nonexpansive, and the nearest point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

from difflayers.convex import projections as P
from tests.convex.projections.checks import rows, wide_rows

ONES = torch.ones(4, dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
EQUATION = torch.tensor([[1.0, 2.0, 0.0, -1.0], [2.0, 4.0, 0.0, -2.0]], dtype=torch.float64)
INEQUALITIES = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class ConvexSet:
    """A set of rows of four entries.

    Args:
        project: the projection.
        violation: how far a row ``(*batch, 4)`` is from the set.
        kinks: rows with a kink, more than those that all sets are tried on.
        tolerance: the error of a projection relative to the size of the point.
    """

    project: Callable[[Tensor], Tensor]
    violation: Callable[[Tensor], Tensor]
    kinks: tuple[tuple[float, ...], ...] = ()
    tolerance: float = 1e-14


def _rows_of_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.unflatten(-1, (2, 2))).flatten(-2)


def _doubly_stochastic_error(x: Tensor) -> Tensor:
    X = x.unflatten(-1, (2, 2))
    sums = torch.maximum((X.sum(-1) - 1).abs().amax(-1), (X.sum(-2) - 1).abs().amax(-1))
    return torch.maximum(sums, -x.amin(-1))


SETS: dict[str, ConvexSet] = {
    "non_negative": ConvexSet(P.projection_non_negative, lambda x: -x.amin(-1)),
    "box": ConvexSet(lambda x: P.projection_box(x, (-0.5, ONES)), lambda x: torch.maximum(-0.5 - x, x - 1).amax(-1)),
    "linf_ball": ConvexSet(lambda x: P.projection_linf_ball(x, 0.7), lambda x: x.abs().amax(-1) - 0.7),
    "l2_ball": ConvexSet(lambda x: P.projection_l2_ball(x, 2.0), lambda x: torch.linalg.vector_norm(x, dim=-1) - 2),
    "l1_ball": ConvexSet(lambda x: P.projection_l1_ball(x, 1.5), lambda x: x.abs().sum(-1) - 1.5),
    "simplex": ConvexSet(
        lambda x: P.projection_simplex(x, 2.0), lambda x: torch.maximum((x.sum(-1) - 2).abs(), -x.amin(-1)), ((2.0, 0.0, 0.0, 0.0),)
    ),
    "hyperplane": ConvexSet(lambda x: P.projection_hyperplane(x, (WEIGHTS, 0.5)), lambda x: ((x * WEIGHTS).sum(-1) - 0.5).abs()),
    "halfspace": ConvexSet(lambda x: P.projection_halfspace(x, (WEIGHTS, 0.5)), lambda x: (x * WEIGHTS).sum(-1) - 0.5),
    "affine_set": ConvexSet(
        lambda x: P.projection_affine_set(x, (EQUATION, ONES[:2] * torch.tensor([1.0, 2.0]))),
        lambda x: (x @ EQUATION.mT - torch.tensor([1.0, 2.0])).abs().amax(-1),
        tolerance=1e-13,
    ),
    "polyhedron": ConvexSet(
        lambda x: P.projection_polyhedron(x, (None, None, INEQUALITIES, ONES[:3])),
        lambda x: (x @ INEQUALITIES.mT - 1).amax(-1),
        tolerance=1e-8,
    ),
    "box_section": ConvexSet(
        lambda x: P.projection_box_section(x, (-1.0, ONES, WEIGHTS, 0.4)),
        lambda x: torch.maximum(((x * WEIGHTS).sum(-1) - 0.4).abs(), x.abs().amax(-1) - 1),
    ),
    "birkhoff": ConvexSet(_rows_of_matrices(P.projection_birkhoff), _doubly_stochastic_error, ((1.0, 0.0, 0.0, 1.0),)),
    "transport": ConvexSet(
        _rows_of_matrices(lambda x: P.projection_transport(x, (ONES[:2], torch.tensor([0.5, 1.5], dtype=torch.float64)))),
        lambda x: (x.unflatten(-1, (2, 2)).sum(-1) - 1).abs().amax(-1),
        tolerance=1e-11,
    ),
    "isotonic": ConvexSet(P.projection_isotonic, lambda x: -x.diff(dim=-1).amin(-1), ((2.0, 1.0, 1.0, 1.0),)),
}
KINKS = ((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (-1.0, 0.0, 1.0, 0.0), (0.5, -0.5, 0.7, -0.7), (2.0, 0.0, 0.0, 0.0))

# These report a broken row, or have parameters in float64: tests/test_contract.py looks at both.
REPORTING = {"polyhedron", "birkhoff", "transport"}
IN_FLOAT64 = {"box", "affine_set", "hyperplane", "halfspace", "polyhedron", "box_section", "transport"}

names = pytest.mark.parametrize("name", SETS)
entries = st.floats(-3, 3) | st.sampled_from([0.0, 1.0, -1.0, 1e-8, 100.0])


@names
@settings(max_examples=15)
@given(v=st.lists(st.tuples(*[entries] * 4), min_size=8, max_size=8))
def test_nearest_point(name: str, v: list[tuple[float, ...]]) -> None:
    _check_nearest(name, torch.tensor(v, dtype=torch.float64))


@names
def test_nearest_point_at_any_magnitude(name: str) -> None:
    scale = 1e4 if name == "polyhedron" else 1e8
    _check_nearest(name, wide_rows(100, 4, seed=0).clamp(-scale, scale))


def _check_nearest(name: str, x: Tensor) -> None:
    chosen = SETS[name]
    p = chosen.project(x)
    size = 1 + x.abs().amax()
    tolerance = 10 * chosen.tolerance * size
    assert chosen.violation(p).max() <= tolerance
    assert (chosen.project(p) - p).abs().max() <= tolerance
    # ⟨x − p, q − p⟩ ≤ 0 for every q in the set: then and only then p is the nearest point.
    members = chosen.project(rows(50, 4, seed=1))
    towards = members - p.unsqueeze(-2)
    assert ((x - p).unsqueeze(-2) * towards).sum(-1).max() <= tolerance * size
    gaps = torch.linalg.vector_norm(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
    assert (torch.linalg.vector_norm(p.unsqueeze(0) - p.unsqueeze(1), dim=-1) <= gaps + tolerance).all()


@names
def test_derivatives_at_kinks_are_finite(name: str) -> None:
    x = torch.tensor(KINKS + SETS[name].kinks, dtype=torch.float64)
    reverse, forward = vmap(jacrev(SETS[name].project))(x), vmap(jacfwd(SETS[name].project))(x)
    assert torch.isfinite(reverse).all()
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-9)
    assert torch.isfinite(vmap(hessian(lambda x: SETS[name].project(x).sum()))(x)).all()
    # An element of the generalized Jacobian: symmetric, with eigenvalues in [0, 1].
    assert (reverse - reverse.mT).abs().max() <= 1e-9
    values = torch.linalg.eigvalsh(reverse)
    assert values.min() >= -1e-9
    assert values.max() <= 1 + 1e-9


@pytest.mark.parametrize("name", sorted(SETS.keys() - REPORTING))
def test_a_broken_row_stays_alone(name: str) -> None:
    x = rows(4, 4, seed=2)
    good = SETS[name].project(x)
    x[1, 2] = torch.nan
    x.requires_grad_()
    p = SETS[name].project(x)
    assert p[1].isnan().any()
    assert torch.equal(p[[0, 2, 3]], good[[0, 2, 3]])
    (slope,) = torch.autograd.grad(p[[0, 2, 3]].sum(), x)
    assert torch.isfinite(slope[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", sorted(SETS.keys() - IN_FLOAT64))
def test_float32(name: str) -> None:
    x = rows(20, 4, seed=3)
    half = SETS[name].project(x.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), SETS[name].project(x), rtol=0, atol=2e-6)
