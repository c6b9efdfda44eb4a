"""Linear systems as layers: every method with a matrix and with a function, batched, shared, nested and singular."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vjp, vmap

from difflayers.errors import ConvergenceWarning, NotConvergedError, ShapeError, SingularError
from difflayers.implicit import linear_solve
from difflayers.solution import Status
from tests.reference import relative_error

METHODS = ("auto", "lu", "cholesky", "cg", "normal_cg", "gmres", "bicgstab", "neumann")
DEFINITE = ("cholesky", "cg")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(method: str, *batch: int, n: int = 3, seed: int = 0, spread: float = 0.12) -> Tensor:
    """I plus a little, which every method takes; symmetric for those that need it."""
    A = torch.eye(n, dtype=torch.float64) + spread * numbers(*batch, n, n, seed=seed)
    return (A + A.mT) / 2 if method in DEFINITE else A


def times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def exact(A: Tensor, b: Tensor) -> Tensor:
    return times(torch.linalg.inv(A), b)


def solve(form: str, method: str, A: Tensor, b: Tensor, **options: object) -> Tensor:
    if form == "matrix":
        return linear_solve(A, b, method=method, **options).x
    return linear_solve(lambda u: times(A, u), b, method=method, batch_ndim=b.dim() - 1, **options).x


ALL = pytest.mark.parametrize(("form", "method"), list(itertools.product(("matrix", "function"), METHODS)))


@ALL
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), batch=st.integers(0, 2))
def test_solves_what_is_solvable(form: str, method: str, seed: int, n: int, batch: int) -> None:
    shape = (2,) * batch
    A, b = matrix(method, *shape, n=n, seed=seed, spread=0.1), numbers(*shape, n, seed=seed + 1)
    x = solve(form, method, A, b)
    assert (b - times(A, x)).norm() < 1e-7 * b.norm()


@ALL
def test_derivatives_treat_every_entry_as_free(form: str, method: str) -> None:
    # At a symmetric A where the method needs it; the gradient is not symmetric all the same.
    A, b = matrix(method), numbers(3, seed=2)

    def loss(A: Tensor, b: Tensor, of) -> Tensor:
        x = of(A, b)
        return (torch.tensor([1.0, -2.0, 0.5]) * (x + x**2)).sum()

    def ours(A: Tensor, b: Tensor) -> Tensor:
        return loss(A, b, lambda A, b: solve(form, method, A, b, symmetric=method in DEFINITE))

    def reference(A: Tensor, b: Tensor) -> Tensor:
        return loss(A, b, exact)

    for value, true in zip(grad(ours, (0, 1))(A, b), grad(reference, (0, 1))(A, b), strict=True):
        assert relative_error(value, true) < 1e-7
    slope = grad(ours)(A, b)
    assert (slope - slope.mT).abs().max() > 1e-2
    rows, true_rows = hessian(ours, (0, 1))(A, b), hessian(reference, (0, 1))(A, b)
    for i, j in itertools.product(range(2), range(2)):
        assert relative_error(rows[i][j], true_rows[i][j]) < 1e-6


@ALL
def test_batch_equals_loop(form: str, method: str) -> None:
    A, b = matrix(method, 2, 3), numbers(2, 3, 3, seed=1)
    leaves = A.clone().requires_grad_(), b.clone().requires_grad_()
    x = solve(form, method, *leaves)
    weights = numbers(2, 3, 3, seed=5)
    slopes = torch.autograd.grad((weights * x).sum(), leaves)
    for r, c in itertools.product(range(2), range(3)):
        assert relative_error(x[r, c], exact(A[r, c], b[r, c])) < 1e-7
        pulled = vjp(lambda A, b: solve(form, method, A, b), A[r, c], b[r, c])[1](weights[r, c])
        for slope, one in zip(slopes, pulled, strict=True):
            assert relative_error(slope[r, c], one) < 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("of_A", "of_b"), [((), (4,)), ((), (2, 4)), ((4,), (2, 4)), ((4,), ()), ((2, 1), (4,)), ((1, 4), (2, 1))])
def test_shapes_broadcast_and_shared_gradients_add_up(method: str, of_A: tuple[int, ...], of_b: tuple[int, ...]) -> None:
    A, b = matrix(method, *of_A).requires_grad_(), numbers(*of_b, 3, seed=1).requires_grad_()
    found = linear_solve(A, b, method=method)
    true = exact(A, b)
    assert found.status.shape == found.residual.shape == found.x.shape[:-1] == torch.broadcast_shapes(of_A, of_b)
    assert relative_error(found.x, true) < 1e-7
    weights = numbers(*true.shape, seed=3)
    for slope, one in zip(
        torch.autograd.grad((weights * found.x).sum(), (A, b)), torch.autograd.grad((weights * true).sum(), (A, b)), strict=True
    ):
        assert relative_error(slope, one) < 1e-7


@pytest.mark.parametrize("form", ["matrix", "function"])
@pytest.mark.parametrize("method", ["lu", "cholesky", "cg", "gmres", "neumann"])
def test_nested_vmap_over_the_matrix_and_then_the_right_hand_side(form: str, method: str) -> None:
    # torch.linalg.solve is silently wrong here (torch 2.13).
    A, b = matrix(method, 2), numbers(3, 3, seed=1)
    inverse = torch.linalg.inv(A)
    assert relative_error(vmap(lambda A: vmap(lambda b: solve(form, method, A, b))(b))(A), torch.einsum("kij,lj->kli", inverse, b)) < 1e-7
    assert relative_error(vmap(lambda b: vmap(lambda A: solve(form, method, A, b))(A))(b), torch.einsum("kij,lj->lki", inverse, b)) < 1e-7
    jacobians = vmap(lambda A: vmap(jacfwd(lambda b: solve(form, method, A, b)))(b))(A)
    assert relative_error(jacobians, inverse.unsqueeze(1).expand(2, 3, 3, 3)) < 1e-7
    slopes = vmap(lambda A: vmap(jacrev(lambda A, b: solve(form, method, A, b)), (None, 0))(A, b))(A)
    loop = torch.stack([torch.stack([jacrev(exact)(one, rhs) for rhs in b]) for one in A])
    assert relative_error(slopes, loop) < 1e-6


def test_function_of_a_structure() -> None:
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    b = {"level": torch.tensor(1.0, dtype=torch.float64), "slope": numbers(2, 2), "count": torch.tensor(3)}

    def matvec(u):
        return {"level": 2 * u["level"] + c * u["slope"].sum(), "slope": u["slope"] + c * u["level"], "count": u["count"]}

    found = linear_solve(matvec, b, method="gmres")
    assert found.x["count"] == 3
    back = matvec(found.x)
    assert torch.allclose(back["level"], b["level"])
    assert torch.allclose(back["slope"], b["slope"])
    # (2 − 4c²) level = 1 − c Σ slope.
    (slope,) = torch.autograd.grad(found.x["level"], c)
    total, value = b["slope"].sum(), 0.3
    denominator = 2 - 4 * value**2
    assert abs(slope - (-total / denominator + (1 - value * total) * 8 * value / denominator**2)) < 1e-8


def hard(n: int = 40) -> Tensor:
    rotation = torch.linalg.qr(numbers(n, n, seed=4)).Q
    return (rotation * torch.logspace(0, 4, n, dtype=torch.float64)) @ rotation.mT


@pytest.mark.parametrize("method", ["cg", "gmres", "bicgstab"])
def test_preconditioner_saves_iterations_and_changes_nothing(method: str) -> None:
    A = hard()
    inverse = torch.linalg.inv(A + 0.01 * torch.eye(40, dtype=torch.float64))
    b = numbers(40, seed=1).requires_grad_()
    plain = linear_solve(A, b, method=method, symmetric=True, on_failure="warn", max_iter=400)
    helped = linear_solve(A, b, method=method, symmetric=True, preconditioner=lambda r: r @ inverse.mT)
    assert helped.status == Status.SOLVED
    assert helped.iterations < plain.iterations / 4
    assert relative_error(helped.x, exact(A, b)) < 1e-6
    assert relative_error(torch.autograd.grad(helped.x.sum(), b)[0], torch.linalg.inv(A).sum(0)) < 1e-6


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_preconditioner_is_transposed_for_the_adjoint(method: str) -> None:
    A = matrix(method, n=4) @ torch.diag(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64))
    inverse = torch.linalg.inv(A)
    b = numbers(4, seed=1).requires_grad_()
    found = linear_solve(A, b, method=method, preconditioner=lambda r: r @ inverse.mT)
    assert relative_error(torch.autograd.grad(found.x.sum(), b)[0], inverse.sum(0)) < 1e-7


def test_truncated_directions_take_a_preconditioner_that_is_not_linear() -> None:
    A, b = hard(), numbers(40, seed=1)
    inverse = torch.linalg.inv(A)

    def learned(r: Tensor) -> Tensor:
        size = r.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        return size * torch.tanh(2 * (r @ inverse.mT) / size) + 1e-3 * r

    found = linear_solve(A, b, method="cg", symmetric=True, preconditioner=learned, truncation=10, max_iter=400)
    assert relative_error(found.x, exact(A, b)) < 1e-5


@pytest.mark.parametrize("form", ["matrix", "function"])
def test_callable_method(form: str) -> None:
    calls = []

    def richardson(matvec, b: Tensor) -> Tensor:
        calls.append(b.shape)
        u = b
        for _ in range(200):
            u = u + 0.9 * (b - matvec(u))
        return u

    A, b = matrix("lu", 2), numbers(2, 3, seed=1)
    leaves = A.clone().requires_grad_(), b.clone().requires_grad_()
    x = solve(form, richardson, *leaves)
    assert relative_error(x, exact(A, b)) < 1e-9
    slopes = torch.autograd.grad(x.sum(), leaves)
    true = torch.autograd.grad(exact(*leaves).sum(), leaves)
    assert relative_error(slopes[0], true[0]) < 1e-9
    assert len(calls) == 2


def test_neumann_terms() -> None:
    A, b = matrix("neumann"), numbers(3, seed=1)
    J = torch.eye(3, dtype=torch.float64) - A
    with pytest.warns(ConvergenceWarning):
        found = linear_solve(A, b, method="neumann", max_iter=3, tol=0.0, on_failure="warn")
    sums = [b + J @ b + J @ J @ b, b + J @ b + J @ J @ b + J @ J @ J @ b]
    assert min(relative_error(found.x, one) for one in sums) < 1e-12
    assert found.status == Status.MAX_ITER


@ALL
def test_zero_right_hand_side(form: str, method: str) -> None:
    A = matrix(method)
    b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = solve(form, method, A, b)
    assert torch.equal(x, torch.zeros_like(x))
    assert relative_error(torch.autograd.grad(x.sum(), b)[0], torch.linalg.inv(A).sum(0)) < 1e-7


SINGULAR = torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=torch.float64)
SINGULAR_SYMMETRIC = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("form", "method"), list(itertools.product(("matrix", "function"), METHODS[:-1])))
def test_singular_element_and_its_neighbours(form: str, method: str, mapped: bool) -> None:
    good = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    A = torch.stack([good, SINGULAR_SYMMETRIC if method in DEFINITE else SINGULAR, 2 * good])
    b = torch.ones(3, 2, dtype=torch.float64)

    def run(A: Tensor, b: Tensor, on_failure: str) -> Tensor:
        if mapped:
            return vmap(lambda A, b: solve(form, method, A, b, on_failure=on_failure))(A, b)
        return solve(form, method, A, b, on_failure=on_failure)

    with pytest.raises(SingularError, match="1 of 3") as caught:
        run(A, b, "raise")
    assert caught.value.indices == [(1,)]
    x, pullback = vjp(lambda A, b: run(A, b, "nan"), A, b)
    assert x[1].isnan().all()
    assert torch.allclose(x[0], torch.tensor([0.5, 0.25], dtype=torch.float64))
    of_A, of_b = pullback(torch.ones_like(x))
    assert not of_A[1].any()
    assert not of_b[1].any()
    assert torch.allclose(of_b[2], torch.tensor([0.25, 0.125], dtype=torch.float64))
    assert torch.allclose(of_A[2], -torch.outer(of_b[2], x[2]))
    with pytest.warns(ConvergenceWarning, match="SINGULAR"):
        x = run(A, b, "warn")
    assert torch.allclose(x[[0, 2]], torch.tensor([[0.5, 0.25], [0.25, 0.125]], dtype=torch.float64))


@ALL
def test_not_a_number(form: str, method: str) -> None:
    A = torch.stack([matrix(method), matrix(method) * torch.nan])
    b = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(NotConvergedError, match="NUMERICAL_ERROR"):
        solve(form, method, A, b)
    x, pullback = vjp(lambda A, b: solve(form, method, A, b, on_failure="nan"), A, b)
    assert x.isnan().any(1).tolist() == [False, True]
    of_A, of_b = pullback(torch.ones_like(x))
    assert of_A[0].isfinite().all()
    assert not of_A[1].any()
    assert not of_b[1].any()


def test_cholesky_leaves_an_indefinite_element_to_lu() -> None:
    A = torch.stack([torch.diag(torch.tensor([1.0, -1.0])), 4 * torch.eye(2)]).double()
    b = torch.ones(2, 2, dtype=torch.float64)
    assert relative_error(linear_solve(A, b, method="cholesky").x, exact(A, b)) < 1e-14


@pytest.mark.parametrize(
    ("A", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), r"\(\*batch, n, n\)"),
        (torch.ones(2), torch.ones(2), r"\(\*batch, n, n\)"),
        (torch.eye(2), torch.ones(3), r"\(2, 2\) and \(3,\)"),
        (torch.eye(2), torch.tensor(1.0), r"\(\*batch, n\)"),
        (torch.eye(2), torch.ones(2, dtype=torch.float64), "dtype"),
        (torch.eye(2, dtype=torch.int64), torch.ones(2), "floating"),
        (torch.eye(2), torch.ones(2, dtype=torch.int64), "floating"),
        (torch.eye(2), {"x": torch.ones(2)}, "function"),
        (torch.eye(2).expand(3, 2, 2), torch.ones(4, 2), r"\(3, 2, 2\) and \(4, 2\)"),
        (lambda u: u[:1], torch.ones(2), r"\(2,\).*got \(1,\)"),
        (lambda u: u.double(), torch.ones(2), "float64"),
        (lambda u: (u, u), torch.ones(2), "structure"),
    ],
)
def test_what_does_not_fit_is_refused(A, b, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        linear_solve(A, b)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nonsense.*choose"):
        linear_solve(torch.eye(2), torch.ones(2), method="nonsense")
    with pytest.raises(ValueError, match=r"nonsense.*choose"):
        linear_solve(torch.eye(2), torch.ones(2), on_failure="nonsense")
