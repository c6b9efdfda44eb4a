"""Every transform of torch.func and autograd × problems × linear solvers, against exact derivatives: ``python -m tests.transforms``.

Each problem is a residual F(x, p) = 0 with all of its parameters in one vector p, so that every mixed derivative is
seen. The reference is Newton's method, differentiated by autograd (:mod:`tests.reference`).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from difflayers.implicit import conditions, custom_root, implicit_fixed_point, implicit_root, linear_solve
from tests.reference import newton_root, relative_error

__all__ = ["PROBLEMS", "TOLERANCE", "TRANSFORMS", "Case", "Problem", "cases", "error_of", "main"]

TOLERANCE = 1e-8
GENERAL = ("lu", "normal_cg", "gmres", "bicgstab")
SYMMETRIC = (*GENERAL, "cholesky", "cg")
CONTRACTIVE = (*GENERAL, "neumann")


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer p -> x as a user would write it, and the same solution by differentiated Newton steps.

    Args:
        layer: ``linear solver -> (p -> x)``, x of shape ``(n,)``.
        residual: ``(x, p) -> F``, rows ``(n,)``; what ``layer`` solves.
        start: ``(n,)``, where Newton's method starts.
        p: the parameters.
        solvers: the linear solvers that apply.
    """

    name: str
    layer: Callable[[str], Callable[[Tensor], Tensor]]
    residual: Callable[[Tensor, Tensor], Tensor]
    start: Tensor
    p: Tensor
    solvers: Sequence[str]

    def reference(self, p: Tensor) -> Tensor:
        """The solution at ``p``, exact in its derivatives up to order three."""
        return newton_root(self.residual, _near(self), p, steps=4)


@functools.cache
def _near(problem: Problem) -> Tensor:
    # Found once without transforms; the points that are compared lie around it.
    return newton_root(problem.residual, problem.start, problem.p)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    problem: Problem
    solver: str

    def __str__(self) -> str:
        return f"{self.problem.name} / {self.solver}"


def _numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cubic() -> Problem:
    def residual(x: Tensor, p: Tensor) -> Tensor:
        return x**3 + p[0] * x - p[1]

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        root = implicit_root(lambda x, a, b: x**3 + a * x - b, linear_solver=solver)
        return lambda p: root(torch.ones((), dtype=p.dtype), p[0], p[1]).reshape(1)

    p = torch.tensor([1.3, 2.1], dtype=torch.float64)
    return Problem("scalar cubic", layer, residual, torch.ones(1, dtype=torch.float64), p, SYMMETRIC)


def _network() -> Problem:
    # p: the weight (2, 2), the bias (2) of a linear module, an input (2).
    module = torch.nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)

    def residual(x: Tensor, p: Tensor) -> Tensor:
        return x - 0.6 * torch.tanh(p[:4].reshape(2, 2) @ x + p[4:6]) - torch.sin(p[6:])

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        def solve(p: Tensor) -> Tensor:
            parameters = {"weight": p[:4].reshape(2, 2), "bias": p[4:6]}

            def of_module(x: Tensor, signal: Tensor) -> Tensor:
                return x - 0.6 * torch.tanh(functional_call(module, parameters, (x,))) - torch.sin(signal)

            return implicit_root(of_module, linear_solver=solver)(torch.zeros(2, dtype=p.dtype), p[6:])

        return solve

    return Problem("network root", layer, residual, torch.zeros(2, dtype=torch.float64), _numbers(8, seed=1, scale=0.6), CONTRACTIVE)


def _objective(x: Tensor, p: Tensor) -> Tensor:
    curvature = p[:4].reshape(2, 2)
    return torch.cosh(x).sum() + ((curvature @ x) ** 2).sum() / 2 - (x * p[4:] ** 2).sum()


def _minimum() -> Problem:
    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        root = implicit_root(conditions.stationarity(_objective), linear_solver=solver, symmetric=True)
        return lambda p: root(torch.zeros(2, dtype=p.dtype), p)

    p = _numbers(6, seed=2, scale=0.8)
    return Problem("stationarity", layer, grad(_objective), torch.zeros(2, dtype=torch.float64), p, SYMMETRIC)


