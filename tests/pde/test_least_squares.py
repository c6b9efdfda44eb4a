"""The least-squares solution as a function of its data: accuracy, statuses, and which derivative is exact."""

import functools

import pytest
import torch
from torch import Tensor

from difflayers import Status
from difflayers.errors import ConvergenceWarning, NotConvergedError, SingularError
from difflayers.pde.least_squares import FitOptions
from difflayers.pde.solve_rows import solve_rows
from difflayers.pde.structured import LinearRows, PointRows
from difflayers.solvers import gauss_newton

from .test_structured import D, randn


def curved(z: dict[str, Tensor], c: Tensor) -> Tensor:
    return z["u"] + 0.2 * z["u"] ** 2 - c


def fit(T: Tensor, c: Tensor, **options: object):
    return solve_rows(torch.zeros(*c.shape[:-1], T.shape[-1], dtype=D), [PointRows(curved, {"u": T}, (c,))], options=FitOptions(**options))


T, C = randn(9, 3), randn(2, 9, seed=1)


def stationarity(x: Tensor) -> Tensor:
    u = x @ T.T
    return (((1 + 0.4 * u) * (u + 0.2 * u**2 - C)) @ T).norm(dim=-1)


def test_newton_steps_go_on_where_the_tolerance_stops() -> None:
    found = fit(T, C, tol=1e-4)
    assert (found.status == Status.SOLVED).all()
    assert (found.residual <= 1e-4).all()
    assert float(stationarity(found.x).max()) < 1e-9
    torch.testing.assert_close(found.residual_norm, curved({"u": found.x @ T.T}, C).norm(dim=-1))


@pytest.mark.parametrize("solver", ["lm", "gauss_newton", functools.partial(gauss_newton, tol=1e-8)])
def test_solvers_agree(solver: object) -> None:
    torch.testing.assert_close(fit(T, C, solver=solver).x, fit(T, C).x, atol=1e-11, rtol=0)


def test_the_exact_hessian_is_exact_and_gauss_newton_where_the_rows_vanish() -> None:
    def error(c: Tensor, hessian: str) -> float:
        c = c.clone().requires_grad_()
        direction = randn(*c.shape, seed=3)
        (slope,) = torch.autograd.grad(fit(T, c, hessian=hessian).x.sum(), c)
        with torch.no_grad():
            difference = (fit(T, c + 1e-5 * direction).x - fit(T, c - 1e-5 * direction).x).sum() / 2e-5
        return float(((slope * direction).sum() - difference) / difference)

    assert abs(error(C, "exact")) < 1e-8
    assert abs(error(C, "gauss_newton")) > 1e-3
    u = randn(2, 3, seed=2) @ T.T * 0.3
    solvable = u + 0.2 * u**2
    assert abs(error(solvable, "gauss_newton")) < 1e-8


def test_a_minimum_that_is_not_isolated_is_singular() -> None:
    flat = torch.stack([T, T[:, [0, 0, 1]]])  # the second problem has two equal columns
    c = C.clone().requires_grad_()
    with pytest.raises(SingularError) as error:
        fit(flat, c)
    assert error.value.indices == [(1,)]
    assert error.value.solution.x.shape == (2, 3)
    found = fit(flat, c, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.SINGULAR]
    assert found.x[1].isnan().all()
    (slope,) = torch.autograd.grad(found.x[0].sum(), c)
    alone = C[:1].clone().requires_grad_()
    torch.testing.assert_close(found.x[:1], fit(T, alone).x)
    torch.testing.assert_close(slope[:1], torch.autograd.grad(fit(T, alone).x.sum(), alone)[0])
    assert not slope[1].any()
    with pytest.warns(ConvergenceWarning, match="SINGULAR"):
        kept = fit(flat, c, on_failure="warn")
    assert kept.x.isfinite().all()


def test_a_ridge_makes_it_unique() -> None:
    flat = torch.stack([T, T[:, [0, 0, 1]]])
    ridge = [LinearRows(1e-4 * torch.eye(3, dtype=D), torch.zeros(3, dtype=D))]
    found = solve_rows(torch.zeros(2, 3, dtype=D), [PointRows(curved, {"u": flat}, (C,))], ridge, options=FitOptions())
    assert (found.status == Status.SOLVED).all()
    torch.testing.assert_close(found.x[1, 0], found.x[1, 1])


def test_not_converged_is_told_with_the_best_so_far() -> None:
    with pytest.raises(NotConvergedError, match="MAX_ITER") as error:
        fit(T, C, max_iter=1, tol=1e-14)
    assert error.value.solution.x.isfinite().all()


def test_single_precision_iterations_end_in_double() -> None:
    rough, exact = fit(T, C, precision=torch.float32), fit(T, C, tol=1e-13)
    assert (rough.status == Status.SOLVED).all()
    torch.testing.assert_close(rough.x, exact.x, atol=1e-11, rtol=0)
