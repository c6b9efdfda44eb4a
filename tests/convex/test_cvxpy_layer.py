from __future__ import annotations

import pickle
import sys
import threading
from typing import Any

import cvxpy as cp
import diffcp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck
from torch.func import jacrev, jvp, vmap

from difflayers import CvxpyLayer, Status
from difflayers.errors import ConvergenceWarning, DiffLayersError, InfeasibleError, MissingExtraError, UnboundedError
from tests.reference import relative_error

CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


def double(*values: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_() for value in values)


def agrees(layer: CvxpyLayer, problem: cp.Problem, parameters: list, variables: list, values: tuple[Tensor, ...], **options: Any) -> None:
    """The layer's tuple is what CVXPY finds."""
    found = layer(*values)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value.detach().numpy() if value.dim() else value.item()
    problem.solve(**CLARABEL, **options)
    assert len(found) == len(variables)
    for value, variable in zip(found, variables, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), variable.value, atol=2e-6, rtol=2e-6)


def ball() -> tuple[CvxpyLayer, cp.Problem, list, list]:
    """The point of a ball that is nearest to a: a second-order cone."""
    x, a, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= r])
    return CvxpyLayer(problem, [a, r], [x]), problem, [a, r], [x]


def simplex(**options: Any) -> CvxpyLayer:
    """A quadratic program."""
    x, a = cp.Variable(3), cp.Parameter(3)
    return CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) == 1, x >= 0]), [a], [x], **options)


def test_closed_form_value_gradient_and_hessian() -> None:
    layer, *_ = ball()
    a, r = double([1.0, 2.0, -2.0], 1.5)
    exact = r * a / a.norm()
    (x,) = layer(a, r)
    torch.testing.assert_close(x, exact, atol=1e-10, rtol=1e-10)
    weights = torch.tensor([0.3, -1.0, 2.0]).double()
    slopes = [grad((weights * point).sum(), (a, r), create_graph=True) for point in (x, exact)]
    for found, true in zip(*slopes, strict=True):
        torch.testing.assert_close(found, true, atol=1e-9, rtol=1e-9)
    seconds = [grad((slope[0] ** 2).sum(), (a, r)) for slope in slopes]
    for found, true in zip(*seconds, strict=True):
        torch.testing.assert_close(found, true, atol=1e-8, rtol=1e-8)


def test_transforms() -> None:
    layer, *_ = ball()
    points, r = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double() + 2, torch.tensor(1.0).double()
    exact = points / points.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(vmap(layer, (0, None))(points, r)[0], exact, atol=1e-9, rtol=1e-9)
    jacobian = vmap(jacrev(lambda a: layer(a, r)[0]))(points)
    true = vmap(jacrev(lambda a: a / a.norm()))(points)
    torch.testing.assert_close(jacobian, true, atol=1e-8, rtol=1e-8)
    pushed = jvp(lambda a: layer(a, r)[0], (points,), (torch.ones_like(points),))[1]
    torch.testing.assert_close(pushed, true.sum(-1), atol=1e-8, rtol=1e-8)


def test_batches_and_shared_parameters() -> None:
    layer, *_ = ball()
    a, r = double(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) + 2, 1.0)
    (x,) = layer(a, r)
    assert x.shape == (5, 3)
    torch.testing.assert_close(x, r * a / a.norm(dim=-1, keepdim=True), atol=1e-9, rtol=1e-9)
    slope = grad(x.sum(), r)[0]  # the sum over the batch
    torch.testing.assert_close(slope, (a / a.norm(dim=-1, keepdim=True)).sum().detach(), atol=1e-9, rtol=1e-9)
    assert layer(a[:1], r)[0].shape == (1, 3)
    assert layer(a[:0], r)[0].shape == (0, 3)
    assert layer(a[0], r.expand(2))[0].shape == (2, 3)


def test_every_kind_of_dual() -> None:
    # Two cones of each kind at once, so that rows that belong to one cone are not taken for neighbours.
    a, p = cp.Variable(4), cp.Parameter(4)
    constraints = [
        cp.PowCone3D(a[:2], a[1:3], a[2:] - 1, [0.3, 0.6]),
        cp.ExpCone(a[:2] - 1, a[1:3], a[2:] + 1),
        cp.SOC(a[:2] + p[:2], cp.vstack([a[:2] - p[:2], a[2:]]), axis=0),
        cp.norm(a) <= 5,
        a[0] + a[1] == 2,
        a[3] >= p[3] - 1,
    ]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(a - p) + a[3]), constraints)
    variables = [a, *(dual for constraint in constraints for dual in constraint.dual_variables)]
    layer = CvxpyLayer(problem, [p], variables)
    agrees(layer, problem, [p], variables, double([1.0, 0.9, 1.1, 1.2]))