def _fixed_point() -> Problem:
    def step(x: Tensor, p: Tensor) -> Tensor:
        return 0.5 * torch.sin(p[:4].reshape(2, 2) @ x) + p[4:] / (1 + x**2)

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        solve = implicit_fixed_point(step, linear_solver=solver)
        return lambda p: solve(torch.zeros(2, dtype=p.dtype), p)

    p = torch.cat([_numbers(4, seed=3, scale=0.4), torch.tensor([0.3, -0.4], dtype=torch.float64)])
    return Problem("fixed point", layer, lambda x, p: x - step(x, p), torch.zeros(2, dtype=torch.float64), p, CONTRACTIVE)


def _system() -> Problem:
    # A u = b with a nonsymmetric A that depends on p, which the product closes over.
    fixed = torch.tensor([[1.0, 0.4, -0.2], [-0.3, 1.1, 0.3], [0.1, -0.2, 0.9]], dtype=torch.float64)

    def matrix(p: Tensor) -> Tensor:
        return fixed + 0.2 * torch.outer(torch.sin(p[:3]), p[3:])

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        def solve(p: Tensor) -> Tensor:
            A = matrix(p)
            return linear_solve(lambda u: A @ u, p[:3] ** 2 + p[3:], method=solver).x

        return solve

    def residual(x: Tensor, p: Tensor) -> Tensor:
        return matrix(p) @ x - p[:3] ** 2 - p[3:]

    return Problem("linear system", layer, residual, torch.zeros(3, dtype=torch.float64), _numbers(6, seed=4, scale=0.7), CONTRACTIVE)


def _matrix() -> Problem:
    # As above with the matrix given, its own cholesky included; both A and b move.
    def matrix(p: Tensor) -> Tensor:
        factor = torch.eye(2, dtype=p.dtype) + p[:4].reshape(2, 2)
        return factor @ factor.mT + torch.eye(2, dtype=p.dtype)

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        return lambda p: linear_solve(matrix(p), p[4:], method=solver, symmetric=True).x

    def residual(x: Tensor, p: Tensor) -> Tensor:
        return matrix(p) @ x - p[4:]

    return Problem("matrix", layer, residual, torch.zeros(2, dtype=torch.float64), _numbers(6, seed=5, scale=0.5), SYMMETRIC)


def _tree() -> Problem:
    # Unknowns in a dictionary with a scalar and an integer leaf.
    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        def residual(x: dict[str, Tensor], args: dict[str, Tensor]) -> dict[str, Tensor]:
            level, slope = x["level"], x["slope"]
            first = level + 0.3 * torch.tanh(slope).sum() * args["gain"] - args["target"][0]
            second = slope + 0.2 * level * args["mix"] - args["target"][x["which"]] * torch.cos(slope)
            return {"level": first, "slope": second, "which": x["which"]}

        root = implicit_root(residual, linear_solver=solver)

        def solve(p: Tensor) -> Tensor:
            start = {"level": torch.zeros((), dtype=p.dtype), "slope": torch.zeros(2, dtype=p.dtype), "which": torch.tensor([0, 1])}
            found = root(start, {"gain": p[0], "mix": p[1:3], "target": p[3:]})
            return torch.cat([found["level"].reshape(1), found["slope"]])

        return solve

    def residual(x: Tensor, p: Tensor) -> Tensor:
        first = x[:1] + 0.3 * torch.tanh(x[1:]).sum() * p[0] - p[3]
        return torch.cat([first, x[1:] + 0.2 * x[0] * p[1:3] - p[3:] * torch.cos(x[1:])])

    return Problem("pytree", layer, residual, torch.zeros(3, dtype=torch.float64), _numbers(5, seed=6, scale=0.5), CONTRACTIVE)


