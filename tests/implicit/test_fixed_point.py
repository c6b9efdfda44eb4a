"""The backward modes: which are exact, how fast the others approach, and what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from difflayers.errors import ConvergenceWarning, NotConvergedError, ShapeError
from difflayers.implicit import conditions, custom_fixed_point, implicit_fixed_point
from difflayers.solution import Status
from tests.reference import newton_root, relative_error

WEIGHT = torch.tensor([[0.5, 0.2], [-0.1, 0.4]], dtype=torch.float64)
BIAS = torch.tensor([0.3, -0.6], dtype=torch.float64)
ZERO = torch.zeros(2, dtype=torch.float64)
MODES = ("ift", "jfb", "phantom", "neumann", "unroll")


def affine(x: Tensor, b: Tensor) -> Tensor:
    return WEIGHT @ x + torch.sin(b)


def cell(x: Tensor, b: Tensor) -> Tensor:
    return 0.6 * torch.tanh(WEIGHT @ x + b) + b**2 / 4


def exact(b: Tensor) -> Tensor:
    return newton_root(lambda x, b: x - cell(x, b), ZERO, b)


def slope_of(step, b: Tensor = BIAS, **options: object) -> Tensor:
    layer = implicit_fixed_point(step, **options)
    return jacrev(lambda b: layer(ZERO, b))(b)


@pytest.mark.parametrize("solver", ["anderson", "picard", "broyden", "newton"])
def test_ift_is_exact_to_third_order(solver: str) -> None:
    layer = implicit_fixed_point(cell, solver)

    def third(function) -> Tensor:
        return hessian(lambda b: grad(lambda b: (function(b) ** 2 * torch.tensor([1.0, 2.0])).sum())(b)[0])(BIAS)

    assert relative_error(layer(ZERO, BIAS), exact(BIAS)) < 1e-7
    assert relative_error(third(lambda b: layer(ZERO, b)), third(exact)) < 1e-6


@pytest.mark.parametrize("mode", ["neumann", "phantom"])
def test_error_falls_like_a_power(mode: str) -> None:
    inverse = torch.linalg.inv(torch.eye(2, dtype=torch.float64) - WEIGHT)
    cos = torch.diag(torch.cos(BIAS))
    # τ T + (1 − τ) I has the spectrum of W, damped.
    damping = 0.8 if mode == "phantom" else 1.0
    damped = (1 - damping) * torch.eye(2, dtype=torch.float64) + damping * WEIGHT
    for k in (1, 4, 12, 40):
        options = {"neumann_terms": k} if mode == "neumann" else {"phantom_steps": k, "damping": damping}
        slope = slope_of(affine, backward=mode, tol=1e-13, **options)
        # Σ_{i<k} Mⁱ = (I − Mᵏ)(I − M)⁻¹: the remainder is Mᵏ times the exact derivative.
        remainder = torch.linalg.matrix_power(damped, k)
        assert relative_error(slope, (torch.eye(2, dtype=torch.float64) - remainder) @ inverse @ cos) < 1e-8, k
    assert relative_error(slope, inverse @ cos) < 1e-8


@pytest.mark.parametrize(("mode", "options"), [("neumann", {"neumann_terms": 60}), ("phantom", {"phantom_steps": 80}), ("unroll", {})])
def test_approximate_modes_converge_to_ift(mode: str, options: dict[str, int]) -> None:
    assert relative_error(slope_of(cell, backward=mode, tol=1e-12, **options), jacrev(exact)(BIAS)) < 1e-9


def test_unrolling_approaches_step_by_step() -> None:
    errors = []
    for steps in (4, 8, 16):
        with pytest.warns(ConvergenceWarning):
            errors.append(
                relative_error(slope_of(cell, backward="unroll", max_iter=steps, tol=0.0, on_failure="warn"), jacrev(exact)(BIAS))
            )
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


def test_unrolling_is_exact_in_second_order_too() -> None:
    layer = implicit_fixed_point(cell, backward="unroll")
    assert relative_error(hessian(lambda b: layer(ZERO, b).sum())(BIAS), hessian(lambda b: exact(b).sum())(BIAS)) < 1e-9


def test_jfb_is_the_last_step_alone() -> None:
    x = exact(BIAS).detach()
    slope = slope_of(cell, backward="jfb", tol=1e-13)
    assert relative_error(slope, jacrev(lambda b: cell(x, b))(BIAS)) < 1e-9
    assert relative_error(slope, jacrev(exact)(BIAS)) > 0.05  # a descent direction, not the derivative
    assert (slope * jacrev(exact)(BIAS)).sum() > 0


def test_jfb_of_newton_is_exact_at_first_order_only() -> None:
    def objective(x: Tensor, b: Tensor) -> Tensor:
        return (x.exp() - b.exp() * x).sum() + (x.sum() ** 2) / 2

    step = conditions.newton(objective)
    layer = implicit_fixed_point(step, "picard", backward="jfb", tol=1e-12)

    def minimum(b: Tensor) -> Tensor:
        return newton_root(grad(objective), ZERO, b)

    assert relative_error(jacrev(lambda b: layer(ZERO, b))(BIAS), jacrev(minimum)(BIAS)) < 1e-9
    second = hessian(lambda b: layer(ZERO, b).sum())(BIAS)
    assert relative_error(second, hessian(lambda b: minimum(b).sum())(BIAS)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_under_every_way(mode: str) -> None:
    layer = implicit_fixed_point(cell, backward=mode, tol=1e-11)
    loss = lambda b: (layer(torch.zeros_like(b), b) ** 2).sum()  # noqa: E731
    points = torch.stack([BIAS, -BIAS, 0.5 * BIAS])
    loop = torch.stack([grad(loss)(b) for b in points])
    assert relative_error(vmap(grad(loss))(points), loop) < 1e-8
    batched = implicit_fixed_point(lambda x, b: 0.6 * torch.tanh(x @ WEIGHT.mT + b) + b**2 / 4, backward=mode, batch_ndim=1, tol=1e-11)
    leaf = points.clone().requires_grad_()
    (batched(torch.zeros_like(leaf), leaf) ** 2).sum().backward()
    assert relative_error(leaf.grad, loop) < 1e-8
    forward = torch.func.jacfwd(lambda b: layer(torch.zeros_like(b), b))(BIAS)
    assert relative_error(forward, slope_of(cell, backward=mode, tol=1e-11)) < 1e-8
    for use_reentrant in (False, True):
        leaf = BIAS.clone().requires_grad_()
        checkpoint(loss, leaf, use_reentrant=use_reentrant).backward()
        assert relative_error(leaf.grad, loop[0]) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_structure_and_constants(mode: str) -> None:
    def step(x, b):
        return {"x": cell(x["x"], b), "n": x["n"], "s": 0.5 * x["s"] + b.sum()}

    layer = implicit_fixed_point(step, backward=mode, tol=1e-11)
    start = {"x": ZERO, "n": torch.tensor(7), "s": ZERO[0]}
    found = layer(start, BIAS)
    assert found["n"] == 7
    assert found["s"].shape == ()
    assert relative_error(found["x"], exact(BIAS)) < 1e-8
    x, total = jacrev(lambda b: (lambda f: (f["x"], f["s"]))(layer(start, b)))(BIAS)
    assert x.shape == (2, 2)
    if mode in ("ift", "unroll"):
        assert torch.allclose(total, torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_aux(mode: str) -> None:
    layer = implicit_fixed_point(lambda x, b: (cell(x, b), x.sum() * b), has_aux=True, backward=mode, tol=1e-11)
    x, aux = layer(ZERO, BIAS)
    assert relative_error(aux, x.sum() * BIAS) < 1e-8
    assert jacrev(lambda b: layer(ZERO, b)[1])(BIAS).shape == (2, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mapped", [False, True])
def test_every_mode_tells_a_failure_from_its_neighbours(mode: str, mapped: bool) -> None:
    # w = 2 expands.
    w = torch.tensor([0.5, 2.0, 0.2], dtype=torch.float64)

    def run(w: Tensor, on_failure: str) -> Tensor:
        options = {"backward": mode, "on_failure": on_failure, "max_iter": 60, "tol": 1e-9}
        layer = implicit_fixed_point(lambda x, w: w * x + 1, "picard", batch_ndim=0 if mapped else 1, **options)
        return vmap(lambda w: layer(torch.zeros_like(w), w))(w) if mapped else layer(torch.zeros_like(w), w)

    with pytest.raises(NotConvergedError) as caught:
        run(w, "raise")
    assert caught.value.indices == [(1,)]
    x, pullback = torch.func.vjp(lambda w: run(w, "nan"), w)
    assert x.isnan().tolist() == [False, True, False]
    (slope,) = pullback(torch.ones_like(w))
    assert slope[1] == 0
    assert slope[[0, 2]].isfinite().all()
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        x = run(w, "warn")
    assert torch.allclose(x[[0, 2]], torch.tensor([2.0, 1.25], dtype=torch.float64))


def test_solution_reports() -> None:
    found = implicit_fixed_point(lambda x, b: 0.5 * x + b, "picard", batch_ndim=1).solve(torch.zeros(2, 3), torch.ones(2, 3))
    assert found.status.tolist() == [Status.SOLVED, Status.SOLVED]
    assert (found.iterations > 1).all()
    assert found.x.dtype == torch.float32


def test_custom_fixed_point_with_aux_and_structure() -> None:
    @custom_fixed_point(lambda x, b: {"x": cell(x["x"], b)}, has_aux=True)
    def solve(x0: dict[str, Tensor], b: Tensor) -> tuple[dict[str, Tensor], int]:
        x = x0["x"]
        for _ in range(200):
            x = cell(x, b)
        return {"x": x}, 200

    assert solve({"x": ZERO}, BIAS)[1] == 200
    assert relative_error(jacrev(lambda b: solve({"x": ZERO}, b)[0]["x"])(BIAS), jacrev(exact)(BIAS)) < 1e-9


@pytest.mark.parametrize("keyword", ["backward", "solver", "linear_solver"])
def test_unknown_names_are_refused(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"nonsense.*choose"):
        implicit_fixed_point(cell, **{keyword: "nonsense"})


MISFITS = {
    "longer": lambda x, b: torch.cat([x, b]),
    "a scalar, which would broadcast": lambda x, b: 0.5 * x.sum() + b[0],
    "another dtype": lambda x, b: (0.5 * x + b).float(),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_map_that_does_not_fit_is_refused(misfit: str) -> None:
    for mode in MODES:
        with pytest.raises(ShapeError):
            implicit_fixed_point(MISFITS[misfit], backward=mode)(ZERO, BIAS)
