"""Rows assembled from features against the same rows differentiated."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from difflayers.errors import DiffLayersError, ShapeError
from difflayers.pde.least_squares import FitOptions
from difflayers.pde.sharding import Slots
from difflayers.pde.solve_rows import FreeRows, solve_rows
from difflayers.pde.structured import Coupled, Free, LinearRows, PointRows, Structured

D = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def waves(z: dict[str, Tensor], c: Tensor) -> Tensor:
    return z["v"] * torch.sin(z["u"]) + z["u"] ** 2 - c


def decay(z: dict[str, Tensor]) -> Tensor:
    return torch.exp(0.3 * z["p"])


FEATURES = {"u": randn(3, 7, 4), "v": randn(3, 7, 4, seed=1), "idle": randn(3, 7, 4, seed=2)}
POINTS = [
    PointRows(waves, FEATURES, (randn(7, seed=3),), torch.tensor([1.0, 0.5, 0, 2, 1, 1, 1], dtype=D)),
    PointRows(decay, {"p": randn(5, 4, seed=4)}),  # shared by the batch
]
LINEAR = [LinearRows(randn(3, 2, 4, seed=5), randn(3, 2, seed=6)), LinearRows(0.1 * torch.eye(4, dtype=D), torch.zeros(4, dtype=D))]


def system(points: list[PointRows] = POINTS) -> Structured:
    def functions(theta: object, products: list[dict[str, Tensor]], args: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [block.function(z, *extra) for block, z, extra in zip(points, products, args, strict=True)]

    return Structured(functions, lambda theta: (points, LINEAR))


def rows_of_one(i: int, w: Tensor) -> Tensor:
    """The rows of problem i, written down."""
    z = {name: T[i] @ w for name, T in FEATURES.items()}
    weight = POINTS[0].weight
    assert weight is not None
    first = waves(z, POINTS[0].args[0]) * weight
    second = decay({"p": POINTS[1].features["p"] @ w})
    return torch.cat([first, second, LINEAR[0].matrix[i] @ w - LINEAR[0].target[i], 0.1 * w])


def test_rows_jacobian_gradient_and_hessian() -> None:
    w, r = randn(3, 4, seed=9), system()
    gram, gradient = r.normal_equations(w)
    for i in range(3):
        J = jacfwd(lambda w, i=i: rows_of_one(i, w))(w[i])
        torch.testing.assert_close(r.rows(w)[i], rows_of_one(i, w[i]))
        torch.testing.assert_close(gram[i], J.T @ J)
        torch.testing.assert_close(gradient[i], J.T @ rows_of_one(i, w[i]))
        torch.testing.assert_close(r.gradient(w)[i], gradient[i])
        torch.testing.assert_close(r.hessian(w)[i], hessian(lambda w, i=i: rows_of_one(i, w).square().sum() / 2)(w[i]))


def test_a_system_under_vmap_keeps_its_structure() -> None:
    w = randn(2, 3, 4, seed=9)
    deeper = system().batched((), "error")
    for name in ("rows", "gradient", "hessian"):
        torch.testing.assert_close(getattr(deeper, name)(w), torch.stack([getattr(system(), name)(part) for part in w]))


def test_free_rows_are_differentiated() -> None:
    w = randn(3, 4, seed=9)
    free = Free(lambda w: torch.sin(w) * w.sum(-1, keepdim=True), system())

    def total(w: Tensor) -> Tensor:
        return (torch.sin(w) * w.sum()).square().sum() / 2

    torch.testing.assert_close(free.hessian(w) - system().hessian(w), vmap(hessian(total))(w))
    torch.testing.assert_close(free.gradient(w) - system().gradient(w), vmap(grad(total))(w))


def test_coupled_problems_are_one() -> None:
    between = LinearRows(randn(2, 12, seed=7), randn(2, seed=8))
    one = Coupled(system(), Slots(3), lambda theta: between)
    w = randn(3, 4, seed=9).flatten()

    def total(w: Tensor) -> Tensor:
        own = sum(rows_of_one(i, w.reshape(3, 4)[i]).square().sum() for i in range(3))
        return (own + (between.matrix @ w - between.target).square().sum()) / 2

    torch.testing.assert_close(one.rows(w).square().sum() / 2, total(w))
    torch.testing.assert_close(one.gradient(w), grad(total)(w))
    torch.testing.assert_close(one.normal_equations(w)[1], grad(total)(w))
    torch.testing.assert_close(one.hessian(w), hessian(total)(w))


def test_a_function_that_mixes_points_is_refused() -> None:
    mixing = PointRows(lambda z: z["u"] - z["u"].mean(-1, keepdim=True), FEATURES)
    with pytest.raises(DiffLayersError, match="must be pointwise"):
        solve_rows(torch.zeros(3, 4, dtype=D), [mixing], LINEAR, options=FitOptions())


def test_a_function_that_is_not_one_number_a_point_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"one number for each point, \(3, 7\), got \(3,\)"):
        solve_rows(torch.zeros(3, 4, dtype=D), [PointRows(lambda z: z["u"].sum(-1), FEATURES)], LINEAR, options=FitOptions())


def test_all_kinds_of_rows_together() -> None:
    scale = torch.tensor(0.5, dtype=D, requires_grad=True)  # closed over
    between = LinearRows(randn(2, 12, seed=7), randn(2, seed=8))

    def solve(matrix: Tensor) -> Tensor:
        free = FreeRows(lambda w, matrix: scale * torch.tanh((matrix @ w[..., None]).squeeze(-1)), (matrix,))
        points = [PointRows(lambda z, c: scale * waves(z, c), FEATURES, POINTS[0].args)]
        return solve_rows(torch.zeros(3, 4, dtype=D), points, LINEAR, free, options=FitOptions(tol=1e-13), coupling=between).x

    matrix, direction = randn(2, 4, seed=10).requires_grad_(), randn(2, 4, seed=11)
    slopes = torch.autograd.grad(solve(matrix).sum(), (scale, matrix))
    sums = []
    with torch.no_grad():
        for sign in (1, -1):
            scale += sign * 1e-5
            sums.append(solve(matrix + sign * 1e-5 * direction).sum())
            scale -= sign * 1e-5
    torch.testing.assert_close(slopes[0] + (slopes[1] * direction).sum(), (sums[0] - sums[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_some_of_the_problems() -> None:
    w, which = randn(3, 4, seed=9), torch.tensor([True, False, True])
    fewer = system().select((), which)
    assert fewer is not None
    for name in ("rows", "gradient", "hessian"):
        torch.testing.assert_close(getattr(fewer, name)(w[which]), getattr(system(), name)(w)[which])
    unclear = POINTS[0]._replace(args=(torch.ones(3),))  # one for each problem, or for all?
    assert system([unclear]).select((), which) is None


def test_a_batch_goes_on_without_the_problems_that_are_solved() -> None:
    # Starting far away takes more than one round.
    T, c = randn(9, 3), torch.stack([randn(9, seed=1), 30 * randn(9, seed=2), randn(9, seed=3)])
    start = torch.tensor([[0.0] * 3, [40.0, -30.0, 20.0], [0.0] * 3], dtype=D)

    def solve(c: Tensor, start: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        found = solve_rows(start, [PointRows(function, {"u": T}, (c,))], options=FitOptions())
        return found.x, found.iterations

    def cubic(z: dict[str, Tensor], c: Tensor) -> Tensor:
        return z["u"] ** 3 + z["u"] - c

    x, iterations = solve(c, start, cubic)
    assert int(iterations.max()) > 10
    assert int(iterations.min()) <= 10
    for i in range(3):
        alone, count = solve(c[i], start[i], cubic)
        torch.testing.assert_close(x[i], alone)
        assert iterations[i] == count
    several = torch.ones(2, dtype=D)  # closed over: the batch stays whole, and so does the result
    whole, same = solve(c, start, lambda z, c: cubic(z, c) * several.prod())
    torch.testing.assert_close(whole, x)
    assert torch.equal(same, iterations)
