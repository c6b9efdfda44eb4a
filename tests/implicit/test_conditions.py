"""The catalog of conditions, against closed forms, finite differences and the definitions."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev, vmap

from difflayers.implicit import conditions, implicit_fixed_point, implicit_root
from tests.reference import relative_error


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
ZERO = tensor(0.0, 0.0)


def quadratic(x: Tensor, c: Tensor) -> Tensor:
    return (x @ H @ x) / 2 - c @ x


def distance(x: Tensor, c: Tensor) -> Tensor:
    return ((x - c) ** 2).sum() / 2


def soft_threshold(x: Tensor, weight: Tensor, stepsize: float) -> Tensor:
    return x.sign() * (x.abs() - stepsize * weight).clamp(min=0)


def differences(layer, p: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian of ``layer`` at the vector ``p`` by central differences."""
    units = step * torch.eye(p.numel(), dtype=p.dtype)
    return torch.stack([(layer(p + unit) - layer(p - unit)) / (2 * step) for unit in units], -1)


# Each solves a problem whose solution is known in closed form: (layer, closed form, p).


def of_stationarity(p: Tensor) -> Tensor:
    return implicit_root(conditions.stationarity(quadratic), symmetric=True)(ZERO, p)


def of_newton(p: Tensor) -> Tensor:
    return implicit_fixed_point(conditions.newton(quadratic), "picard")(ZERO, p)


def of_equality(p: Tensor) -> Tensor:
    residual = conditions.kkt(quadratic, equality=lambda x, c: x.sum(-1, keepdim=True) - 1)
    return torch.cat(implicit_root(residual)((ZERO, tensor(0.0)), p))


def closed_equality(p: Tensor) -> Tensor:
    one = torch.ones(2, 1, dtype=torch.float64)
    matrix = torch.cat([torch.cat([H, one], 1), torch.cat([one.mT, torch.zeros(1, 1, dtype=torch.float64)], 1)])
    return torch.linalg.inv(matrix) @ torch.cat([p, tensor(1.0)])


def of_inequality(p: Tensor) -> Tensor:
    return torch.cat(implicit_root(conditions.kkt(distance, inequality=lambda x, c: x - 1))((ZERO, ZERO), p))


def of_both(p: Tensor) -> Tensor:
    residual = conditions.kkt(distance, lambda x, c: x[:1] + x[1:] - 1, lambda x, c: -x)
    x, y, z = implicit_root(residual)((tensor(1.0, 0.0), tensor(0.0), tensor(0.0, 1.0)), p)
    return torch.cat([x, y, z])


def of_lasso(p: Tensor) -> Tensor:
    step = conditions.proximal_gradient(distance, soft_threshold, 0.5)
    return implicit_fixed_point(step)(ZERO, p[2], p[:2])


def of_box(p: Tensor) -> Tensor:
    step = conditions.projected_gradient(distance, lambda x, bound: x.clamp(-bound, bound), 0.5)
    return implicit_fixed_point(step)(ZERO, p[2], p[:2])


def of_entropy(p: Tensor) -> Tensor:
    def energy(x: Tensor, cost: Tensor) -> Tensor:
        return (x * cost).sum() + (x * x.log()).sum()

    step = conditions.mirror_descent(energy, lambda dual, _: torch.softmax(dual, -1), torch.log, 0.5)
    return implicit_fixed_point(step)(tensor(0.5, 0.5), None, p)


