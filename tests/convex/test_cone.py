from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from difflayers import Status
from difflayers.convex import Cones, solve_cone, solve_qp
from difflayers.errors import (
    ConvergenceWarning,
    InfeasibleError,
    MissingExtraError,
    NotConvergedError,
    ShapeError,
    SingularError,
    UnboundedError,
)
from tests.convex.cone_programs import KINDS, known
from tests.reference import relative_error

SOLVERS = ("CLARABEL", "SCS")


def leaves(*parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.clone().requires_grad_() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_known_solutions(kind: str) -> None:
    cones, n = KINDS[kind]
    program = known(cones, n, 3)
    found = solve_cone(*program.arguments, cones)
    assert found.status.tolist() == [Status.SOLVED] * 3
    for value, exact in ((found.x, program.x), (found.s, program.s), (found.y, program.y)):
        torch.testing.assert_close(value, exact, atol=1e-8, rtol=1e-8)
    assert float(torch.stack([found.primal_residual, found.dual_residual, found.duality_gap]).max()) < 1e-9
    assert int(found.iterations.min()) > 0


@pytest.mark.parametrize("kind", ["second order", "semidefinite", "exponential", "power"])
def test_first_derivatives_of_primal_and_dual(kind: str) -> None:
    cones, n = KINDS[kind]
    inputs = leaves(*known(cones, n).arguments)
    assert gradcheck(lambda *p: solve_cone(*p, cones)[:3], inputs, fast_mode=True, check_forward_ad=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    cones, n = KINDS[kind]
    inputs = leaves(*known(cones, n).arguments)
    assert gradgradcheck(lambda *p: solve_cone(*p, cones).x, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", ["second order", "semidefinite", "exponential", "power"])
def test_scs_agrees(kind: str) -> None:
    cones, n = KINDS[kind]
    program = known(cones, n)
    found = solve_cone(*program.arguments, cones, solver="SCS")
    torch.testing.assert_close(found.x, program.x, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.y, program.y, atol=1e-7, rtol=1e-7)


def test_scs_starts_from_a_solution() -> None:
    cones, n = KINDS["second order"]
    program = known(cones, n)
    cold = solve_cone(*program.arguments, cones, solver="SCS")
    warm = solve_cone(*program.arguments, cones, solver="SCS", warm_start=cold)
    assert int(warm.iterations) < int(cold.iterations) / 2
    torch.testing.assert_close(warm.x, cold.x, atol=1e-8, rtol=1e-8)


def test_a_threaded_batch_is_a_loop() -> None:
    cones, n = KINDS["second order"]
    program = known(cones, n, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batch = solve_cone(*program.arguments, cones, solver="SCS").x
    finally:
        torch.set_num_threads(threads)
    loop = [solve_cone(*(part[i] for part in program.arguments), cones, solver="SCS").x for i in range(4)]
    torch.testing.assert_close(batch, torch.stack(loop), atol=1e-10, rtol=1e-10)


def test_quadratic_programs_agree_with_the_dense_engine() -> None:
    cones, n = Cones(zero=2, nonneg=7), 5
    program = known(cones, n, 2)
    inputs = leaves(*program.arguments)
    P, q, A, b = inputs
    exact = solve_qp(P, q, A[:, 2:], b[:, 2:], A[:, :2], b[:, :2])
    slopes = grad((exact.x**2).sum() + exact.z.sum() + exact.y.sum(), inputs)
    for solver in ("auto", *SOLVERS):
        found = solve_cone(*inputs, cones, solver=solver)
        torch.testing.assert_close(found.x, exact.x, atol=1e-8, rtol=1e-8)
        for value, slope in zip(grad((found.x**2).sum() + found.y.sum(), inputs), slopes, strict=True):
            assert relative_error(value, slope) < 1e-6, solver


def test_a_sparse_pattern_is_the_dense_matrix() -> None:
    cones, n = KINDS["second order"]
    P, q, A, b = known(cones, n, 2, density=0.7).arguments
    rows, columns = (A[0] != 0).nonzero().T
    upper = torch.triu_indices(n, n)
    doubled = torch.where(upper[0] == upper[1], 1.0, 2.0)  # the symmetric part of a triangle has half of it on each side
    P_values, A_values = leaves(doubled * P[:, upper[0], upper[1]], A[:, rows, columns])
    sparse = solve_cone((upper, P_values), q, (torch.stack([rows, columns]), A_values), b, cones)
    dense_P, dense_A = leaves(P, A)
    dense = solve_cone(dense_P, q, dense_A, b, cones)
    torch.testing.assert_close(sparse.x, dense.x, atol=1e-9, rtol=1e-9)
    slopes = grad(sparse.x.pow(2).sum(), (P_values, A_values))
    exact_P, exact_A = grad(dense.x.pow(2).sum(), (dense_P, dense_A))
    torch.testing.assert_close(slopes[0], exact_P[:, upper[0], upper[1]], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(slopes[1], exact_A[:, rows, columns], atol=1e-8, rtol=1e-8)


def test_entries_of_a_pattern_that_repeat_are_added_up() -> None:
    indices = torch.tensor([[0, 0, 1], [0, 0, 1]])
    x = solve_cone(
        None, torch.ones(2).double(), (indices, torch.tensor([-1.0, -1.0, -1.0]).double()), -torch.ones(2).double(), Cones(nonneg=2)
    ).x
    torch.testing.assert_close(x, torch.tensor([0.5, 1.0]).double())


def test_shared_arguments_have_the_sum_of_the_gradients() -> None:
    cones, n = KINDS["second order"]
    program = known(cones, n)
    q = program.q + 0.05 * torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = leaves(program.P, program.A, program.b)
    P, A, b = shared
    slopes = grad(solve_cone(P, q, A, b, cones).x.pow(3).sum(), shared)
    loop = [grad(solve_cone(P, each, A, b, cones).x.pow(3).sum(), shared) for each in q]
    for slope, parts in zip(slopes, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(slope, torch.stack(parts).sum(0), atol=1e-9, rtol=1e-9)


def test_failures_are_told_apart_and_leave_their_neighbours_alone() -> None:
    cones, n = KINDS["second order"]
    P, q, A, b = (part.expand(4, *part.shape).clone() for part in known(cones, n).arguments)
    A[1], b[1] = 0, -1  # 0 = −1
    P[2], A[2] = 0, 0
    b[2] = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
    q[3, 0] = torch.nan
    with pytest.warns(ConvergenceWarning, match="PRIMAL_INFEASIBLE"):
        found = solve_cone(P, q, A, b, cones, on_failure="warn")
    wanted = [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE, Status.NUMERICAL_ERROR]
    assert found.status.tolist() == wanted
    inputs = leaves(P, q, A, b)
    x = solve_cone(*inputs, cones, on_failure="nan").x
    assert x.isnan().all(-1).tolist() == [False, True, True, True]
    alone = leaves(P[0], q[0], A[0], b[0])
    exact = solve_cone(*alone, cones).x
    torch.testing.assert_close(x[0], exact, atol=1e-12, rtol=1e-12)
    for slope, true in zip(grad(x.nan_to_num().sum(), inputs), grad(exact.sum(), alone), strict=True):
        torch.testing.assert_close(slope[0], true, atol=1e-10, rtol=1e-10)
        assert not slope[1:].any()
    for i, error in ((1, InfeasibleError), (2, UnboundedError), (3, NotConvergedError)):
        with pytest.raises(error) as caught:
            solve_cone(P[i], q[i], A[i], b[i], cones)
        assert caught.value.solution.x.shape == (n,)


def test_a_limit_of_iterations_is_a_failure() -> None:
    cones, n = KINDS["exponential"]
    program = known(cones, n)
    with pytest.raises(NotConvergedError, match="MAX_ITER"):
        solve_cone(*program.arguments, cones, max_iter=2)


def test_float32() -> None:
    cones, n = KINDS["semidefinite"]
    program = known(cones, n)
    inputs = leaves(*(part.float() for part in program.arguments))
    found = solve_cone(*inputs, cones)
    assert {part.dtype for part in (*found[:3], *found[4:7])} == {torch.float32}
    torch.testing.assert_close(found.x.double(), program.x, atol=1e-4, rtol=1e-4)
    assert all(slope.dtype == torch.float32 for slope in grad(found.x.sum(), inputs))


def test_redundant_equations_have_the_derivative_of_x_and_multipliers_of_least_norm() -> None:
    q = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    A, P = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    once = solve_cone(P, q, A, torch.ones(1).double(), Cones(zero=1), solver="CLARABEL")
    twice = solve_cone(P, q, A.expand(2, 3), torch.ones(2).double(), Cones(zero=2), solver="CLARABEL")
    torch.testing.assert_close(twice.x, once.x, atol=1e-8, rtol=1e-8)
    for i in range(3):
        torch.testing.assert_close(*(grad(x[i], q, retain_graph=True)[0] for x in (twice.x, once.x)), atol=1e-7, rtol=1e-7)
    single, double = (grad(y.sum(), q)[0] for y in (once.y, twice.y))
    torch.testing.assert_close(double, single, atol=1e-6, rtol=1e-6)


def test_a_solution_that_is_not_unique_has_a_derivative_where_nobody_looks_at_its_freedom() -> None:
    A = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).double()
    (b,) = leaves(torch.tensor([1.0, 0.0, 0.0]).double())
    arguments = (None, torch.ones(2).double(), A, b, Cones(zero=1, nonneg=2))
    x = solve_cone(*arguments, solver="CLARABEL").x
    torch.testing.assert_close(grad(x.sum(), b, retain_graph=True)[0], torch.tensor([1.0, 0.0, 0.0]).double(), atol=1e-7, rtol=0)
    with pytest.raises(SingularError):
        grad(x[0], b)
    x = solve_cone(*arguments, solver="CLARABEL", on_failure="warn").x
    with pytest.warns(ConvergenceWarning):
        (slope,) = grad(x[0], b)
    assert bool(slope.isfinite().all())
    assert float(slope.norm()) < 10


def test_the_semidefinite_gradient_that_another_path_gets_wrong() -> None:
    # ⟨X, C⟩ is least at the eigenvector of the smallest eigenvalue: its projector has a derivative in closed form.
    draw = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (C,) = leaves(draw + draw.mT)
    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = torch.tril_indices(6, 6).flip(0)
    scale = torch.where(rows == columns, torch.tensor(1.0).double(), torch.tensor(2.0).double().sqrt())
    A = torch.cat([(rows == columns).double().unsqueeze(0), -torch.diag(scale)])
    b = torch.cat([torch.ones(1), torch.zeros(21)]).double()
    q = torch.where(rows == columns, 1.0, 2.0) * C[rows, columns]
    x = solve_cone(None, q, A, b, Cones(zero=1, psd=(6,))).x
    X = torch.zeros(6, 6, dtype=torch.float64).index_put((rows, columns), x)
    X = X + X.mT - torch.diag(X.diagonal())
    vector = torch.linalg.eigh((C + C.mT) / 2).eigenvectors[:, 0]
    exact = torch.outer(vector, vector)
    torch.testing.assert_close(X, exact, atol=1e-8, rtol=1e-8)
    found, true = (grad((weights * matrix).sum(), C)[0] for matrix in (X, exact))
    torch.testing.assert_close(found + found.mT, true + true.mT, atol=1e-7, rtol=1e-7)


def test_no_rows() -> None:
    found = solve_cone(2 * torch.eye(2), torch.tensor([2.0, -4.0]), torch.zeros(0, 2), torch.zeros(0), Cones())
    torch.testing.assert_close(found.x, torch.tensor([-1.0, 2.0]))


def test_what_is_refused() -> None:
    q, A, b = torch.ones(2), torch.eye(2), torch.ones(2)
    cones = Cones(nonneg=2)
    with pytest.raises(ShapeError, match="3 rows"):
        solve_cone(None, q, A, b, Cones(soc=(3,)))
    with pytest.raises(ShapeError, match="A must have the shape"):
        solve_cone(None, q, A[:1], b, cones)
    with pytest.raises(ShapeError, match="P must have the shape"):
        solve_cone(A[:1], q, A, b, cones)
    with pytest.raises(ShapeError, match="float64"):
        solve_cone(None, q.double(), A, b, cones)
    with pytest.raises(ShapeError, match="broadcast"):
        solve_cone(None, torch.ones(2, 2), torch.ones(3, 2, 2), b, cones)
    with pytest.raises(ShapeError, match="indices"):
        solve_cone(None, q, (torch.tensor([[5], [0]]), torch.ones(1)), b, cones)
    with pytest.raises(ShapeError, match="shapes"):
        solve_cone(None, q, (torch.tensor([[0], [0]]), torch.ones(3)), b, cones)
    with pytest.raises(ValueError, match="exponent"):
        solve_cone(None, q, torch.ones(3, 2), torch.ones(3), Cones(pow=(1.5,)))
    with pytest.raises(ValueError, match="not known"):
        solve_cone(None, q, A, b, cones, solver="SIMPLEX")
    with pytest.raises(TypeError, match="no setting"):
        solve_cone(None, q, A, b, cones, solver="CLARABEL", solver_args={"nonsense": 1})


def test_a_missing_solver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "clarabel", None)
    with pytest.raises(MissingExtraError, match="pip install clarabel"):
        solve_cone(None, torch.ones(2), -torch.eye(2), torch.ones(2), Cones(nonneg=2), solver="CLARABEL")


def test_nothing_is_printed_or_warned(capfd: pytest.CaptureFixture[str]) -> None:
    cones, n = KINDS["second order"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in SOLVERS:
            solve_cone(*known(cones, n).arguments, cones, solver=solver)
    assert capfd.readouterr() == ("", "")