def test_symmetric_variables_parameters_and_semidefinite_duals() -> None:
    n = 3
    X, Y = cp.Variable((n, n), symmetric=True), cp.Variable((n, n), PSD=True)
    B, C = cp.Parameter((n, n), symmetric=True), cp.Parameter((n, 2))
    Z = cp.Variable((n, 2))
    constraints = [X >> 0, cp.trace(X) == 1, cp.bmat([[X, B], [B, X]]) + np.eye(6) >> 0, Z >= C, Z.T @ np.ones((n, n)) <= 9 + X[:2]]
    objective = cp.trace(B @ X) + 0.1 * cp.sum_squares(X) + cp.sum_squares(Z) + cp.sum_squares(Y - B)
    problem = cp.Problem(cp.Minimize(objective), constraints)
    variables = [X, Y, Z, *(dual for constraint in constraints for dual in constraint.dual_variables)]
    layer = CvxpyLayer(problem, [B, C], variables)
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(3)).double()
    values = double((draw + draw.mT) / 4, torch.randn(n, 2, generator=torch.Generator().manual_seed(4)))
    agrees(layer, problem, [B, C], variables, values)
    slope = grad(sum((part**2).sum() for part in layer(*values)[:4]), values[0])[0]
    torch.testing.assert_close(slope, slope.mT)
    assert gradcheck(lambda b, c: layer(b, c)[:4], values, atol=1e-5)


def test_constraints_that_other_forms_keep_beside_the_rows() -> None:
    # CVXPY gives MOREAU x >= 0 and X >> 0 as dir_cones, and other solvers the bounds of z; all of them must hold here.
    x, z, X, p = cp.Variable(2), cp.Variable(2, bounds=[-0.5, 0.5]), cp.Variable((2, 2), symmetric=True), cp.Parameter(2)
    nonneg = cp.Variable(2, nonneg=True)
    objective = cp.sum_squares(x - p) + cp.sum_squares(z - p) + cp.sum_squares(X - cp.diag(p)) + cp.sum_squares(nonneg - p)
    problem = cp.Problem(cp.Minimize(objective), [x >= 0, X >> 0])
    for solver in (None, "MOREAU", "CLARABEL", "SCS"):
        x_, z_, X_, nonneg_ = CvxpyLayer(problem, [p], [x, z, X, nonneg], solver=solver)(torch.tensor([-3.0, 2.0]).double())
        for value, exact in ((x_, [0, 2]), (z_, [-0.5, 0.5]), (X_, [[0, 0], [0, 2]]), (nonneg_, [0, 2])):
            torch.testing.assert_close(value, torch.tensor(exact).double(), atol=1e-6, rtol=0)


def test_quadratic_forms_with_parameters() -> None:
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [cp.sum(x) == 1, x >= -2])
    with pytest.raises(ValueError, match="solver='CLARABEL'"):
        CvxpyLayer(problem, [P, q], [x])
    draw = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    values = double(draw @ draw.mT + torch.eye(3), [0.3, -0.2, 1.0])
    for solver in ("CLARABEL", "MOREAU"):
        layer = CvxpyLayer(problem, [P, q], [x], solver=solver)
        agrees(layer, problem, [P, q], [x], values)
        assert gradcheck(layer, values)


def geometric() -> tuple[CvxpyLayer, cp.Problem, list, list]:
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    problem = cp.Problem(cp.Minimize(1 / (x * y * z)), constraints)
    variables = [x, y, z, constraints[0].dual_variables[0]]
    return CvxpyLayer(problem, [a, b, c], variables, gp=True), problem, [a, b, c], variables


