from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from torch.autograd import grad, gradcheck

import difflayers
from difflayers.convex import cvxpylayers_solver
from difflayers.errors import InfeasibleError


def programs() -> tuple[cp.Problem, list, list]:
    """A semidefinite and a second-order cone, with their multipliers."""
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    z, a = cp.Variable(2), cp.Parameter(2)
    constraints = [X >> 0, cp.trace(X) == 1, cp.norm(z) <= 1]
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X) + cp.sum_squares(X) + cp.sum_squares(z - a)), constraints)
    return problem, [C, a], [X, z, constraints[0].dual_variables[0], constraints[2].dual_variables[0]]


def test_inside_of_cvxpylayers() -> None:
    problem, parameters, variables = programs()
    layer = CvxpyLayer(problem, parameters, variables, solver=cvxpylayers_solver())
    ours = difflayers.CvxpyLayer(problem, parameters, variables)
    draw = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    C, a = (draw + draw.mT).requires_grad_(), torch.tensor([3.0, 4.0]).double().requires_grad_()
    for value, exact in zip(layer(C, a), ours(C, a), strict=True):
        torch.testing.assert_close(value, exact, atol=1e-9, rtol=1e-9)
    parameters[0].value, parameters[1].value = C[0].detach().numpy(), a.detach().numpy()
    problem.solve(solver="CLARABEL")
    for value, variable in zip(layer(C, a), variables, strict=True):
        np.testing.assert_allclose((value[0] if value.dim() > variable.ndim else value).detach().numpy(), variable.value, atol=1e-6)
    assert gradcheck(lambda C, a: layer((C + C.mT) / 2, a), (C, a), atol=1e-5, fast_mode=True)


def test_quadratic_programs_and_failures() -> None:
    x, P, q = cp.Variable(2), cp.Parameter((2, 2), PSD=True), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [cp.sum(x) == 1, x >= 0, x <= 2 * cp.sum(x) + q])
    layer = CvxpyLayer(problem, [P, q], [x], solver=cvxpylayers_solver())
    values = tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in ([[2.0, 0.5], [0.5, 1.0]], [0.1, 0.2]))
    (found,) = layer(*values)
    # On x₁ + x₂ = 1 the derivatives 4x₁ + x₂ + 0.1 and x₁ + 2x₂ + 0.2 are equal there.
    torch.testing.assert_close(found, torch.tensor([0.275, 0.725], dtype=torch.float64), atol=1e-9, rtol=0)
    assert all(slope.isfinite().all() for slope in grad(found[0], values))
    with pytest.raises(InfeasibleError):
        layer(values[0], torch.full((2,), -9.0).double())


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="not known"):
        cvxpylayers_solver(solver="ABACUS")