def _ridge() -> Problem:
    design = _numbers(5, 2, seed=7)

    def loss(w: Tensor, p: Tensor) -> Tensor:
        return ((design @ w - p[:5]) ** 2).sum() / 2 + torch.exp(p[5]) * (w**2).sum() / 2

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        residual = conditions.stationarity(loss)

        @custom_root(residual, linear_solver=solver, symmetric=True)
        def fit(start: None, p: Tensor) -> Tensor:
            return torch.linalg.lstsq(
                torch.cat([design, torch.exp(p[5] / 2) * torch.eye(2, dtype=p.dtype)]), torch.cat([p[:5], p.new_zeros(2)])
            ).solution

        return lambda p: fit(None, p)

    return Problem("ridge", layer, grad(loss), torch.zeros(2, dtype=torch.float64), _numbers(6, seed=8, scale=0.7), SYMMETRIC)


def _constrained() -> Problem:
    # min Σ exp(x) + ½ (x − c)² + (w·x)² subject to a·x = d; p = (c, w, a, d): a symmetric indefinite system, where
    # bicgstab breaks down (it says so): the last unit vector e has eᵀ A e = 0.
    def objective(x: Tensor, p: Tensor) -> Tensor:
        return (x.exp() + (x - p[:2]) ** 2 / 2).sum() + (p[2:4] @ x) ** 2

    def equality(x: Tensor, p: Tensor) -> Tensor:
        return (p[4:6] @ x - p[6]).reshape(1)

    def layer(solver: str) -> Callable[[Tensor], Tensor]:
        root = implicit_root(conditions.kkt(objective, equality), linear_solver=solver, symmetric=True)
        return lambda p: torch.cat(root((torch.zeros(2, dtype=p.dtype), torch.zeros(1, dtype=p.dtype)), p))

    def residual(x: Tensor, p: Tensor) -> Tensor:
        lagrangian = grad(lambda z: objective(z, p) + x[2] * equality(z, p)[0])
        return torch.cat([lagrangian(x[:2]), equality(x[:2], p)])

    return Problem(
        "kkt", layer, residual, torch.zeros(3, dtype=torch.float64), _numbers(7, seed=9, scale=0.7), ("auto", "lu", "normal_cg", "gmres")
    )


PROBLEMS = (_cubic(), _network(), _minimum(), _fixed_point(), _system(), _matrix(), _tree(), _ridge(), _constrained())


def cases() -> list[Case]:
    """Every problem with every linear solver that applies to it."""
    return [Case(problem, solver) for problem in PROBLEMS for solver in problem.solvers]


Layer = Callable[[Tensor], Tensor]


def _scalar(layer: Layer) -> Layer:
    """A nonlinear scalar function of x."""
    return lambda p: (torch.linspace(0.5, 1.5, (x := layer(p)).shape[-1], dtype=p.dtype) * (x + x**2)).sum()


def _backward(layer: Layer, p: Tensor, order: int) -> Tensor:
    p = p.clone().requires_grad_()
    value = _scalar(layer)(p)
    for _ in range(order - 1):
        (slope,) = torch.autograd.grad(value, p, create_graph=True)
        value = (slope * _direction(p)).sum()
    return torch.autograd.grad(value, p)[0]


def _direction(p: Tensor) -> Tensor:
    return torch.linspace(1.0, -0.7, p.shape[-1], dtype=p.dtype)


def _forward_ad(layer: Layer, p: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(p, _direction(p)))).tangent


def _pull_back(layer: Layer, p: Tensor) -> Tensor:
    x, pullback = vjp(layer, p)
    return pullback(torch.linspace(1.0, 2.0, x.shape[-1], dtype=p.dtype))[0]


def _push(layer: Layer) -> Layer:
    return lambda p: jvp(layer, (p,), (_direction(p),))[1]


def _batch(p: Tensor) -> Tensor:
    """Parameters ``(2, 2, k)`` near ``p``."""
    return p * (1 + _numbers(2, 2, 1, seed=11, scale=0.1)) + _numbers(2, 2, p.shape[-1], seed=12, scale=0.03)