def test_geometric_programs() -> None:
    layer, problem, parameters, variables = geometric()
    values = double(2.0, 1.0, 0.5)
    agrees(layer, problem, parameters, variables, values, gp=True)
    assert gradcheck(layer, values, atol=1e-5)
    batch = double([2.0, 1.5], [1.0, 1.2], 0.5)
    together = layer(*batch)
    for i in range(2):
        for value, alone in zip(together, layer(batch[0][i], batch[1][i], batch[2]), strict=True):
            torch.testing.assert_close(value[i], alone, atol=1e-8, rtol=1e-8)


def test_linear_programs_and_their_multipliers() -> None:
    x, c, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    equation = cp.sum(x) == b
    problem = cp.Problem(cp.Minimize(c @ x), [equation, x >= 0])
    for solver in (None, "CLARABEL"):
        layer = CvxpyLayer(problem, [c, b], [x, equation.dual_variables[0]], solver=solver)
        values = double([1.0, 2.0], 1.0)
        agrees(layer, problem, [c, b], [x, equation.dual_variables[0]], values)
        slope = grad(layer(*values)[1], values, allow_unused=True)[0]
        torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0]).double(), atol=1e-9, rtol=0)


def test_failures_are_errors_of_both_packages() -> None:
    x, p = cp.Variable(), cp.Parameter()
    infeasible = CvxpyLayer(cp.Problem(cp.Minimize(x), [x >= 1, x <= p]), [p], [x])
    unbounded = CvxpyLayer(cp.Problem(cp.Minimize(x), [x <= p]), [p], [x])
    for layer, error, status in ((infeasible, InfeasibleError, 2), (unbounded, UnboundedError, 3)):
        with pytest.raises(error) as caught:
            layer(torch.tensor(0.0).double())
        assert isinstance(caught.value, diffcp.SolverError)
        assert isinstance(caught.value, ValueError)
        assert int(caught.value.solution.status) == status
        assert len(caught.value.solution.values) == 1


@pytest.mark.parametrize("solver", [None, "CLARABEL"])
def test_one_bad_element_does_not_harm_the_batch(solver: str | None) -> None:
    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 1)), [cp.norm(x, "inf") <= p[0], x[0] >= p[1]])
    layer = CvxpyLayer(problem, [p], [x], solver=solver, on_failure="nan")
    (points,) = double([[0.5, 0.0], [0.5, 0.7], [torch.nan, 0.0], [0.9, 0.0]])
    found = layer.solve(points)
    assert found.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.NUMERICAL_ERROR, Status.SOLVED]
    (x_,) = found.values
    assert x_.isnan().all(-1).tolist() == [False, True, True, False]
    (slope,) = grad(x_.nan_to_num().sum(), points)
    torch.testing.assert_close(slope, torch.tensor([[2.0, 0], [0, 0], [0, 0], [2, 0]]).double(), atol=1e-7, rtol=0)
    with pytest.warns(ConvergenceWarning):
        layer.solve(points, on_failure="warn")


def test_float32() -> None:
    for layer, values in ((simplex(), ([0.9, 0.5, -0.1],)), (ball()[0], ([1.0, 2.0, -2.0], 1.5))):
        singles = tuple(value.detach().float().requires_grad_() for value in double(*values))
        (x,) = layer(*singles)
        assert x.dtype == torch.float32
        weights = torch.tensor([1.0, 2.0, -1.0])
        slopes = grad((weights * x).pow(2).sum(), singles)
        exact = double(*values)
        for slope, true in zip(slopes, grad((weights * layer(*exact)[0]).pow(2).sum(), exact), strict=True):
            assert slope.dtype == torch.float32
            assert relative_error(slope.double(), true) < 1e-3
    mixed = ball()[0](torch.tensor([1.0, 2.0, 2.0]), torch.tensor(1.0).double())[0]
    assert mixed.dtype == torch.float64
    assert simplex()(torch.tensor([1, 0, 0]))[0].dtype == torch.get_default_dtype()


