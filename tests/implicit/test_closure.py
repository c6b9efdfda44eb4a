"""Tensors that a residual closes over: found wherever they hide, and differentiated like arguments."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from difflayers.errors import DiffLayersError
from difflayers.implicit import custom_root, implicit_fixed_point, implicit_root, linear_solve
from difflayers.implicit.closure import hoist
from tests.reference import newton_root, relative_error

START = torch.zeros(2, dtype=torch.float64)
W = torch.tensor([0.7, -0.4], dtype=torch.float64)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def explicit(x: Tensor, w: Tensor) -> Tensor:
    return x + 0.2 * x**3 * w - torch.sin(w)


def by_argument(w: Tensor) -> Tensor:
    return newton_root(explicit, START, w)


def plain(w: Tensor) -> Tensor:
    return implicit_root(lambda x: explicit(x, w))(START)


def in_a_partial(w: Tensor) -> Tensor:
    return implicit_root(functools.partial(lambda w, x: explicit(x, w), w))(START)


def in_a_dictionary(w: Tensor) -> Tensor:
    store = {"weights": [w, None]}
    return implicit_root(lambda x: explicit(x, store["weights"][0]))(START)


def on_an_object(w: Tensor) -> Tensor:
    class Cell:
        def __init__(self) -> None:
            self.w = w

        def residual(self, x: Tensor) -> Tensor:
            return explicit(x, self.w)

    return implicit_root(Cell().residual)(START)


def in_a_named_tuple(w: Tensor) -> Tensor:
    # torch.stack takes the named tuple itself.
    parts = Pair(w / 2, w / 2)
    return implicit_root(lambda x: explicit(x, torch.stack(parts).sum(0)))(START)


def in_a_list(w: Tensor) -> Tensor:
    parts = [w[:1], w[1:]]
    return implicit_root(lambda x: explicit(x, torch.cat(parts)))(START)


def by_keyword(w: Tensor) -> Tensor:
    return implicit_root(lambda x: x + 0.2 * torch.mul(x**3, other=w) - torch.sin(input=w))(START)


def as_the_start(w: Tensor) -> Tensor:
    return implicit_root(lambda x: explicit(x, w))(w)


def as_an_argument_too(w: Tensor) -> Tensor:
    return implicit_root(lambda x, v: x + 0.2 * x**3 * v - torch.sin(w))(START, w)


def as_two_arguments(w: Tensor) -> Tensor:
    return implicit_root(lambda x, v, u: x + 0.2 * x**3 * v - torch.sin(u))(START, w, w)


def as_start_argument_and_closure(w: Tensor) -> Tensor:
    return implicit_root(lambda x, v: x + 0.2 * x**3 * v - torch.sin(w))(w, w)


def inside_a_transform(w: Tensor) -> Tensor:
    return implicit_root(lambda x: x + 0.05 * grad(lambda z: (z**4 * w).sum())(x) - torch.sin(w))(START)


def in_an_inner_layer(w: Tensor) -> Tensor:
    # The inner layer gives sin(w), as the root of asin.
    def residual(x: Tensor) -> Tensor:
        sine = implicit_root(lambda y: torch.asin(y) - w)(0.5 * torch.sin(W))
        return x + 0.2 * x**3 * w - sine

    return implicit_root(residual)(START)


def in_an_inner_layer_as_argument(w: Tensor) -> Tensor:
    inner = implicit_root(lambda y, v: torch.asin(y) - v)
    return implicit_root(lambda x: x + 0.2 * x**3 * w - inner(0.5 * torch.sin(W), w))(START)


def in_an_inner_linear_solve(w: Tensor) -> Tensor:
    # x + x³w/5 = sin w, each term divided by 2 in a system.
    A = 2 * torch.eye(2, dtype=torch.float64)

    def residual(x: Tensor) -> Tensor:
        return linear_solve(A, x + 0.2 * x**3 * w, method="lu").x - linear_solve(lambda u: A @ u, torch.sin(w), method="gmres").x

    return implicit_root(residual)(START)


def in_an_inner_custom_root(w: Tensor) -> Tensor:
    def residual(x: Tensor) -> Tensor:
        @custom_root(lambda y: torch.asin(y) - w)
        def sine(start: None) -> Tensor:
            return torch.sin(w.detach())

        return x + 0.2 * x**3 * w - sine(None)

    return implicit_root(residual)(START)


def of_a_fixed_point(w: Tensor) -> Tensor:
    return implicit_fixed_point(lambda x: torch.sin(w) - 0.2 * x**3 * w)(START)


def of_a_custom_solver(w: Tensor) -> Tensor:
    @custom_root(lambda x: explicit(x, w))
    def solve(start: Tensor) -> Tensor:
        return newton_root(explicit, start, w.detach())

    return solve(START)


HIDING_PLACES = (
    plain,
    in_a_partial,
    in_a_dictionary,
    on_an_object,
    in_a_named_tuple,
    in_a_list,
    by_keyword,
    as_the_start,
    as_an_argument_too,
    as_two_arguments,
    as_start_argument_and_closure,
    inside_a_transform,
    in_an_inner_layer,
    in_an_inner_layer_as_argument,
    in_an_inner_linear_solve,
    of_a_fixed_point,
)


def loss(layer):
    return lambda w: (layer(w) ** 2 * torch.tensor([1.0, -0.6], dtype=w.dtype)).sum()


MANY = torch.stack([W, W - 0.2])


@functools.cache
def exact() -> dict[str, Tensor]:
    scalar = loss(by_argument)
    return {
        "jacobian": jacrev(by_argument)(W),
        "slopes": torch.stack([grad(scalar)(v) for v in MANY]),
        "hessians": torch.stack([hessian(scalar)(v) for v in MANY]),
    }


@pytest.mark.parametrize("layer", HIDING_PLACES)
def test_derivatives_of_a_closed_over_tensor(layer) -> None:
    ours = loss(layer)
    jacobian, slopes, hessians = exact().values()
    w = W.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ours(w), w, create_graph=True)
    assert relative_error(slope, slopes[0]) < 1e-9
    assert relative_error(torch.autograd.grad(slope[0], w)[0], hessians[0, 0]) < 1e-9
    assert relative_error(jacrev(layer)(W), jacobian) < 1e-9
    assert relative_error(jacfwd(layer)(W), jacobian) < 1e-9
    assert relative_error(jacfwd(jacfwd(ours))(W), hessians[0]) < 1e-9
    assert relative_error(vmap(grad(ours))(MANY), slopes) < 1e-9
    assert relative_error(vmap(hessian(ours))(MANY), hessians) < 1e-9
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(W, torch.ones_like(W)))).tangent
    assert relative_error(tangent, jacobian.sum(1)) < 1e-9


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer", [plain, inside_a_transform, in_an_inner_layer, of_a_fixed_point, of_a_custom_solver])
def test_checkpoint(layer, use_reentrant: bool) -> None:
    w = W.clone().requires_grad_()
    checkpoint(loss(layer), w, use_reentrant=use_reentrant).backward()
    assert relative_error(w.grad, grad(loss(by_argument))(W)) < 1e-9


@pytest.mark.parametrize("layer", [of_a_custom_solver, in_an_inner_custom_root])
def test_a_custom_solver_that_closes_over(layer) -> None:
    # The user's solver reads w itself, so transforms that hide the value of w (vmap) are out of its reach; autograd is not.
    w = W.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(layer)(w), w, create_graph=True)
    assert relative_error(slope, grad(loss(by_argument))(W)) < 1e-9
    assert relative_error(torch.autograd.grad(slope[0], w)[0], hessian(loss(by_argument))(W)[0]) < 1e-9


class Cell(nn.Module):
    """z = tanh(A z + b + buffer · x), with a layer inside the module."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)
        self.register_buffer("gain", torch.tensor([0.5, 1.5], dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + self.gain * x)

    def forward(self, x: Tensor) -> Tensor:
        return implicit_fixed_point(self.step)(torch.zeros_like(x), x)


def reference_of_cell(state: dict[str, Tensor], x: Tensor) -> Tensor:
    def residual(z: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, x: Tensor) -> Tensor:
        return z - torch.tanh(weight @ z + bias + gain * x)

    return newton_root(residual, torch.zeros_like(x), state["linear.weight"], state["linear.bias"], state["gain"], x)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


def test_parameters_of_a_module_have_gradients() -> None:
    module, x = Cell(), W
    (module(x) ** 2).sum().backward()
    exact = grad(lambda state: (reference_of_cell(state, x) ** 2).sum())(state_of(module))
    assert relative_error(module.linear.weight.grad, exact["linear.weight"]) < 1e-9
    assert relative_error(module.linear.bias.grad, exact["linear.bias"]) < 1e-9


@pytest.mark.parametrize("transform", [grad, lambda f: grad(lambda s: sum((g**2).sum() for g in grad(f)(s).values()))])
def test_functional_call(transform) -> None:
    # Buffers have gradients there, too.
    module, x = Cell(), W
    ours = transform(lambda state: (functional_call(module, state, (x,)) ** 2).sum())(state_of(module))
    exact = transform(lambda state: (reference_of_cell(state, x) ** 2).sum())(state_of(module))
    for name in exact:
        assert relative_error(ours[name], exact[name]) < 1e-8, name


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_ensemble_by_stack_module_state(randomness: str) -> None:
    modules = [Cell(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(modules)
    xs = torch.stack([W, 2 * W])

    def value(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(modules[0], (parameters, buffers), (x,)) ** 2).sum()

    slopes = vmap(vmap(grad(value), (None, None, 0)), (0, 0, None), randomness=randomness)(parameters, buffers, xs)
    for i, module in enumerate(modules):
        for j, x in enumerate(xs):
            exact = grad(lambda state, x: (reference_of_cell(state, x) ** 2).sum())(state_of(module), x)
            for name, slope in slopes.items():
                assert relative_error(slope[i, j], exact[name]) < 1e-8


def test_integer_tensor_closed_over_and_batched() -> None:
    table = torch.tensor([[0.3, 0.6], [1.1, -0.2], [0.5, 0.5]], dtype=torch.float64)

    def layer(which: Tensor, table: Tensor) -> Tensor:
        return implicit_root(lambda x: explicit(x, table.index_select(0, which.reshape(1))[0]))(START)

    which = torch.tensor([2, 0, 1, 0])
    slopes = vmap(hessian(lambda t, k: (layer(k, t) ** 2).sum()), (None, 0))(table, which)
    for slope, k in zip(slopes, which, strict=True):
        assert relative_error(slope, hessian(lambda t, k: (by_argument(t[k]) ** 2).sum())(table, k)) < 1e-8


def test_boolean_mask_closed_over_and_batched() -> None:
    masks = torch.tensor([[True, False], [False, True], [True, True]])
    found = vmap(lambda mask: implicit_root(lambda x: torch.where(mask, x**3 - 8, x - 1))(torch.ones(2, dtype=torch.float64)))(masks)
    assert torch.allclose(found, torch.where(masks, 2.0, 1.0).double())


@pytest.mark.parametrize("transform", [grad, lambda f: lambda w: jvp(f, (w,), (torch.ones_like(w),))[1]])
def test_closed_over_tensor_handed_to_a_transform_is_refused(transform) -> None:
    def layer(w: Tensor) -> Tensor:
        # torch.func.grad wraps w, out of reach of any swap.
        return implicit_root(lambda x: x - grad(lambda v: (v**2).sum())(w))(START).sum()

    with pytest.raises(DiffLayersError, match="argument"):
        transform(layer)(W)
    with pytest.raises(DiffLayersError, match="argument"):
        layer(W.clone().requires_grad_())
    with pytest.raises(DiffLayersError, match="argument"):
        vmap(layer)(W.expand(2, 2))


def test_constant_handed_to_a_transform_is_fine() -> None:
    found = implicit_root(lambda x: x - grad(lambda v: (v**2).sum())(W))(START)
    assert torch.allclose(found, 2 * W)


def test_tensors_made_inside_are_not_captured() -> None:
    def function(x: Tensor) -> Tensor:
        basis = torch.eye(2, dtype=x.dtype)
        return basis @ x + torch.tensor(1.0, dtype=x.dtype) + torch.arange(2)

    _, captured, value = hoist(function, W)
    assert captured == []
    assert torch.equal(value, W + 1 + torch.arange(2))


def test_hoist_puts_values_in_their_places() -> None:
    call, captured, value = hoist(lambda x: x * W + Pair(W, W).second, START + 1)
    assert len(captured) == 1
    assert captured[0] is W
    assert torch.equal(value, 2 * W)
    assert torch.equal(call([W + 1], START + 2), 2 * (W + 1) + W + 1)
    assert torch.equal(call(captured, START + 2), 3 * W)


def test_a_branch_that_the_starting_point_does_not_take_is_refused() -> None:
    # The weight of the second branch is met only at the solution: its gradient would be lost.
    def layer(first: Tensor, second: Tensor) -> Tensor:
        return implicit_root(lambda x: x * first - 6 if bool(x < 1) else x * second - 6)(torch.zeros((), dtype=torch.float64))

    first, second = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 3.0))
    with pytest.raises(DiffLayersError, match="argument"):
        layer(first, second).backward()
    # Passed as arguments, both are right.
    root = implicit_root(lambda x, a, b: x * a - 6 if bool(x < 1) else x * b - 6)
    slopes = torch.autograd.grad(root(torch.zeros((), dtype=torch.float64), first, second), (first, second))
    assert torch.allclose(torch.stack(slopes), torch.tensor([0.0, -6 / 9], dtype=torch.float64))


def test_variables_that_have_moved_on_by_the_time_of_backward() -> None:
    w = W.clone().requires_grad_()
    outputs = []
    for factor in (1.0, 2.0, 3.0):
        shift = factor * w
        outputs.append(implicit_root(lambda x: x + x**3 - factor * torch.sin(shift))(START).sum())  # noqa: B023
    for factor, output in zip((1.0, 2.0, 3.0), outputs, strict=True):
        (slope,) = torch.autograd.grad(output, w, retain_graph=True)
        exact = grad(lambda w, k=factor: newton_root(lambda x, w: x + x**3 - k * torch.sin(k * w), START, w).sum())(W)
        assert relative_error(slope, exact) < 1e-9


def test_a_function_may_count_its_calls() -> None:
    calls = 0

    def residual(x: Tensor, w: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return explicit(x, w)

    w = W.clone().requires_grad_()
    x = implicit_root(residual)(START, w)
    before = calls
    (slope,) = torch.autograd.grad(x.sum(), w)
    assert calls > before > 0
    assert relative_error(slope, grad(lambda w: by_argument(w).sum())(W)) < 1e-9
