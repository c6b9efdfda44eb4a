import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import gradient_descent, mirror_descent, projected_gradient, proximal_gradient

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, quadratic, randn, spd, statuses


def soft(threshold):
    return lambda x, s: x.sign() * (x.abs() - threshold * s).clamp(min=0)


def project_simplex(x):
    u = x.sort(dim=-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    tau = (u.cumsum(-1) - 1) / k
    return (x - tau.gather(-1, (u > tau).sum(-1, keepdim=True) - 1)).clamp(min=0)


@pytest.mark.parametrize("acceleration", [False, True])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_gradient_descent_on_quadratics(acceleration, dtype):
    P, b = spd(20, 10.0, 3, dtype=dtype), randn(3, 20, dtype=dtype)
    solution = gradient_descent(quadratic(P, b), torch.zeros(3, 20, dtype=dtype), batch_ndim=1, acceleration=acceleration)
    assert_solved(solution, 1e-12 if dtype == D else 1e-6)
    reference = torch.linalg.solve(P, b[..., None]).squeeze(-1)
    torch.testing.assert_close(solution.x, reference, rtol=0, atol=1e-9 if dtype == D else 2e-3)


def test_acceleration_pays_on_ill_conditioned_quadratics():
    objective = quadratic(spd(30, 100.0), randn(30))
    plain, fast = (gradient_descent(objective, torch.zeros(30, dtype=D), acceleration=on, tol=1e-8) for on in (False, True))
    assert_solved(fast)
    assert int(fast.iterations) < int(plain.iterations) / 2


@pytest.mark.parametrize("acceleration", [False, True])
def test_the_stepsize_grows_where_curvature_falls(acceleration):
    starts = torch.tensor([[10.0], [1.0], [-5.0]], dtype=D)
    solution = gradient_descent(lambda x: (torch.exp(x) - x).sum(-1), starts, batch_ndim=1, acceleration=acceleration)
    assert_solved(solution)
    torch.testing.assert_close(solution.x, torch.zeros_like(starts), atol=1e-8, rtol=0)
    assert int(solution.iterations.max()) < 500


@pytest.mark.parametrize("acceleration", [False, True])
def test_lasso_satisfies_its_optimality_conditions_exactly_at_zeros(acceleration):
    P, b = spd(25, 20.0, 2), randn(2, 25)
    solution = proximal_gradient(quadratic(P, b), soft(0.5), torch.zeros(2, 25, dtype=D), batch_ndim=1, acceleration=acceleration)
    assert_solved(solution, 1e-12)
    x, gradient = solution.x, (P @ solution.x[..., None]).squeeze(-1) - b
    assert (x == 0).any()
    torch.testing.assert_close(gradient[x != 0], -0.5 * x[x != 0].sign(), atol=1e-9, rtol=0)
    assert (gradient[x == 0].abs() <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("acceleration", [False, True])
def test_box_constraints_are_met_and_optimal(acceleration):
    P, b = spd(15, 50.0), 3 * randn(15)
    solution = projected_gradient(quadratic(P, b), lambda x: x.clamp(-1, 1), torch.full((15,), 3.0, dtype=D), acceleration=acceleration)
    assert_solved(solution, 1e-12)
    x, gradient = solution.x, P @ solution.x - b
    assert (x.abs() <= 1).all()
    torch.testing.assert_close((x - gradient).clamp(-1, 1), x, atol=1e-9, rtol=0)


@given(st.integers(2, 12), st.integers(0, 10_000))
@settings(max_examples=4)  # where it is slow it takes seconds
def test_mirror_descent_agrees_with_projected_gradient_on_the_simplex(n, seed):
    target = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) / n * 2 + 0.02
    start = torch.full((n,), 1 / n, dtype=D)

    def objective(x):
        return ((x - target) ** 2).sum()

    mirror, projected = mirror_descent(objective, start), projected_gradient(objective, project_simplex, start)
    assert_solved(projected)
    # A coordinate that tends to zero without a push (a degenerate solution) does so slowly; the objective does not show it.
    assert float(objective(mirror.x) - objective(projected.x)) < 1e-9
    assert float(mirror.x.sum()) == pytest.approx(1.0)
    assert (mirror.x >= 0).all()


def test_mirror_descent_with_a_projection_of_its_own():
    # Nonnegative matrices with row sums 1: the Kullback–Leibler projection divides each row.
    cost = randn(3, 4)
    weights = torch.softmax(-cost / 0.5, -1)
    solution = mirror_descent(
        lambda x: (cost * x).sum() + 0.5 * torch.xlogy(x, x).sum(),
        torch.full((3, 4), 0.25, dtype=D),
        projection=lambda x: x / x.sum(-1, keepdim=True),
    )
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x, weights, rtol=1e-9, atol=1e-9)