def test_shapes_are_refused_in_the_words_of_cvxpylayers() -> None:
    layer, *_ = ball()
    a, r = torch.ones(3), torch.ones(())
    for arguments, message in (
        ((a,), "A tensor must be provided for each CVXPY parameter"),
        ((a[:2], r), "Invalid parameter shape"),
        ((torch.ones(4, 2), r), "Invalid parameter shape"),
        ((torch.ones(2, 4, 3), r), "Invalid parameter dimensionality"),
        ((torch.ones(4, 3), torch.ones(5)), "Inconsistent batch sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    with pytest.raises(AttributeError):
        layer(a, None)


def test_problems_are_refused_in_the_words_of_cvxpylayers() -> None:
    x, y, p, q = cp.Variable(), cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize((x - p) ** 2))
    with pytest.raises(ValueError, match="must exactly match"):
        CvxpyLayer(problem, [p, q], [x])
    with pytest.raises(ValueError, match="must be a subset"):
        CvxpyLayer(problem, [p], [y])
    with pytest.raises(ValueError, match="DPP"):
        CvxpyLayer(cp.Problem(cp.Minimize((p * p * x - 1) ** 2)), [p], [x])
    with pytest.raises(ValueError, match="not known"):
        CvxpyLayer(problem, [p], [x], solver="ABACUS")
    diagonal = cp.Variable((2, 2), diag=True)
    with pytest.raises(NotImplementedError, match="diagonal"):
        CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(diagonal - p))), [p], [diagonal])
    cone = cp.PowConeND(cp.hstack([x, y, 1]), q, np.array([0.2, 0.3, 0.5]))
    with pytest.raises((DiffLayersError, NotImplementedError, ValueError)):
        CvxpyLayer(cp.Problem(cp.Minimize(x + y), [cone]), [q], [x])


def test_settings_of_the_solver() -> None:
    layer, *_ = ball()
    a, r = double([1.0, 2.0, -2.0], 1.5)
    exact = layer(a, r)[0].detach()
    for settings in ({"eps": 1e-9}, {"solve_method": "SCS", "eps": 1e-9}, {"solve_method": "Clarabel", "max_iter": 50}, {"tol_feas": 1e-9}):
        torch.testing.assert_close(layer(a, r, solver_args=settings)[0], exact, atol=1e-8, rtol=1e-8)
    with pytest.raises(TypeError, match="no setting"):
        layer(a, r, solver_args={"nonsense": 3})
    # Who sets a limit is given the point that it leads to, and a warning.
    with pytest.warns(ConvergenceWarning, match="MAX_ITER"):
        (rough,) = layer(a, r, solver_args={"max_iter": 2})
    assert float((rough.detach() - exact).abs().max()) > 1e-4
    with pytest.warns(ConvergenceWarning, match="MAX_ITER"):
        layer(a, r, solver_args={"max_iters": 1})


def test_from_several_threads() -> None:
    layer, *_ = ball()
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double() + 2
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = layer(points[i] if i % 2 else points[: i + 1], torch.tensor(1.0).double())[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    exact = points / points.norm(dim=-1, keepdim=True)
    for i in range(8):
        torch.testing.assert_close(found[i], exact[i] if i % 2 else exact[: i + 1], atol=1e-9, rtol=1e-9)


def test_pickled_and_shown() -> None:
    layer = simplex(solver="CLARABEL")
    copy = pickle.loads(pickle.dumps(layer))
    point = torch.tensor([0.9, 0.5, -2.0])
    assert torch.equal(copy(point)[0], layer(point)[0])
    assert "solver='CLARABEL'" in repr(layer)
    assert "unknowns=" in repr(copy)


def test_without_cvxpylayers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpylayers.interfaces.base", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        simplex()


def test_verbose_shows_the_solver(capfd: pytest.CaptureFixture[str]) -> None:
    simplex(verbose=True)(torch.tensor([0.9, 0.5, -2.0]))
    assert "Clarabel" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("shared", [False, True])
def test_the_layer_agrees_with_cvxpylayers(shared: bool) -> None:
    from cvxpylayers.torch import CvxpyLayer as Theirs

    x, A, b = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + 0.1 * cp.norm1(x)), [x >= -1])
    draw = torch.Generator().manual_seed(0)
    values = double(torch.randn(*([] if shared else [4]), 5, 3, generator=draw), torch.randn(4, 5, generator=draw))
    ours, theirs = CvxpyLayer(problem, [A, b], [x]), Theirs(problem, [A, b], [x])
    found, true = ours(*values)[0], theirs(*values, solver_args={"eps": 1e-11, "max_iters": 100_000})[0]
    torch.testing.assert_close(found, true, atol=1e-6, rtol=1e-6)
    for slope, exact in zip(grad(found.pow(2).sum(), values), grad(true.pow(2).sum(), values), strict=True):
        assert relative_error(slope, exact) < 1e-4
