"""Roots as layers: structures, copies, failures and messages (derivatives in every nest are the business of the contract)."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import solvers
from difflayers.errors import ConvergenceWarning, DiffLayersError, NotConvergedError, ShapeError, SingularError
from difflayers.implicit import custom_root, implicit_root, root_jvp, root_vjp
from difflayers.solution import Solution, Status
from tests.reference import newton_root, relative_error


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


ONE = scalar(1.0)


def square(x: Tensor, a: Tensor) -> Tensor:
    return x * x - a


def coupled(x: Tensor, a: Tensor) -> Tensor:
    return x + 0.3 * torch.sin(x.flip(-1)) * a - torch.cos(a)


def test_unknowns_and_arguments_of_any_structure() -> None:
    def residual(x, args, power):
        (gain, which), target = args["pair"], args["target"]
        return {"level": x["level"] ** power - gain, "rest": [x["rest"][0] - x["level"] * target[which], x["rest"][1]]}

    def layer(gain: Tensor) -> tuple[Tensor, Tensor]:
        args = {"pair": (gain, torch.tensor([1, 0])), "target": tensor(1.0, 2.0)}
        found = implicit_root(residual)({"level": ONE, "rest": [tensor(0.0, 0.0), torch.tensor([5, 6])]}, args, 3)
        assert torch.equal(found["rest"][1], torch.tensor([5, 6]))
        return found["level"], found["rest"][0]

    level, rest = layer(scalar(8.0))
    assert level.shape == ()
    assert torch.allclose(rest, tensor(4.0, 2.0))
    slope_of_level, slope_of_rest = jacrev(layer)(scalar(8.0))
    assert abs(slope_of_level - 1 / 12) < 1e-12
    assert torch.allclose(slope_of_rest, tensor(2.0, 1.0) / 12)


@settings(max_examples=15)
@given(a=st.floats(0.1, 50.0))
def test_scalar_root_to_second_order(a: float) -> None:
    layer = implicit_root(square)
    p = scalar(a)
    assert abs(layer(ONE, p) - a**0.5) < 1e-9 * a**0.5
    assert abs(grad(lambda p: layer(ONE, p))(p) * 2 * a**0.5 - 1) < 1e-8
    assert abs(hessian(lambda p: layer(ONE, p))(p) * -4 * a**1.5 - 1) < 1e-7


@pytest.mark.parametrize("solver", ["newton", "broyden", "levenberg_marquardt", solvers.newton])
def test_every_solver_gives_one_layer(solver) -> None:
    a = tensor(0.4, 0.9)
    layer = implicit_root(coupled, solver)
    exact = jacrev(lambda a: newton_root(coupled, torch.zeros_like(a), a))(a)
    assert relative_error(jacrev(lambda a: layer(torch.zeros_like(a), a))(a), exact) < 1e-7
    found = implicit_root(coupled, solver, batch_ndim=1).solve(torch.zeros(3, 2, dtype=torch.float64), a.expand(3, 2))
    assert isinstance(found, Solution)
    assert found.status.tolist() == [Status.SOLVED] * 3
    assert found.residual.shape == found.iterations.shape == (3,)


def test_a_solver_without_batches_is_called_element_by_element() -> None:
    seen = []

    def solve(residual, x0):
        seen.append(x0["x"].shape)
        x = newton_root(lambda x: residual({"x": x})["x"], x0["x"])
        return {"x": x}

    layer = implicit_root(lambda x, a: {"x": coupled(x["x"], a)}, solve)
    points = torch.stack([tensor(0.4, 0.9), tensor(0.1, -0.3)])
    slopes = vmap(jacrev(lambda a: layer({"x": tensor(0.0, 0.0)}, a)["x"]))(points)
    assert seen == [(2,), (2,)]
    exact = torch.stack([jacrev(lambda a: newton_root(coupled, torch.zeros_like(a), a))(a) for a in points])
    assert relative_error(slopes, exact) < 1e-9


def test_no_derivative_flows_to_the_start() -> None:
    start = scalar(1.0).requires_grad_()
    assert not implicit_root(square)(start, scalar(4.0)).requires_grad
    a = scalar(4.0).requires_grad_()
    assert torch.autograd.grad(implicit_root(square)(start, a), (start, a), allow_unused=True)[0] is None


def test_output_may_be_modified_in_place() -> None:
    a = scalar(4.0).requires_grad_()
    x = implicit_root(lambda x, a: {"x": x["x"] ** 2 - a, "y": x["y"] - a})({"x": ONE, "y": ONE}, a)
    x["x"].mul_(3.0)
    assert abs(torch.autograd.grad(x["x"] + 0 * x["y"], a)[0] - 0.75) < 1e-12


def test_complex_argument() -> None:
    def layer(real: Tensor) -> Tensor:
        return implicit_root(lambda x, c: x - (c * c.conj()).real)(ONE, torch.complex(real, 2 * real))

    a = scalar(1.5).requires_grad_()
    assert abs(torch.autograd.grad(layer(a), a)[0] - 15.0) < 1e-10


def test_x0_that_is_the_solution() -> None:
    start = scalar(2.0)
    x = implicit_root(square)(start, scalar(4.0))
    assert x.data_ptr() != start.data_ptr()


def test_aux_of_a_residual_is_differentiable() -> None:
    layer = implicit_root(lambda x, a: (x * x - a, {"cube": x**3 * a}), has_aux=True)

    def cube(a: Tensor) -> Tensor:
        return layer(ONE, a)[1]["cube"]  # a^2.5

    a = scalar(4.0)
    assert abs(cube(a) - 32.0) < 1e-9
    assert abs(grad(cube)(a) - 2.5 * 8) < 1e-8
    assert abs(hessian(cube)(a) - 3.75 * 2) < 1e-8
    assert torch.allclose(vmap(grad(cube))(tensor(4.0, 9.0)), 2.5 * tensor(8.0, 27.0))


def test_aux_of_a_custom_solver_is_passed_through() -> None:
    @custom_root(square, has_aux=True)
    def solve(x0: None, a: Tensor) -> tuple[Tensor, dict[str, object]]:
        return a.sqrt(), {"twice": 2 * a, "steps": torch.tensor(3), "name": "sqrt"}

    a = scalar(4.0).requires_grad_()
    x, aux = solve(None, a)
    assert abs(torch.autograd.grad(x, a)[0] - 0.25) < 1e-12
    assert aux["name"] == "sqrt"
    assert not aux["twice"].requires_grad
    points = tensor(1.0, 4.0, 9.0)
    x, twice, steps = vmap(lambda a: (lambda x, aux: (x, aux["twice"], aux["steps"]))(*solve(None, a)))(points)
    assert torch.equal(x, points.sqrt())
    assert torch.equal(twice, 2 * points)
    assert steps.tolist() == [3, 3, 3]
    assert torch.allclose(vmap(grad(lambda a: solve(None, a)[0]))(points), 0.5 / points.sqrt())


def test_custom_solver_sees_plain_tensors_once_per_element() -> None:
    seen = []

    @custom_root(lambda x, a, table: {"x": x["x"] - table["t"] * a.sin()})
    def solve(x0: dict[str, Tensor], a: Tensor, table: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled() or not a.requires_grad
        seen.append(a.numpy().shape)
        return {"x": table["t"] * a.sin()}

    points = torch.stack([tensor(0.1, 0.2), tensor(0.3, 0.4), tensor(0.5, 0.6)])
    table = {"t": tensor(2.0, 3.0)}
    slopes = vmap(jacrev(lambda a: solve({"x": torch.zeros_like(a)}, a, table)["x"]))(points)
    assert seen == [(2,)] * 3
    assert torch.allclose(slopes, torch.diag_embed(table["t"] * points.cos()))


def test_custom_solver_keeps_its_name() -> None:
    @custom_root(square)
    def square_root(x0: None, a: Tensor) -> Tensor:
        """The root."""
        return a.sqrt()

    assert square_root.__name__ == "square_root"
    assert square_root.__doc__ == "The root."


def test_custom_solver_with_integer_and_plain_arguments() -> None:
    @custom_root(lambda x, a, k, n: x - a[k] ** n)
    def power(x0: None, a: Tensor, k: Tensor, n: int) -> Tensor:
        return a[k] ** n

    a = tensor(1.0, 2.0, 3.0)
    assert torch.allclose(grad(lambda a: power(None, a, torch.tensor(1), 3))(a), tensor(0.0, 12.0, 0.0))


def test_root_vjp_and_root_jvp() -> None:
    def residual(x: dict[str, Tensor], A: Tensor, b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": A @ x["x"] - b["b"]}

    A, b = torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64), tensor(1.0, -1.0)
    inverse = torch.linalg.inv(A)
    x, g = {"x": inverse @ b}, tensor(0.3, 0.7)
    of_A, of_b = root_vjp(residual, x, (A, {"b": b}), {"x": g})
    assert torch.allclose(of_b["b"], inverse.mT @ g)
    assert torch.allclose(of_A, -torch.outer(inverse.mT @ g, x["x"]))
    dA, db = torch.ones_like(A), tensor(0.1, 0.2)
    pushed = root_jvp(residual, x, (A, {"b": b}), (dA, {"b": db}), linear_solver="gmres")
    assert torch.allclose(pushed["x"], inverse @ (db - dA @ x["x"]))
    assert torch.allclose(vmap(lambda g: root_vjp(residual, x, (A, {"b": b}), {"x": g})[1]["b"])(torch.eye(2).double()), inverse)


@pytest.mark.parametrize("linear_solver", ["auto", "cg", "cholesky"])
def test_symmetric_is_exact_in_every_entry(linear_solver: str) -> None:
    # At a symmetric A; the second derivative along a direction that is not symmetric.
    A = torch.tensor([[2.0, 0.5], [0.5, 1.5]], dtype=torch.float64)
    b = tensor(1.0, 2.0)
    layer = implicit_root(lambda x, A: A @ x - b, linear_solver=linear_solver, symmetric=True)

    def ours(A: Tensor) -> Tensor:
        return (layer(torch.zeros_like(b), A) * tensor(1.0, -2.0)).sum()

    def exact(A: Tensor) -> Tensor:
        return ((torch.linalg.inv(A) @ b) * tensor(1.0, -2.0)).sum()

    assert not torch.allclose(grad(exact)(A), grad(exact)(A).mT)
    assert relative_error(grad(ours)(A), grad(exact)(A)) < 1e-9
    assert relative_error(hessian(ours)(A), hessian(exact)(A)) < 1e-8


def no_root(x: Tensor, a: Tensor) -> Tensor:
    return x * x + a


SIGNS = tensor(-4.0, 1.0, -9.0)


def test_failure_raises_with_all_that_was_reached() -> None:
    layer = implicit_root(lambda x, a: {"x": no_root(x["x"], a)}, batch_ndim=1)
    with pytest.raises(NotConvergedError, match=r"newton: 1 of 3 problems without a solution") as caught:
        layer({"x": torch.full((3,), 1.3, dtype=torch.float64)}, SIGNS)
    solution = caught.value.solution
    assert caught.value.indices == [(1,)]
    assert isinstance(solution, Solution)
    assert torch.allclose(solution.x["x"][[0, 2]], tensor(2.0, 3.0))
    assert "on_failure" in str(caught.value)
    assert isinstance(caught.value, RuntimeError | DiffLayersError)


@pytest.mark.parametrize("mapped", [False, True])
def test_failure_as_nan_has_zero_gradient(mapped: bool) -> None:
    layer = implicit_root(no_root, batch_ndim=0 if mapped else 1, on_failure="nan")

    def run(a: Tensor) -> Tensor:
        return vmap(lambda a: layer(ONE, a))(a) if mapped else layer(torch.ones_like(a), a)

    assert torch.allclose(run(SIGNS), tensor(2.0, torch.nan, 3.0), equal_nan=True)
    (slope,) = vjp(run, SIGNS)[1](torch.ones(3, dtype=torch.float64))
    assert torch.allclose(slope, tensor(-0.25, 0.0, -1 / 6))
    pushed = jvp(run, (SIGNS,), (torch.ones_like(SIGNS),))[1]
    assert torch.allclose(pushed[[0, 2]], tensor(-0.25, -1 / 6))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shared", [False, True])
def test_an_input_that_is_not_finite_has_zero_gradient(value: float, shared: bool) -> None:
    layer = implicit_root(lambda x, a, w: x * w - a, batch_ndim=1, on_failure="nan")
    a = tensor(1.0, value, 3.0).requires_grad_()
    w = (scalar(2.0) if shared else tensor(2.0, 2.0, 2.0)).requires_grad_()
    x = layer(torch.ones(3, dtype=torch.float64), a, w)
    assert x.isnan().tolist() == [False, True, False]
    slopes = torch.autograd.grad(x[[0, 2]].sum(), (a, w))
    assert torch.allclose(slopes[0], tensor(0.5, 0.0, 0.5))
    assert torch.allclose(slopes[1], scalar(-1.0) if shared else tensor(-0.25, 0.0, -0.75))
    slopes = torch.autograd.grad(layer(torch.ones(3, dtype=torch.float64), a, w).nan_to_num().sum(), (a, w))
    assert torch.allclose(slopes[0], tensor(0.5, 0.0, 0.5))


@pytest.mark.parametrize("mapped", [False, True])
def test_failure_warns_and_keeps_the_best_iterate(mapped: bool) -> None:
    layer = implicit_root(no_root, batch_ndim=0 if mapped else 1, on_failure="warn")
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        x = vmap(lambda a: layer(ONE, a))(SIGNS) if mapped else layer(torch.ones_like(SIGNS), SIGNS)
    assert torch.allclose(x[[0, 2]], tensor(2.0, 3.0))
    assert x.isfinite().all()


def triple(x: Tensor, a: Tensor) -> Tensor:
    # x = 0 solves it for a = 0, with a singular Jacobian there.
    return x**3 - a


def at_triple(on_failure: str):
    @custom_root(triple, on_failure=on_failure)
    def solve(x0: None, a: Tensor) -> Tensor:
        return a.sign() * a.abs() ** (1 / 3)

    return lambda a: vmap(lambda a: solve(None, a))(a)


CUBES = tensor(8.0, 0.0, 1.0)


def test_singular_jacobian_is_an_error_of_the_derivative_only() -> None:
    a = CUBES.clone().requires_grad_()
    x = at_triple("raise")(a)
    with pytest.raises(SingularError, match="derivative") as caught:
        x.sum().backward()
    assert caught.value.indices == [(1,)]
    with pytest.raises(SingularError, match="derivative"):
        jvp(at_triple("raise"), (CUBES,), (torch.ones_like(CUBES),))


def test_singular_jacobian_as_nan_there_only() -> None:
    exact = tensor(1 / 12, torch.nan, 1 / 3)
    assert torch.allclose(vjp(at_triple("nan"), CUBES)[1](torch.ones_like(CUBES))[0], exact, equal_nan=True)
    assert torch.allclose(jvp(at_triple("nan"), (CUBES,), (torch.ones_like(CUBES),))[1], exact, equal_nan=True)


def test_singular_jacobian_warns() -> None:
    with pytest.warns(ConvergenceWarning, match="derivative"):
        slope = vjp(at_triple("warn"), CUBES)[1](torch.ones_like(CUBES))[0]
    assert torch.allclose(slope[[0, 2]], tensor(1 / 12, 1 / 3))


@pytest.mark.parametrize("mapped", [False, True])
def test_nan_cotangent_passes_as_nan_there_only(mapped: bool) -> None:
    layer = implicit_root(square, batch_ndim=0 if mapped else 1)

    def run(a: Tensor) -> Tensor:
        return vmap(lambda a: layer(ONE, a))(a) if mapped else layer(torch.ones_like(a), a)

    (slope,) = vjp(run, tensor(1.0, 4.0, 9.0))[1](tensor(1.0, torch.nan, 1.0))
    assert torch.allclose(slope, tensor(0.5, torch.nan, 1 / 6), equal_nan=True)


class RootOf(nn.Module):
    """x² = gain · a."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(scalar(2.0))
        self.root = implicit_root(self.residual)
        self.square = implicit_root(square, "broyden", tol=1e-10)

    def residual(self, x: Tensor, a: Tensor) -> Tensor:
        return x * x - self.gain * a

    def forward(self, a: Tensor) -> Tensor:
        return self.root(ONE, a) + self.square(ONE, a)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_are_their_own(duplicate) -> None:
    callable_copy = duplicate(implicit_root(square, "newton", tol=1e-9))
    assert abs(callable_copy(ONE, scalar(9.0)) - 3.0) < 1e-8
    module = RootOf()
    twin = duplicate(module)
    with torch.no_grad():
        twin.gain.fill_(8.0)
    assert abs(module(scalar(2.0)) - 2.0 - 2.0**0.5) < 1e-8
    assert abs(twin(scalar(2.0)) - 4.0 - 2.0**0.5) < 1e-8
    twin(scalar(2.0)).backward()
    assert abs(twin.gain.grad - 0.25) < 1e-9
    assert module.gain.grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    a = tensor(0.4, 0.9).requires_grad_()
    layer = implicit_root(coupled)
    checkpoint(lambda a: layer(torch.zeros_like(a), a).square().sum(), a, use_reentrant=use_reentrant).backward()
    exact = grad(lambda a: newton_root(coupled, torch.zeros_like(a), a).square().sum())(a.detach())
    assert relative_error(a.grad, exact) < 1e-9


