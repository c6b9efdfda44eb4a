import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import newton

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, randn, statuses

MODES = [{"dense_limit": 256}, {"dense_limit": 0}]


@pytest.mark.parametrize("mode", MODES)
def test_closed_forms(mode):
    a = torch.tensor([4.0, 9.0, 1e-20, 1e20, 2.0], dtype=D)[:, None]
    solution = newton(lambda x: x**2 - a, torch.ones(5, 1, dtype=D), batch_ndim=1, max_iter=100, **mode)
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x, a.sqrt(), rtol=1e-10, atol=0)
    assert_solved(newton(torch.atan, torch.full((1,), 5.0, dtype=D), **mode))
    A, b = randn(20, 20), randn(20)
    linear = newton(lambda x: x @ A.mT - b, torch.zeros(20, dtype=D), **mode)
    assert_solved(linear, 1e-12)
    torch.testing.assert_close(linear.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    if mode["dense_limit"]:
        assert int(linear.iterations) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("n", [3, 40])
def test_nonlinear_systems(mode, dtype, n):
    A, b = randn(n, n, dtype=dtype) / n**0.5, randn(3, n, dtype=dtype)

    def f(x):
        return x + 0.9 * torch.tanh(x @ A.mT) + x**3 - b

    solution = newton(f, torch.zeros(3, n, dtype=dtype), batch_ndim=1, **mode)
    assert_solved(solution, 1e-12 if dtype == D else 1e-6)
    assert solution.x.dtype == dtype
    torch.testing.assert_close(f(solution.x), torch.zeros_like(b), atol=1e-10 if dtype == D else 1e-4, rtol=0)


def test_large_systems_go_matrix_free():
    def f(u):
        left, right = torch.nn.functional.pad(u, (1, 0))[..., :-1], torch.nn.functional.pad(u, (0, 1))[..., 1:]
        return 3 * u - left - right - torch.exp(-u)

    solution = newton(f, torch.zeros(300, dtype=D))
    assert_solved(solution, 1e-12)
    assert int(solution.iterations) <= 6
    torch.testing.assert_close(solution.x, newton(f, torch.zeros(300, dtype=D), dense_limit=300).x)


def test_units_of_equations_and_unknowns_do_not_matter():
    scale, weight = torch.tensor([1e-8, 1.0, 1e8], dtype=D), torch.tensor([1e6, 1e-6, 1.0], dtype=D)

    def f(x):
        return torch.stack([x[0] + x[1] - 3, x[0] * x[1] - 2, x[2] ** 3 - x[0] - 7])

    plain = newton(f, torch.tensor([0.0, 4.0, 1.0], dtype=D))
    scaled = newton(lambda x: weight * f(x / scale), torch.tensor([0.0, 4.0, 1.0], dtype=D) * scale)
    assert_solved(plain, 1e-12)
    assert_solved(scaled, 1e-12)
    torch.testing.assert_close(plain.x, torch.tensor([1.0, 2.0, 2.0], dtype=D))
    torch.testing.assert_close(scaled.x / scale, plain.x, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=30)
def test_monotone_equations_are_always_solved(n, seed):
    A, b = randn(n, n, seed=seed), 3 * randn(n, seed=seed + 1)
    A = A @ A.mT + torch.eye(n, dtype=D)

    def f(x):
        return x @ A + torch.asinh(x) - b

    solution = newton(f, 5 * randn(n, seed=seed + 2))
    assert_solved(solution, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_rows_fail_alone(mode):
    a = torch.tensor([4.0, -1.0, torch.nan, 9.0], dtype=D)[:, None]
    solution = newton(lambda x: x**2 - a, torch.ones(4, 1, dtype=D), batch_ndim=1, **mode)
    assert statuses(solution)[0] == statuses(solution)[3] == Status.SOLVED
    assert statuses(solution)[1] in (Status.SINGULAR, Status.NUMERICAL_ERROR, Status.MAX_ITER)
    assert statuses(solution)[2] == Status.NUMERICAL_ERROR
    assert torch.isfinite(solution.x).all()
    # The best iterate of a row without a root is near the minimum of |F|.
    assert abs(float(solution.x[1])) < 1.0


def test_singular_jacobians():
    inconsistent = newton(lambda x: torch.stack([x[0] + x[1] - 1, 2 * x[0] + 2 * x[1] - 3]), torch.ones(2, dtype=D))
    assert statuses(inconsistent) == [Status.SINGULAR]
    flat = newton(lambda x: x**2 - 4, torch.zeros(2, 1, dtype=D), batch_ndim=1)
    assert statuses(flat) == [Status.SINGULAR] * 2
    assert Status.SOLVED not in statuses(newton(lambda x: torch.exp(-x), torch.zeros(1, dtype=D)))


@pytest.mark.parametrize("mode", MODES)
def test_batch_is_a_loop(mode):
    b, x0 = randn(4, 5) * torch.tensor([0.1, 1.0, 10.0, 0.0], dtype=D)[:, None], torch.zeros(4, 5, dtype=D)
    assert_batch_is_loop(lambda b, x0: newton(lambda x: torch.sinh(x) + x.flip(-1) - b, x0, batch_ndim=1, **mode), b, x0, atol=1e-9)


def test_pytrees_scalars_and_limits():
    def f(tree):
        return {"a": tree["a"] - 1, "b": tree["b"] ** 2 - tree["a"].sum(-1)[..., None, None], "n": tree["n"]}

    solution = newton(f, {"a": torch.zeros(2, 3, dtype=D), "b": torch.ones(2, 1, 2, dtype=D), "n": None}, batch_ndim=1)
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x["b"], torch.full((2, 1, 2), 3**0.5, dtype=D))
    scalar = newton(lambda x: x**3 - 8, torch.tensor(1.0))
    assert scalar.x.shape == scalar.status.shape == ()
    assert scalar.x.item() == pytest.approx(2.0, abs=1e-5)
    exact = newton(lambda x: x**2 - 4, torch.tensor(2.0, dtype=D))
    assert_solved(exact)
    assert int(exact.iterations) == 0
    for limit in (0, 1):
        assert statuses(newton(lambda x: x**2 - 4, torch.tensor(1.0, dtype=D), max_iter=limit)) == [Status.MAX_ITER]
    assert newton(lambda x: x**2 - 4, torch.zeros(0, 3), batch_ndim=1).x.shape == (0, 3)


def test_solutions_at_zero():
    assert_solved(newton(torch.sinh, torch.ones(3, dtype=D)))
    assert_solved(newton(torch.sinh, torch.zeros(3, dtype=D)))
    # A zero that is a difference of ones cannot be met better than their rounding.
    assert_solved(newton(lambda x: (1 + torch.sinh(x)) - 1.0, torch.ones(3, dtype=D)))


@pytest.mark.parametrize("mode", MODES)
def test_inside_a_checkpoint_and_under_a_dual_level(mode):
    def f(a):
        return newton(lambda x: x**2 - a.detach(), torch.ones(3, dtype=D), **mode).x * a

    a = torch.tensor([1.0, 4.0, 9.0], dtype=D, requires_grad=True)
    y = checkpoint(f, a, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], a.detach().sqrt())
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(newton(lambda x: x**2 - a.detach(), torch.ones(3, dtype=D), **mode).x, a.detach().sqrt())


