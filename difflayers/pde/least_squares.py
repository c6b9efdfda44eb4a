r"""The solution of a nonlinear least-squares problem as a function of its data.

.. math:: w^*(θ) = \operatorname{argmin}_w \tfrac12 \|r(w, θ)\|^2

is a root of the gradient, F(w, θ) = Jᵀr = 0 with J = ∂r/∂w, whose derivative is the Hessian

.. math:: A = J^T J + \sum_i r_i ∇^2 r_i .

So a cotangent g of w* pulls back to θ as −∂/∂θ (uᵀJᵀr) with A u = g, through the core. **Gauss–Newton** leaves out the second term of A: it
is cheaper, and the derivative is off by an amount that grows with the residual and with the curvature of r; it is exact where r is zero or
linear.

Method: Levenberg–Marquardt until the scaled gradient is below the tolerance, then steps of Newton's method with one factor of A. They take
the error of w* from the tolerance to rounding, and the factor says whether the minimum is isolated: where A is singular, w* is not unique,
its derivative does not exist, and the status says so.

References: Nocedal and Wright, Numerical Optimization, 2006, chapter 10; Björck, Numerical Methods for Least Squares Problems, 1996.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..implicit.broadcasting import not_there
from ..implicit.closure import Explicit
from ..implicit.function import Problem
from ..implicit.methods import LinearMethod
from ..pytree import is_floating
from ..solution import OnFailure, Solution, Status, report_failures
from ..solvers import gauss_newton, levenberg_marquardt
from ..solvers.dense import cholesky_factor
from ..solvers.linearize import block_jacobian, jvp, vjp
from ..solvers.loop import norm, relative

__all__ = ["Fit", "FitOptions", "LeastSquares", "RowSystem"]

_POLISHING_STEPS = 3
# Bases are nearly dependent. A larger μ holds the steps back where J is flat, and takes twice as many.
_DAMPING = 1e-6


class Fit(NamedTuple):
    """What a solve found, in rows.

    Attributes:
        x: ``(*batch, n)``, the minimizer.
        status: ``(*batch,)``.
        residual: ``(*batch,)``, the scaled gradient.
        iterations: ``(*batch,)``.
        residual_norm: ``(*batch,)``, ‖r‖₂.
    """

    x: Tensor
    status: Tensor
    residual: Tensor
    iterations: Tensor
    residual_norm: Tensor


@dataclass(frozen=True)
class FitOptions:
    """How a least-squares problem is solved and differentiated.

    Args:
        solver: "lm", "gauss_newton", or a callable as those of :mod:`difflayers.solvers` (``(residual_fn, x0, *, batch_ndim)``).
        hessian: "exact" or "gauss_newton".
        tol: for the scaled gradient of :mod:`difflayers.solvers.least_squares`.
        max_iter: trial points.
        precision: the dtype of the first iterations. The last ones, and derivatives, are in that of the unknowns.
        on_failure: "raise", "nan" or "warn".
        what: the name of the solve, for messages.
    """

    solver: str | Callable[..., Solution] = "lm"
    hessian: str = "exact"
    tol: float = 1e-8
    max_iter: int = 100
    precision: torch.dtype = torch.float64
    on_failure: OnFailure = "raise"
    what: str = "least squares"


class RowSystem(abc.ABC):
    """The rows r(w, θ) of a batch of problems, and what the solver and the derivative want of them.

    A subclass that knows the structure of its rows overrides more than :meth:`rows`.
    """

    @abc.abstractmethod
    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        """r as ``(*batch, m)``, with w ``(*batch, n)``."""

    def gradient(self, w: Tensor, *theta: Any) -> Tensor:
        """Jᵀr as ``(*batch, n)``, in operations that can be differentiated."""
        r, pullback = vjp(lambda w: self.rows(w, *theta), w)
        return pullback(r)[0]

    def normal_equations(self, w: Tensor, *theta: Any) -> tuple[Tensor, Tensor]:
        """JᵀJ and Jᵀr."""
        jacobian = block_jacobian(lambda w: self.rows(w, *theta), w)
        return jacobian.mT @ jacobian, (self.rows(w, *theta)[..., None, :] @ jacobian).squeeze(-2)

    def hessian(self, w: Tensor, *theta: Any) -> Tensor:
        """JᵀJ + Σ rᵢ∇²rᵢ as ``(*batch, n, n)``."""
        return block_jacobian(lambda w: self.gradient(w, *theta), w)

    def check(self, w: Tensor, theta: Sequence[Any]) -> None:  # noqa: B027  (optional)
        """Refuse data that do not have the structure which is made use of; called once a solve, on plain tensors."""

    def batched(self, in_dims: tuple[int | None, ...], randomness: str) -> RowSystem:
        """The system with one more leading batch dimension."""
        return _Mapped(self, in_dims, randomness)


class _Mapped(RowSystem):
    """A system under vmap, with the structure that it has."""

    def __init__(self, inner: RowSystem, in_dims: tuple[int | None, ...], randomness: str) -> None:
        self.inner = inner

        def mapped(method: Callable[..., Any]) -> Callable[..., Any]:
            return torch.func.vmap(method, in_dims=(0, *in_dims), randomness=randomness)

        self._rows, self._gradient = mapped(inner.rows), mapped(inner.gradient)
        self._normal, self._hessian = mapped(inner.normal_equations), mapped(inner.hessian)

    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        return self._rows(w, *theta)

    def gradient(self, w: Tensor, *theta: Any) -> Tensor:
        return self._gradient(w, *theta)

    def normal_equations(self, w: Tensor, *theta: Any) -> tuple[Tensor, Tensor]:
        return self._normal(w, *theta)

    def hessian(self, w: Tensor, *theta: Any) -> Tensor:
        return self._hessian(w, *theta)


class LeastSquares(Problem):
    """Jᵀr = 0 in the unknowns of a :class:`RowSystem`.

    Args:
        system: the rows; its θ are the problem's.
        options: how it is solved.
        batch_ndim: leading dimensions of w that index independent problems.
        seen: the user's functions, which check at the solution that they read what they had read at the start.
    """

    def __init__(self, system: RowSystem, options: FitOptions, *, batch_ndim: int, seen: Sequence[Explicit] = ()) -> None:
        linear = LinearMethod("cholesky", symmetric=True)
        super().__init__(system.gradient, not_there, linear, batch_ndim=batch_ndim, on_failure=options.on_failure)
        self.system, self.options, self.seen = system, options, seen

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve on plain tensors; a row that is not finite goes back to its starting point."""
        low = self.options.precision
        if low != x0.dtype:
            rough = self._search(x0.to(low), _cast(theta, low), tol=max(self.options.tol, 50 * torch.finfo(low).eps))
            start = torch.where(torch.isfinite(rough.x).all(-1, keepdim=True), rough.x, x0).to(x0.dtype)
        else:
            rough, start = None, x0
        theta = _cast(theta, x0.dtype)
        self.system.check(start, theta)
        found = self._search(start, theta, tol=self.options.tol)
        if rough is not None:
            found = found._replace(iterations=found.iterations + rough.iterations)
        fit = self._polish(found, theta)
        fit = fit._replace(x=torch.where(torch.isfinite(fit.x).all(-1, keepdim=True), fit.x, x0))
        report_failures(fit, self.options.what, self.options.on_failure)
        for explicit in self.seen:
            explicit.watch()
        return fit

    def _search(self, x0: Tensor, theta: Sequence[Any], tol: float) -> Solution:
        def rows(w: Tensor) -> Tensor:
            return self.system.rows(w, *theta)

        solver = self.options.solver
        if not isinstance(solver, str):
            return solver(rows, x0, batch_ndim=x0.dim() - 1)
        options: dict[str, Any] = {"batch_ndim": x0.dim() - 1, "tol": tol, "max_iter": self.options.max_iter}
        options["normal_equations"] = lambda w: self.system.normal_equations(w, *theta)
        if solver == "gauss_newton":
            return gauss_newton(rows, x0, **options)
        if self.options.hessian == "exact":
            options["hessian"] = lambda w: self.system.hessian(w, *theta)
        return levenberg_marquardt(rows, x0, damping=_DAMPING, **options)

    def _polish(self, found: Solution, theta: Sequence[Any]) -> Fit:
        """Newton steps with one factor of A, which also tells whether the minimum is isolated."""
        x, solved = found.x, found.status == Status.SOLVED
        factor = cholesky_factor(self.matrix((x, *theta)))
        status = torch.where(solved & factor.singular, int(Status.SINGULAR), found.status)
        gradient = self.system.gradient(x, *theta)
        moved = torch.zeros_like(found.residual)
        for _ in range(_POLISHING_STEPS):
            step = factor.solve(-gradient).x
            trial = torch.where((status == Status.SOLVED)[..., None] & torch.isfinite(step), x + step, x)
            trial_gradient = self.system.gradient(trial, *theta)
            better = norm(trial_gradient) < norm(gradient)
            if not bool(better.any()):
                break
            x, gradient = torch.where(better[..., None], trial, x), torch.where(better[..., None], trial_gradient, gradient)
            moved = torch.maximum(moved, torch.where(better, relative(norm(step), norm(x)), 0))
        # The factor stays good for the derivatives if the steps were rounding.
        if bool((moved <= 1e-13).all()):
            self._factor = factor
        return Fit(x, status, found.residual, found.iterations, norm(self.system.rows(x, *theta)))

    def matrix(self, point: Sequence[Any]) -> Tensor:
        """The Hessian, or its Gauss–Newton part."""
        x, *theta = point
        theta = _cast(theta, x.dtype)
        return self.system.hessian(x, *theta) if self.options.hessian == "exact" else self.system.normal_equations(x, *theta)[0]

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        """``u -> A u``."""
        if self.options.hessian == "exact":
            return super().operator(point, transpose)
        x, *theta = point

        def rows(w: Tensor) -> Tensor:
            return self.system.rows(w, *theta)

        def gauss_newton(u: Tensor) -> Tensor:
            return vjp(rows, x)[1](jvp(rows, (x,), (u,))[1])[0]

        return gauss_newton

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        """The same with one more batch dimension."""
        key = (in_dims, size, randomness)
        if key not in self._batched:
            system = self.system.batched(in_dims, randomness)
            self._batched[key] = LeastSquares(system, self.options, batch_ndim=self.batch_ndim + 1, seen=self.seen)
        return self._batched[key]


def _cast(theta: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [leaf.to(dtype) if is_floating(leaf) else leaf for leaf in theta]