def test_is_grads_batched() -> None:
    # Autograd's own, older vmap.
    a = torch.stack([tensor(0.4, 0.9), tensor(0.2, -0.5)]).requires_grad_()
    x = implicit_root(coupled, batch_ndim=1)(torch.zeros_like(a), a)
    cotangents = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 2, 2)
    (batched,) = torch.autograd.grad(x, a, cotangents, is_grads_batched=True, retain_graph=True)
    loop = torch.stack([torch.autograd.grad(x, a, cotangent, retain_graph=True)[0] for cotangent in cotangents])
    assert relative_error(batched, loop) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it after a graph break
@pytest.mark.slow
def test_compile_with_graph_breaks() -> None:
    layer = implicit_root(coupled)

    def loss(a: Tensor) -> Tensor:
        return (layer(torch.zeros_like(a), a.exp()) ** 2).sum()

    a = tensor(0.4, 0.9).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager")(a)
    assert abs(compiled - loss(a)) < 1e-14
    assert relative_error(torch.autograd.grad(compiled, a)[0], torch.autograd.grad(loss(a), a)[0]) < 1e-12


def test_one_attached_newton_step_is_wrong_in_second_order() -> None:
    # What implicit differentiation must not be replaced by: right at first order, silently wrong at second.
    def attached(a: Tensor) -> Tensor:
        x = a.detach().sqrt()
        return x - (x * x - a) / (2 * x)

    a = scalar(4.0).requires_grad_()
    (slope,) = torch.autograd.grad(attached(a), a, create_graph=True)
    assert abs(slope - 0.25) < 1e-12
    assert not slope.requires_grad  # the second derivative is lost, the exact one is −1/32
    (slope,) = torch.autograd.grad(implicit_root(square)(ONE, a), a, create_graph=True)
    assert abs(torch.autograd.grad(slope, a)[0] + 1 / 32) < 1e-9


