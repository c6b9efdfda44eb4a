"""The Function itself: how many solves and factorizations a derivative costs, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from difflayers.implicit.function import ImplicitFunction, Linearized, Problem, nan_where_failed, solve_implicitly
from difflayers.implicit.methods import LinearMethod
from difflayers.solution import Solution, Status
from difflayers.solvers import linear, newton
from tests.reference import newton_root, relative_error

P = torch.tensor([0.4, -0.7], dtype=torch.float64)
ZERO = torch.zeros(2, dtype=torch.float64)


def residual(x: Tensor, p: Tensor) -> Tensor:
    return x + 0.3 * torch.sin(x.flip(-1) * p) - torch.cos(p)


def find(function, x0: Tensor, batch_ndim: int) -> Solution:
    return newton(function, x0, batch_ndim=batch_ndim)


def make(linear: LinearMethod | None = None, **options: object) -> Problem:
    return Problem(residual, find, linear or LinearMethod(), **options)


def layer(p: Tensor) -> Tensor:
    return solve_implicitly(make(), torch.zeros_like(p), (p,)).x


def exact(p: Tensor) -> Tensor:
    return newton_root(residual, torch.zeros_like(p), p)


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))]
)
def test_derivatives(transform) -> None:
    assert relative_error(transform(layer)(P), transform(exact)(P)) < 1e-9


def test_tangents_of_two_levels() -> None:
    # Outer tangents survive the rule, in which forward mode is off by default.
    def slope(p: Tensor) -> Tensor:
        return jvp(layer, (p,), (torch.ones_like(p),))[1]

    assert relative_error(slope(P), jacrev(exact)(P).sum(1)) < 1e-9
    assert relative_error(jvp(slope, (P,), (torch.ones_like(P),))[1], hessian(exact)(P).sum((1, 2))) < 1e-9
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(P, torch.ones_like(P)))).tangent
    assert torch.equal(tangent, slope(P))


class Counted(Problem):
    """Counts the factorizations."""

    def __init__(self) -> None:
        super().__init__(residual, find, LinearMethod("lu"))
        self.factorizations = 0

    def matrix(self, point) -> Tensor:
        self.factorizations += 1
        return super().matrix(point)


def test_one_factorization_serves_all_orders() -> None:
    problem = Counted()
    p = P.clone().requires_grad_()
    x = solve_implicitly(problem, ZERO, (p,)).x
    assert problem.factorizations == 0
    (slope,) = torch.autograd.grad(x.sum(), p, create_graph=True)
    assert problem.factorizations == 1
    (second,) = torch.autograd.grad(slope.sum(), p, create_graph=True)
    torch.autograd.grad(second.sum(), p)
    assert problem.factorizations == 1


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_a_jacobian_solves_all_its_columns_at_once(transform, monkeypatch) -> None:
    root, shapes = exact(P), []

    def known(function, x0: Tensor, batch_ndim: int) -> Solution:
        return Solution(root, *(torch.zeros((), dtype=torch.int64),) * 3)

    problem = Problem(residual, known, LinearMethod("lu"))
    solve = linear.DenseFactor.solve

    def watched(self, rhs: Tensor, **options: bool) -> Solution:
        shapes.append(tuple(rhs.shape))
        return solve(self, rhs, **options)

    monkeypatch.setattr(linear.DenseFactor, "solve", watched)
    transform(lambda p: solve_implicitly(problem, ZERO, (p,)).x)(P)
    assert shapes == [(2, 2)]


def test_the_cost_of_an_order_is_linear(monkeypatch) -> None:
    solves = 0
    solve = linear.DenseFactor.solve

    def watched(self, rhs: Tensor, **options: bool) -> Solution:
        nonlocal solves
        solves += 1
        return solve(self, rhs, **options)

    monkeypatch.setattr(linear.DenseFactor, "solve", watched)
    counts = []
    p = P.clone().requires_grad_()
    value = solve_implicitly(make(), ZERO, (p,)).x.sum()
    for _ in range(3):
        before = solves
        (slope,) = torch.autograd.grad(value, p, create_graph=True)
        counts.append(solves - before)
        value = slope.sum()
    assert counts[0] == 1
    assert counts[2] <= 8  # the chain rule's own terms, not a solve within a solve


def test_linearization_of_a_linearization_is_the_operator_again() -> None:
    problem = make()
    adjoint = problem.linearized(transpose=True)
    assert (adjoint.base, adjoint.transpose) == (problem, True)
    again = adjoint.linearized(transpose=True)
    assert isinstance(again, Linearized)
    assert (again.base, again.transpose) == (problem, False)


@pytest.mark.parametrize("method", ["lu", "gmres", "normal_cg", "bicgstab"])
@pytest.mark.parametrize("transpose", [False, True])
def test_operator_matrix_and_solve_agree(method: str, transpose: bool) -> None:
    problem = make(LinearMethod(method), batch_ndim=1)
    p = torch.stack([P, -P, 2 * P])
    point = (p.sin(), p)
    matrix = problem.matrix(point)
    assert matrix.shape == (3, 2, 2)
    matrix = matrix.mT if transpose else matrix
    g = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    assert relative_error(problem.operator(point, transpose)(g), (matrix @ g.unsqueeze(-1)).squeeze(-1)) < 1e-12
    columns = torch.stack([g, g + 1])
    for rhs, many in ((g, False), (columns, True)):
        found = problem.solve_linear(point, rhs, transpose, many)
        assert found.status.shape == rhs.shape[:-1]
        assert relative_error(found.x, (torch.linalg.inv(matrix) @ rhs.unsqueeze(-1)).squeeze(-1)) < 1e-7


def test_pullback_and_pushforward_are_adjoint() -> None:
    problem, x, u, t = make(), ZERO + 0.3, P.exp(), P.sin()
    (pulled,) = problem.pullback(x, (P,), (0,), u)
    pushed = problem.pushforward(x, (P,), (0,), (t,))
    assert abs((pulled * t).sum() - (pushed * u).sum()) < 1e-14


def test_arguments_that_are_no_tensors_and_tensors_that_do_not_move() -> None:
    problem = Problem(lambda x, p, power, which: x - p[which] ** power, find, LinearMethod())
    p = P.abs().requires_grad_()
    found = solve_implicitly(problem, ZERO, (p, 2, torch.tensor([1, 0])))
    assert torch.allclose(torch.autograd.grad(found.x.sum(), p)[0], 2 * p)
    assert not solve_implicitly(problem, ZERO, (p.detach(), 2, torch.tensor([1, 0]))).x.requires_grad
    assert not found.status.requires_grad
    assert not found.residual.requires_grad


def test_an_undefined_cotangent_costs_nothing() -> None:
    class Never(Problem):
        def solve_linear(self, *_: object) -> Solution:
            raise AssertionError("no derivative was asked for")

    p = P.clone().requires_grad_()
    found = solve_implicitly(Never(residual, find, LinearMethod()), ZERO, (p,))
    (slope,) = torch.autograd.grad((found.x.detach() * p).sum(), p)
    assert torch.equal(slope, found.x)


def test_a_row_that_is_not_finite_goes_back_to_its_start() -> None:
    def lost(function, x0: Tensor, batch_ndim: int) -> Solution:
        x = torch.stack([x0[0] + 1, x0[1] * torch.nan])
        return Solution(x, torch.tensor([0, 5]), x[:, 0], torch.zeros(2, dtype=torch.int64))

    start = torch.ones(2, 2)
    found = solve_implicitly(Problem(lambda x: x, lost, LinearMethod(), batch_ndim=1), start, ())
    assert found.x.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert nan_where_failed(found, "nan").isnan().all(1).tolist() == [False, True]
    assert nan_where_failed(found, "warn") is found.x


def test_empty_unknowns_and_empty_batches() -> None:
    for shape in ((0,), (0, 2), (3, 0)):
        found = solve_implicitly(make(batch_ndim=len(shape) - 1), torch.zeros(shape), (torch.zeros(shape),))
        assert found.x.shape == shape
        assert found.status.shape == shape[:-1]
        assert (found.status == Status.SOLVED).all()


def test_vmap_sees_plain_tensors() -> None:
    seen = []

    def watched(function, x0: Tensor, batch_ndim: int) -> Solution:
        seen.append((type(x0), tuple(x0.shape), batch_ndim, torch._C._functorch.is_batchedtensor(function(x0))))
        return newton(function, x0, batch_ndim=batch_ndim)

    points = torch.stack([P, 2 * P, 3 * P])
    inner = lambda p: solve_implicitly(Problem(residual, watched, LinearMethod()), ZERO, (p,)).x  # noqa: E731
    vmap(vmap(grad(lambda p: inner(p).sum())))(torch.stack([points, points + 1]))
    assert seen == [(Tensor, (2, 3, 2), 2, False)]


def test_a_shared_argument_is_not_copied_along_a_batch() -> None:
    shapes = []

    def two(x: Tensor, p: Tensor, shared: Tensor) -> Tensor:
        shapes.append(tuple(shared.shape))
        return residual(x, p) + shared.sum()

    problem = Problem(two, find, LinearMethod())
    shared = torch.ones(5, dtype=torch.float64)
    vmap(lambda p: solve_implicitly(problem, ZERO, (p, shared)).x)(torch.stack([P, 2 * P]))
    assert set(shapes) == {(5,)}


def test_unknown_linear_solver() -> None:
    with pytest.raises(ValueError, match=r"'qr'.*lu, cholesky"):
        LinearMethod("qr")


def test_apply_returns_the_diagnostics() -> None:
    x, status, size, iterations = ImplicitFunction.apply(make(), ZERO, P)
    assert relative_error(x, exact(P)) < 1e-9
    assert (status.shape, size.shape, iterations.shape) == ((), (), ())