@pytest.mark.parametrize("mode", MODES)
def test_no_graph_no_mutation(mode):
    assert_no_graph_no_mutation(lambda x0, b: newton(lambda x: torch.sinh(x) - b, x0, **mode), randn(3), randn(3, seed=1))


def test_bad_arguments():
    with pytest.raises(ValueError, match="tol"):
        newton(torch.sinh, torch.zeros(3), tol=float("nan"))
    with pytest.raises(ValueError, match="max_iter"):
        newton(torch.sinh, torch.zeros(3), max_iter=-1)
    with pytest.raises(ShapeError):
        newton(lambda x: x[:2], torch.zeros(3))
    with pytest.raises(ShapeError, match="batch_ndim"):
        newton(lambda x: x, {"a": torch.zeros(2), "b": torch.zeros(3)}, batch_ndim=1)


def test_conjugate_gradients_take_the_step_of_a_convex_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 60, generator=generator, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        return torch.tanh(x @ A.mT + b) @ A + 0.1 * x

    start = torch.zeros(5, 40, dtype=torch.float64)
    found = newton(gradient, start, batch_ndim=1, symmetric=True, dense_limit=0)
    dense = newton(gradient, start, batch_ndim=1)
    assert (found.status == Status.SOLVED).all()
    torch.testing.assert_close(found.x, dense.x, rtol=1e-9, atol=1e-9)