@pytest.mark.parametrize(
    ("residual", "x0", "error", "message"),
    [
        (square, torch.tensor(1), ShapeError, "no floating tensor"),
        (square, None, ShapeError, "no floating tensor"),
        (square, torch.ones((), dtype=torch.complex128), ShapeError, "view_as_real"),
        (lambda x, a: x.sum(), tensor(1.0, 2.0), ShapeError, "expected|shape"),
        (lambda x, a: torch.cat([x, x]), tensor(1.0, 2.0), ShapeError, "expected|shape"),
        (lambda x, a: x.float(), tensor(1.0, 2.0), ShapeError, "float32"),
        (lambda x, a: (x, x), tensor(1.0, 2.0), ShapeError, "structure"),
        (lambda x, a: {"y": x["x"]}, {"x": tensor(1.0)}, ShapeError, "structure"),
        (lambda x, a: x, {"x": tensor(1.0), "y": torch.ones(1, dtype=torch.float32)}, ShapeError, "dtype"),
    ],
)
def test_what_does_not_fit_is_refused(residual, x0, error, message: str) -> None:
    with pytest.raises(error, match=message):
        implicit_root(residual)(x0, scalar(4.0))


@pytest.mark.parametrize("keyword", ["solver", "linear_solver", "on_failure"])
def test_unknown_names_are_refused(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"nonsense.*choose"):
        implicit_root(square, **{keyword: "nonsense"})(ONE, scalar(4.0))


def test_batch_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ShapeError, match="batch_ndim=1"):
        implicit_root(lambda x: x, batch_ndim=1)({"x": torch.zeros(2, 3), "y": torch.zeros(3)})


def test_solved_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        implicit_root(square, on_failure="warn")(ONE, scalar(4.0))


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-9, 1e-3, 1e6])
def test_broyden_does_not_mind_the_units_of_the_residual(scale):
    draw = torch.Generator().manual_seed(0)
    matrix = 2 * torch.eye(30, dtype=torch.float64) + 0.1 * torch.randn(30, 30, generator=draw, dtype=torch.float64)
    target = torch.randn(30, generator=draw, dtype=torch.float64)
    found = implicit_root(lambda x: scale * (matrix @ x + 0.2 * x.tanh() - target), "broyden").solve(torch.zeros_like(target))
    exact = implicit_root(lambda x: matrix @ x + 0.2 * x.tanh() - target)(torch.zeros_like(target))
    torch.testing.assert_close(found.x, exact, rtol=1e-10, atol=1e-10)
