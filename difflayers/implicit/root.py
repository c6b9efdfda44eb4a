r"""Roots as layers: x(θ) with F(x, θ) = 0, differentiable in θ to any order.

The forward pass runs a solver and keeps nothing of its iterations. Every derivative comes from the implicit function
theorem, ∂x/∂θ = −(∂F/∂x)⁻¹ ∂F/∂θ (see :mod:`difflayers.implicit.function`). ``implicit_root`` brings the solver, ``custom_root`` wraps one
that you already have, ``root_vjp`` and ``root_jvp`` give single products at a known solution.

References: Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022, arXiv:2105.15183;
Griewank and Walther, Evaluating Derivatives, SIAM 2008, chapter 15.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import solvers
from ..errors import ShapeError
from ..pytree import Raveler
from ..solution import OnFailure, Solution, Status, report_failures
from ..solvers.linearize import jvp
from .call import call_outside
from .closure import hoist, visible_to_modes
from .eager import eager
from .function import Problem, check_residual, nan_free, nan_where_failed, solve_implicitly
from .methods import LinearMethod

__all__ = ["ImplicitRoot", "custom_root", "implicit_root", "root_jvp", "root_vjp"]

LinearSolver = str | Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def implicit_root(
    residual_fn: Callable[..., Any],
    solver: str | Callable[..., Any] = "newton",
    *,
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
    has_aux: bool = False,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> ImplicitRoot:
    """The root of ``residual_fn`` as a differentiable function of its arguments.

    Args:
        residual_fn: ``(x, *args) -> residual`` with the structure and shapes of x; with ``has_aux`` it returns
            ``(residual, aux)``. Tensors that it closes over, module parameters included, are differentiated as well.
        solver: ``"newton"``, ``"broyden"``, ``"levenberg_marquardt"``, or a callable. A callable that takes ``batch_ndim``
            is called as the solvers of :mod:`difflayers.solvers`, on rows ``(*batch, n)``; any other is called
            as ``solver(residual, x0)`` with x's own structure, once for each element that vmap adds.
        linear_solver: how the derivative's linear systems are solved: "auto", "lu", "cholesky", "cg", "normal_cg", "gmres",
            "bicgstab", "neumann", or a callable ``(matvec, b) -> u``. "auto" factorizes small Jacobians (up to 2·10⁶ entries in a batch),
            and is matrix-free above.
        symmetric: ∂F/∂x is symmetric. It only chooses the solver; derivatives stay exact in every entry.
        has_aux: ``residual_fn`` returns ``(residual, aux)``; the callable then returns ``(x, aux)``, aux evaluated at the solution.
        batch_ndim: the first ``batch_ndim`` dimensions of every leaf of x index independent problems.
        tol: relative to the scale of the problem; None follows the dtype.
        max_iter: iteration limit of the solver.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Returns:
        An :class:`ImplicitRoot`, called as ``(x0, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import implicit_root
        >>> cube_root = implicit_root(lambda x, a: x**3 - a)
        >>> a = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        >>> x = cube_root(torch.ones_like(a), a)
        >>> gradient, = torch.autograd.grad(x, a, create_graph=True)
        >>> print(f"{x.item():.4f} {gradient.item():.4f} {torch.autograd.grad(gradient, a)[0].item():.4f}")
        2.0000 0.0833 -0.0069
    """
    return ImplicitRoot(
        residual_fn,
        solver,
        LinearMethod(linear_solver, symmetric=symmetric),
        has_aux=has_aux,
        batch_ndim=batch_ndim,
        tol=tol,
        max_iter=max_iter,
        on_failure=on_failure,
    )


class ImplicitRoot:
    """What :func:`implicit_root` returns: ``(x0, *args) -> x``; ``.solve`` adds status, residual and iterations."""

    solvers: tuple[str, ...] = ("newton", "broyden", "levenberg_marquardt")

    def __init__(
        self,
        residual_fn: Callable[..., Any],
        solver: str | Callable[..., Any],
        linear: LinearMethod,
        *,
        has_aux: bool = False,
        batch_ndim: int = 0,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        self.residual_fn, self.solver, self.linear = residual_fn, solver, linear
        self.has_aux, self.batch_ndim = has_aux, batch_ndim
        self.tol, self.max_iter, self.on_failure = tol, max_iter, on_failure
        if not callable(solver) and solver not in self.solvers:
            raise ValueError(f"solver {solver!r} is not known; choose one of {', '.join(self.solvers)}, or pass a callable")
        self._is_batched = not callable(solver) or "batch_ndim" in inspect.signature(solver).parameters

    @eager
    def __call__(self, x0: Any, *args: Any) -> Any:
        """Solve from ``x0``; no derivative flows to ``x0``.

        Args:
            x0: a pytree of tensors, the starting point.
            args: pytrees; every floating tensor in them is differentiated.

        Returns:
            x with the structure of ``x0``; with ``has_aux`` the pair ``(x, aux)``.
        """
        x = self.solve(x0, *args).x
        if not self.has_aux:
            return x
        return x, self.residual_fn(x, *args)[1]

    @eager
    def solve(self, x0: Any, *args: Any) -> Solution:
        """As the call, with ``status``, ``residual`` and ``iterations``, each ``(*batch,)``.

        Args:
            x0: a pytree of tensors, the starting point.
            args: pytrees, as in the call.
        """
        raveler = Raveler(x0, self.batch_ndim)
        start = raveler.ravel(x0)
        leaves, spec = _pytree.tree_flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def rows(x: Tensor, *tensors: Tensor) -> Tensor:
            full = list(leaves)
            for i, tensor in zip(moving, tensors, strict=True):
                full[i] = tensor
            return raveler.ravel(self._residual(raveler.unravel(x), *_pytree.tree_unflatten(full, spec)))

        tensors = [leaves[i] for i in moving]
        explicit, captured, first = hoist(rows, start, *tensors, of=self.residual_fn)
        check_residual(first, start)
        split = len(captured)

        def residual(x: Tensor, *theta: Tensor) -> Tensor:
            return explicit(theta[:split], x, *theta[split:])

        def find(residual: Callable[[Tensor], Tensor], x0: Tensor, batch_ndim: int) -> Solution:
            found = self._find(raveler, residual, x0, batch_ndim)
            explicit.watch()
            return found

        problem = Problem(
            residual, find, self.linear, batch_ndim=self.batch_ndim, elementwise=not self._is_batched, on_failure=self.on_failure
        )
        start, *theta = visible_to_modes([start, *captured, *tensors])
        if self.on_failure != "nan":
            found = solve_implicitly(problem, start, theta)
            return found._replace(x=raveler.unravel(found.x))
        lost = ~torch.isfinite(first).all(-1)
        found = solve_implicitly(problem, start, nan_free(theta, lost))
        found = found._replace(status=torch.where(lost, int(Status.NUMERICAL_ERROR), found.status))
        return found._replace(x=raveler.unravel(nan_where_failed(found, "nan")))

    def _residual(self, x: Any, *args: Any) -> Any:
        value = self.residual_fn(x, *args)
        return value[0] if self.has_aux else value

    def _wants_map(self) -> bool:
        """Whether the solver is written for x = T(x): the roots of F are the fixed points of T(x) = x − F(x)."""
        return self.solver == "broyden"

    def _as_map(self, residual: Callable[[Tensor], Tensor], x0: Tensor) -> Callable[[Tensor], Tensor]:
        scale = _slope(residual, x0)
        return lambda x: x - residual(x) / scale

    def _find(self, raveler: Raveler, residual: Callable[[Tensor], Tensor], x0: Tensor, batch_ndim: int) -> Solution:
        options = {name: value for name, value in (("tol", self.tol), ("max_iter", self.max_iter)) if value is not None}
        function = self._as_map(residual, x0) if self._wants_map() else residual
        if callable(self.solver) and not self._is_batched:
            found = self.solver(lambda x: raveler.unravel(function(raveler.ravel(x))), raveler.unravel(x0))
        else:
            solver = self.solver if callable(self.solver) else getattr(solvers, self.solver)
            found = solver(function, x0, batch_ndim=batch_ndim, **options)
        solution = _as_solution(found, raveler, x0, residual, self.tol)
        report_failures(
            solution._replace(x=raveler.unravel(solution.x)), getattr(self.solver, "__name__", str(self.solver)), self.on_failure
        )
        return solution


def _slope(residual: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """How steep F is along itself at the start, with its sign: F over this is in the units of x, and so is the map x − F(x)."""
    value = residual(x0)
    change = jvp(residual, (x0,), (value,))[1]
    lengths = torch.linalg.vector_norm(change, dim=-1, keepdim=True) / torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    slope = torch.where((value * change).sum(-1, keepdim=True) < 0, -lengths, lengths)
    return torch.where(torch.isfinite(slope) & (slope != 0), slope, 1.0)


def custom_root(
    residual_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
    on_failure: OnFailure = "raise",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a solver that you already have differentiable: SciPy, a C library, a loop of your own.

    The solver is called with plain, detached tensors and never differentiated. Under vmap it is called element by element.

    Args:
        residual_fn: ``(x, *args) -> residual``, zero at the solution, with x's structure. It is what gets differentiated,
            with everything that it closes over.
        has_aux: the solver returns ``(x, aux)``; aux is passed through without a derivative.
        linear_solver: as in :func:`implicit_root`.
        symmetric: ∂F/∂x is symmetric (the residual is the gradient of something).
        on_failure: what to do if the derivative's linear system is singular: ``"raise"``, ``"nan"`` or ``"warn"``.

    Returns:
        A decorator for ``solve(x0, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import custom_root
        >>> @custom_root(lambda x, a: x * x - a)
        ... def square_root(x0, a):
        ...     return a.sqrt()
        >>> torch.func.grad(lambda a: square_root(None, a))(torch.tensor(4.0))
        tensor(0.2500)
    """
    linear = LinearMethod(linear_solver, symmetric=symmetric)

    def decorate(solve: Callable[..., Any]) -> Callable[..., Any]:
        @eager
        @functools.wraps(solve)
        def wrapped(x0: Any, *args: Any) -> Any:
            return _attach(solve, residual_fn, linear, x0, args, has_aux, on_failure)

        return wrapped

    return decorate


def root_vjp(
    residual_fn: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    *,
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
) -> tuple[Any, ...]:
    """The cotangent of x pulled back to ``args`` through ``F(x, *args) = 0``, at a known solution.

    Args:
        residual_fn: ``(x, *args) -> residual`` with x's structure.
        x: a solution; a pytree.
        args: the arguments to differentiate, pytrees of floating tensors.
        cotangent: like x.
        linear_solver: as in :func:`implicit_root`.
        symmetric: ∂F/∂x is symmetric.

    Returns:
        One cotangent for each element of ``args``, with its structure.

    Example:
        >>> import torch
        >>> from difflayers.implicit import root_vjp
        >>> root_vjp(lambda x, a: x * x - a, torch.tensor(3.0), (torch.tensor(9.0),), torch.tensor(1.0))
        (tensor(0.1667),)
    """
    pullback = torch.func.vjp(_known_root(residual_fn, x, linear_solver, symmetric), *args)[1]
    return pullback(cotangent)


def root_jvp(
    residual_fn: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
) -> Any:
    """The derivative of x along ``tangents`` of ``args`` through ``F(x, *args) = 0``, at a known solution.

    Args:
        residual_fn: ``(x, *args) -> residual`` with x's structure.
        x: a solution; a pytree.
        args: the arguments that move, pytrees of floating tensors.
        tangents: like ``args``.
        linear_solver: as in :func:`implicit_root`.
        symmetric: ∂F/∂x is symmetric.

    Returns:
        The tangent of x, with its structure.

    Example:
        >>> import torch
        >>> from difflayers.implicit import root_jvp
        >>> root_jvp(lambda x, a: x * x - a, torch.tensor(3.0), (torch.tensor(9.0),), (torch.tensor(6.0),))
        tensor(1.)
    """
    return torch.func.jvp(_known_root(residual_fn, x, linear_solver, symmetric), args, tangents)[1]


def _known_root(residual_fn: Callable[..., Any], x: Any, linear_solver: LinearSolver, symmetric: bool) -> Callable[..., Any]:
    root = ImplicitRoot(residual_fn, _stay, LinearMethod(linear_solver, symmetric=symmetric))
    return lambda *args: root(x, *args)


def _stay(residual: Callable[..., Any], x0: Any, *, batch_ndim: int) -> Any:
    """The solver of a problem that is solved already."""
    return x0


def _attach(
    solve: Callable[..., Any],
    residual_fn: Callable[..., Any],
    linear: LinearMethod,
    x0: Any,
    args: tuple[Any, ...],
    has_aux: bool,
    on_failure: OnFailure,
) -> Any:
    """Call ``solve`` on detached tensors, then attach its solution to ``args`` through the residual."""
    value = call_outside(solve, x0, args)
    x, aux = value if has_aux else (value, None)
    root = ImplicitRoot(residual_fn, _stay, linear, on_failure=on_failure)
    attached = root(x, *args)
    return (attached, aux) if has_aux else attached


def _as_solution(found: Any, raveler: Raveler, x0: Tensor, residual: Callable[[Tensor], Tensor], tol: float | None) -> Solution:
    """What a solver returned, as a Solution in rows; a bare x gets its residual measured."""
    if isinstance(found, Solution):
        x = found.x if isinstance(found.x, Tensor) and found.x.shape == x0.shape else raveler.ravel(found.x)
        return found._replace(x=x)
    x = found if isinstance(found, Tensor) and found.shape == x0.shape else raveler.ravel(found)
    if x.shape != x0.shape or x.dtype != x0.dtype:
        raise ShapeError(
            f"the solver returned rows of shape {tuple(x.shape)} and {x.dtype} for a start of {tuple(x0.shape)} and {x0.dtype}"
        )
    size = torch.linalg.vector_norm(residual(x), dim=-1)
    status = torch.where(torch.isfinite(size), int(Status.SOLVED), int(Status.NUMERICAL_ERROR))
    if tol is not None:
        status = torch.where(size > tol, int(Status.MAX_ITER), status)
    return Solution(x, status, size, torch.zeros_like(status))
