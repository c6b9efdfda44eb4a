"""The box section: against a quadratic program, with weights of any sign, bounds at infinity, and values at the edge of reach."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_box_section, projection_simplex
from difflayers.errors import InfeasibleError, ShapeError
from tests.convex.projections.checks import rows


def test_against_a_quadratic_program() -> None:
    x, w = 3 * rows(100, 6, seed=0), rows(100, 6, seed=1)
    lower, upper = -rows(100, 6, seed=2).abs(), rows(100, 6, seed=3).abs()
    c = (w * (lower + upper) / 2).sum(-1) + 0.1 * rows(100, seed=4)
    w[::7, 2] = 0
    lower[::5, 1], upper[::4, 0] = -torch.inf, torch.inf
    upper[::9, 3] = lower[::9, 3]
    p = projection_box_section(x, (lower, upper, w, c), on_failure="nan")
    qp = solve_qp(torch.eye(6, dtype=torch.float64), -x, A=w.unsqueeze(-2), b=c.unsqueeze(-1), lb=lower, ub=upper, on_failure="nan")
    assert torch.equal(p.isnan().any(-1), qp.status != 0)
    torch.testing.assert_close(p, qp.x, rtol=0, atol=1e-12, equal_nan=True)


def test_gradients_in_all_arguments() -> None:
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    lower, upper = torch.full((5,), -0.6, dtype=torch.float64), torch.full((3, 5), 0.7, dtype=torch.float64)
    c = torch.tensor(0.2, dtype=torch.float64)
    arguments = [part.clone().requires_grad_() for part in (x, lower, upper, w, c)]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return projection_box_section(x, parameters)

    assert gradcheck(call, arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, arguments, check_fwd_over_rev=True, fast_mode=True)


def test_is_the_simplex_without_an_upper_bound() -> None:
    x = rows(10, 8, seed=6)
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(projection_box_section(x, (0.0, torch.inf, ones, 2.0)), projection_simplex(x, 2.0))


@pytest.mark.parametrize("c", [0.0, 3.0])
def test_the_edge_of_reach(c: float) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    x = rows(3, seed=7).requires_grad_()
    p = projection_box_section(x, (0.0, 1.0, ones, c))
    torch.testing.assert_close(p, torch.full((3,), c / 3, dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(p.sum(), x)[0]).all()


@pytest.mark.parametrize("which", range(5))
def test_broken_arguments_stay_alone(which: int) -> None:
    arguments = [rows(3, 4, seed=8), torch.full((3, 4), -torch.inf), torch.full((3, 4), torch.inf), rows(3, 4, seed=9), torch.ones(3)]
    arguments = [part.double() for part in arguments]
    good = projection_box_section(arguments[0], tuple(arguments[1:]))
    arguments[which] = arguments[which].clone()
    arguments[which][(1, 2) if which < 4 else 1] = torch.nan
    p = projection_box_section(arguments[0], tuple(arguments[1:]))
    assert p[1].isnan().all()
    assert torch.equal(p[[0, 2]], good[[0, 2]])


def test_without_weights_it_is_the_box() -> None:
    x = torch.tensor([-1.0, 0.5, 3.0])
    assert projection_box_section(x, (0.0, 1.0, torch.zeros(3), 0.0)).tolist() == [0.0, 0.5, 1.0]


def test_refusals() -> None:
    x, ones = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(InfeasibleError) as caught:
        projection_box_section(x, (0.0, 1.0, ones, torch.tensor([1.0, 3.5])))
    assert caught.value.indices == [(1,)]
    with pytest.raises(InfeasibleError):
        projection_box_section(x, (1.0, 0.0, ones, 1.0))
    with pytest.raises(ShapeError, match="broadcast"):
        projection_box_section(x, (0.0, 1.0, ones, torch.ones(3)))