def of_blocks(p: Tensor) -> Tensor:
    # min ½‖x₀ + x₁ − c‖² + ½‖x₀‖² + w‖x₁‖₁
    def loss(x: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
        return ((x[0] + x[1] - c) ** 2).sum() / 2 + (x[0] ** 2).sum() / 2

    step = conditions.block_proximal_gradient(loss, (lambda x, _, s: x, soft_threshold), (0.5, 1.0))
    return torch.cat(implicit_fixed_point(step, tol=1e-11)((ZERO, ZERO), (None, p[2]), p[:2]))


CASES = {
    "stationarity": (of_stationarity, lambda p: torch.linalg.inv(H) @ p, tensor(1.0, -2.0)),
    "newton": (of_newton, lambda p: torch.linalg.inv(H) @ p, tensor(1.0, -2.0)),
    "kkt, equality": (of_equality, closed_equality, tensor(1.0, -2.0)),
    "kkt, inequality": (of_inequality, lambda p: torch.cat([p.clamp(max=1), (p - 1).clamp(min=0)]), tensor(0.3, 2.0)),
    # The projection of c on the simplex at a vertex: x = (1, 0), y = c₀ − 1, z = (0, y − c₁).
    "kkt, both": (
        of_both,
        lambda p: torch.stack([p[0] * 0 + 1, p[0] * 0, p[0] - 1, p[0] * 0, p[0] - 1 - p[1]]),
        tensor(2.0, -0.5),
    ),
    "proximal_gradient": (of_lasso, lambda p: soft_threshold(p[:2], p[2], 1.0), tensor(3.0, -0.2, 1.0)),
    "projected_gradient": (of_box, lambda p: p[:2].clamp(-p[2], p[2]), tensor(-3.0, 0.2, 1.0)),
    "mirror_descent": (of_entropy, lambda p: torch.softmax(-p, -1), tensor(0.3, -0.4)),
    # x₀ = (c − x₁)/2 and x₁ = S(c, 2w).
    "block_proximal_gradient": (
        of_blocks,
        lambda p: torch.cat([(p[:2] - (x := soft_threshold(p[:2], p[2], 2.0))) / 2, x]),
        tensor(3.0, -0.2, 0.5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_and_finite_differences(name: str) -> None:
    layer, closed, p = CASES[name]
    assert relative_error(layer(p), closed(p)) < 1e-7
    jacobian = jacrev(layer)(p)
    assert relative_error(jacobian, jacrev(closed)(p)) < 1e-7
    assert relative_error(jacobian, differences(layer, p)) < 1e-5
    weights = torch.linspace(0.5, 1.5, closed(p).numel(), dtype=torch.float64)
    second = hessian(lambda p: (weights * layer(p) ** 2).sum())(p)
    assert relative_error(second, hessian(lambda p: (weights * closed(p) ** 2).sum())(p)) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str) -> None:
    layer, closed, p = CASES[name]
    points = torch.stack([p, 1.05 * p, 0.97 * p])
    assert relative_error(vmap(layer)(points), torch.stack([closed(q) for q in points])) < 1e-7
    assert relative_error(vmap(jacrev(layer))(points), torch.stack([jacrev(closed)(q) for q in points])) < 1e-7


def test_derivatives_of_the_conditions_themselves() -> None:
    x, c, z = tensor(0.3, -0.7), tensor(1.0, 2.0), tensor(0.5, 0.0)
    assert torch.allclose(conditions.stationarity(quadratic)(x, c), H @ x - c)
    rows = conditions.kkt(quadratic, inequality=lambda x, c: x * c - 1)((x, z), c)
    assert torch.allclose(rows[0], H @ x - c + z * c)
    assert torch.allclose(rows[1], torch.minimum(z, 1 - x * c))
    assert torch.allclose(conditions.newton(quadratic)(x, c), torch.linalg.inv(H) @ c)
    # Newton's map does not move with x at the solution: the reason why one step of "jfb" is exact.
    assert jacrev(conditions.newton(quadratic))(x, c).abs().max() < 1e-12


def test_the_stepsize_does_not_move_the_fixed_point() -> None:
    for stepsize in (0.2, 1.0, 1.5):
        step = conditions.proximal_gradient(distance, soft_threshold, stepsize)
        x = soft_threshold(tensor(3.0, -0.2), tensor(1.0), 1.0)
        assert torch.allclose(step(x, tensor(1.0), tensor(3.0, -0.2)), x)


def test_pytrees() -> None:
    def objective(x: dict[str, Tensor], c: Tensor) -> Tensor:
        return distance(x["a"], c) + (x["b"] - c.sum()) ** 2

    start = {"a": ZERO, "b": ZERO[0]}
    for layer in (implicit_root(conditions.stationarity(objective)), implicit_fixed_point(conditions.newton(objective), "picard")):
        found = jacrev(lambda c, layer=layer: layer(start, c))(tensor(1.0, 2.0))
        assert torch.allclose(found["a"], torch.eye(2, dtype=torch.float64))
        assert torch.allclose(found["b"], torch.ones(2, dtype=torch.float64))


def test_closures_replace_arguments() -> None:
    c = tensor(1.0, -2.0).requires_grad_()
    x = implicit_root(conditions.stationarity(lambda x: quadratic(x, c)), symmetric=True)(ZERO)
    (slope,) = torch.autograd.grad(x.sum(), c)
    assert torch.allclose(slope, torch.linalg.inv(H).sum(0))


def _first(x: Tensor, c: Tensor) -> Tensor:
    return x[:1] - c[:1]


def _project(x: Tensor, bound: Tensor) -> Tensor:
    return x.clamp(max=bound)


@pytest.mark.parametrize(
    ("condition", "inputs"),
    [
        (conditions.stationarity(quadratic), (ZERO, tensor(1.0, 2.0))),
        (conditions.kkt(quadratic, _first, _first), ((ZERO, tensor(0.0), tensor(0.0)), tensor(1.0, 2.0))),
        (conditions.proximal_gradient(quadratic, soft_threshold), (ZERO, tensor(1.0), tensor(1.0, 2.0))),
        (conditions.projected_gradient(quadratic, _project), (ZERO, tensor(1.0), tensor(1.0, 2.0))),
        (conditions.mirror_descent(quadratic, _project, torch.exp), (ZERO, tensor(1.0), tensor(1.0, 2.0))),
        (conditions.newton(quadratic), (ZERO, tensor(1.0, 2.0))),
    ],
)
def test_conditions_pickle(condition, inputs) -> None:
    copy = pickle.loads(pickle.dumps(condition))
    expected = condition(*inputs)
    found = copy(*inputs)
    for ours, theirs in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="multiplier"):
        conditions.kkt(distance, equality=_first)((ZERO,), ZERO)
    with pytest.raises(ValueError, match="stepsize"):
        conditions.block_proximal_gradient(distance, (soft_threshold,), (1.0, 1.0))