ONE_POINT: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "backward": lambda layer, p: _backward(layer, p, 1),
    "double backward": lambda layer, p: _backward(layer, p, 2),
    "triple backward": lambda layer, p: _backward(layer, p, 3),
    "grad": lambda layer, p: grad(_scalar(layer))(p),
    "vjp": _pull_back,
    "jvp": lambda layer, p: _push(layer)(p),
    "jacrev": lambda layer, p: jacrev(layer)(p),
    "jacfwd": lambda layer, p: jacfwd(layer)(p),
    "hessian": lambda layer, p: hessian(_scalar(layer))(p),
    "jacrev³": lambda layer, p: jacrev(jacrev(jacrev(_scalar(layer))))(p),
    "jacfwd³": lambda layer, p: jacfwd(jacfwd(jacfwd(_scalar(layer))))(p),
    "jvp∘jvp": lambda layer, p: _push(_push(layer))(p),
    "forward_ad": _forward_ad,
}
# What vmap maps; the reference is a loop of it.
MANY_POINTS: dict[str, Callable[[Layer], Layer]] = {
    "vmap": lambda layer: layer,
    "vmap(grad)": lambda layer: grad(_scalar(layer)),
    "vmap(jacrev)": lambda layer: jacrev(layer),
    "vmap(hessian)": lambda layer: hessian(_scalar(layer)),
}
TRANSFORMS = (*ONE_POINT, *MANY_POINTS, "vmap(vmap)")


def error_of(case: Case, transform: str) -> float:
    """The error of one transform of one layer, relative to the largest entry of the exact result."""
    problem = case.problem
    layer = problem.layer(case.solver)
    points = _batch(problem.p)
    if transform in ONE_POINT:
        ours = ONE_POINT[transform](layer, problem.p)
    elif transform == "vmap(vmap)":
        ours = vmap(vmap(layer))(points)
    else:
        ours = vmap(MANY_POINTS[transform](layer))(points[0])
    return relative_error(ours, _exact(problem, transform))


@functools.cache
def _exact(problem: Problem, transform: str) -> Tensor:
    # Forward and reverse mode of the reference give one and the same tensor; the latter takes a tenth of the time.
    transform = {"jacfwd": "jacrev", "jacfwd³": "jacrev³"}.get(transform, transform)
    if transform in ONE_POINT:
        return ONE_POINT[transform](problem.reference, problem.p).detach()
    points = _batch(problem.p)
    if transform == "vmap(vmap)":
        return torch.stack([torch.stack([problem.reference(p) for p in row]) for row in points]).detach()
    function = MANY_POINTS[transform](problem.reference)
    return torch.stack([function(p) for p in points[0]]).detach()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything in it is not within the tolerance."""
    parser = argparse.ArgumentParser(description="The matrix of transforms × problems × linear solvers.")
    parser.add_argument("problem", nargs="*", help="only problems whose name contains one of these words")
    words = parser.parse_args(arguments).problem
    chosen = [case for case in cases() if not words or any(word in case.problem.name for word in words)]
    width = max(len(str(case)) for case in chosen)
    for i, transform in enumerate(TRANSFORMS):
        print(f"{chr(ord('a') + i)} {transform}", end="\n" if i % 6 == 5 or i == len(TRANSFORMS) - 1 else "   ")
    print(f"\n{'problem / linear solver':{width}}  " + " ".join(chr(ord("a") + i) for i in range(len(TRANSFORMS))) + "  worst error")
    begin, failures = time.perf_counter(), []
    for case in chosen:
        errors, marks = {}, []
        for transform in TRANSFORMS:
            try:
                errors[transform] = error_of(case, transform)
            except Exception as error:  # a cell that crashes is red, and the others are still of interest
                errors[transform] = torch.inf
                failures.append(f"{case}, {transform}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            marks.append("✓" if errors[transform] <= TOLERANCE else "✗")
            if "✗" in marks[-1] and errors[transform] < torch.inf:
                failures.append(f"{case}, {transform}: relative error {errors[transform]:.1e}")
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
        print(f"{case!s:{width}}  {' '.join(marks)}  {errors[worst]:.0e} {worst}", flush=True)
    cells = len(chosen) * len(TRANSFORMS)
    print(f"\n{cells - len(failures)} of {cells} within {TOLERANCE:.0e}, in {time.perf_counter() - begin:.0f} s")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