def test_degenerate_scales():
    for scale in (1e-8, 1e8):
        solution = gradient_descent(
            lambda x, s=scale: ((x / s - 1) ** 2 * torch.tensor([1.0, 4.0], dtype=D)).sum(), torch.zeros(2, dtype=D)
        )
        assert_solved(solution, 1e-12)
        torch.testing.assert_close(solution.x / scale, torch.ones(2, dtype=D))
    assert_solved(gradient_descent(lambda x: (x**2).sum(), torch.zeros(3, dtype=D)))
    assert_solved(gradient_descent(lambda x: 1e6 + (x**2).sum(), torch.ones(3, dtype=D)))


def test_rows_fail_alone():
    factor = torch.tensor([1.0, torch.nan, -1.0, 3.0], dtype=D)
    solution = gradient_descent(lambda x: factor * ((x - 2) ** 2).sum(-1), torch.ones(4, 2, dtype=D), batch_ndim=1, max_iter=300)
    assert statuses(solution)[:2] == [Status.SOLVED, Status.NUMERICAL_ERROR]
    assert statuses(solution)[2] != Status.SOLVED
    assert statuses(solution)[3] == Status.SOLVED
    assert torch.isfinite(solution.x).all()
    torch.testing.assert_close(solution.x[[0, 3]], torch.full((2, 2), 2.0, dtype=D))


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_a_kink_is_not_a_minimum_of_a_smooth_function(dtype):
    # The line search can only shorten the steps: that must not pass for convergence.
    solution = gradient_descent(lambda x: ((x - 0.3).abs() + 0.3 * x).sum(), torch.ones(2, dtype=dtype), max_iter=2000)
    assert Status.SOLVED not in statuses(solution)


def test_fixed_stepsizes_converge_diverge_and_limit():
    def objective(x):
        return (x**2).sum(-1)

    start = torch.ones(2, 3, dtype=D)
    assert_solved(gradient_descent(objective, start, batch_ndim=1, stepsize=0.3))
    diverged = gradient_descent(objective, start, batch_ndim=1, stepsize=2.0)
    assert statuses(diverged) == [Status.NUMERICAL_ERROR] * 2
    assert torch.isfinite(diverged.x).all()
    short = gradient_descent(objective, start, batch_ndim=1, stepsize=0.3, max_iter=4)
    assert statuses(short) == [Status.MAX_ITER] * 2
    assert short.iterations.tolist() == [4, 4]
    assert statuses(gradient_descent(objective, start, batch_ndim=1, max_iter=0)) == [Status.MAX_ITER] * 2


@pytest.mark.parametrize("acceleration", [False, True])
def test_batch_is_a_loop(acceleration):
    P, b, x0 = spd(6, 20.0, 4), randn(4, 6) * torch.tensor([1.0, 1e-6, 1e6, 0.0], dtype=D)[:, None], torch.zeros(4, 6, dtype=D)

    def solve(P, b, x0):
        return proximal_gradient(quadratic(P, b), soft(0.01), x0, batch_ndim=1, acceleration=acceleration)

    assert_batch_is_loop(solve, P, b, x0, atol=1e-8)


def test_pytrees_and_what_prox_receives():
    def objective(tree):
        return ((tree["a"] - 1) ** 2).sum((-1, -2)) + (tree["b"] - 3) ** 2

    def prox(tree, s):
        return {name: soft(1.0)(tree[name], s[name]) for name in tree}

    start = {"a": torch.zeros(2, 3, 1), "b": torch.zeros(2)}
    solution = proximal_gradient(objective, prox, start, batch_ndim=1)
    assert_solved(solution, 1e-6)
    torch.testing.assert_close(solution.x, {"a": torch.full((2, 3, 1), 0.5), "b": torch.full((2,), 2.5)})
    shapes = set()

    def spy(x, s):
        shapes.add(tuple(s.shape))
        return soft(1.0)(x, s)

    proximal_gradient(lambda x: ((x - 1) ** 2).sum((-1, -2)), spy, torch.zeros(2, 3, 1), batch_ndim=1)
    assert shapes == {(2, 1, 1)}
    shapes.clear()
    proximal_gradient(lambda x: ((x - 1) ** 2).sum(), spy, torch.zeros(2, 3))
    assert shapes == {()}


def test_no_graph_no_mutation():
    for solver in (gradient_descent, mirror_descent):
        assert_no_graph_no_mutation(
            lambda x0, b, solver=solver: solver(lambda x: ((x - b) ** 2).sum(), x0), randn(3).abs(), randn(3, seed=1)
        )
    assert_no_graph_no_mutation(
        lambda x0, b: projected_gradient(lambda x: ((x - b) ** 2).sum(), lambda x: x.clamp(0, 1), x0), randn(3), randn(3, seed=1)
    )


def test_bad_arguments():
    x0 = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="one value per problem"):
        gradient_descent(lambda x: x.sum(), x0, batch_ndim=1)
    with pytest.raises(ShapeError, match="one value per problem"):
        gradient_descent(lambda x: x, x0)
    with pytest.raises(ValueError, match="stepsize"):
        gradient_descent(lambda x: x.sum(), x0, stepsize=0.0)
    with pytest.raises(ValueError, match="tol"):
        gradient_descent(lambda x: x.sum(), x0, tol=-1.0)
