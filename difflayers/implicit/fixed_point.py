r"""Fixed points as layers: x(θ) with x = T(x, θ), differentiable in θ.

With F(x, θ) = x − T(x, θ) a fixed point is a root, and A = I − ∂T/∂x. What a training loop may choose is how A⁻¹ is
taken in the derivative:

========== ============================================== ======================================================
backward   what stands for Aᵀ⁻¹                           exact?
========== ============================================== ======================================================
"ift"      a linear solve                                 yes, to any order, to the tolerance of the solve
"neumann"  the first k terms of Σ (∂T/∂x)ᵀⁱ               in the limit k → ∞, if T is a contraction; error ≈ ρᵏ
"phantom"  k damped steps of T from the solution          in the limit k → ∞, likewise
"jfb"      the identity (one step of T from the solution) no; a descent direction for strong contractions
"unroll"   autograd through every step from x0            in the limit of many steps; memory grows with the steps
========== ============================================== ======================================================

The approximate modes cost less per step and are what the literature trains with; a derivative of a derivative taken
through them is as approximate as the first.

References: Bai, Kolter, Koltun, Deep Equilibrium Models, NeurIPS 2019, arXiv:1909.01377; Fung et al., JFB: Jacobian-free
backpropagation, AAAI 2022, arXiv:2103.12803; Geng et al., On training implicit models, NeurIPS 2021, arXiv:2111.05177.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from ..errors import ShapeError
from ..pytree import is_floating
from ..solution import OnFailure, Solution, Status
from .eager import eager
from .methods import LinearMethod
from .root import ImplicitRoot, LinearSolver, custom_root

__all__ = ["Backward", "ImplicitFixedPoint", "custom_fixed_point", "implicit_fixed_point"]

Backward = Literal["ift", "jfb", "phantom", "neumann", "unroll"]
_MODES = ("ift", "jfb", "phantom", "neumann", "unroll")


def implicit_fixed_point(
    map_fn: Callable[..., Any],
    solver: str | Callable[..., Any] = "anderson",
    *,
    backward: Backward = "ift",
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
    has_aux: bool = False,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int | None = None,
    neumann_terms: int = 10,
    phantom_steps: int = 5,
    damping: float = 0.5,
    on_failure: OnFailure = "raise",
) -> ImplicitFixedPoint:
    """The fixed point of ``map_fn`` as a differentiable function of its arguments.

    Args:
        map_fn: ``(x, *args) -> x`` with the structure and shapes of x; with ``has_aux`` it returns ``(x, aux)``. Tensors
            that it closes over, module parameters included, are differentiated as well.
        solver: ``"anderson"``, ``"picard"``, ``"broyden"``, ``"newton"``, or a callable as in :func:`implicit_root`
            (it is given the map in place of the residual).
        backward: how it is differentiated; only "ift" is exact (see the table of this module).
        linear_solver: the linear solver of "ift", as in :func:`implicit_root`.
        symmetric: ∂T/∂x is symmetric; it only chooses the linear solver.
        has_aux: the callable returns ``(x, aux)``, aux evaluated at the fixed point.
        batch_ndim: the first ``batch_ndim`` dimensions of every leaf of x index independent problems.
        tol: relative to the size of the fixed point; None follows the dtype.
        max_iter: iteration limit of the solver; the number of steps of "unroll" (100 if None).
        neumann_terms: how many terms of the series the mode "neumann" sums.
        phantom_steps: how many damped steps the mode "phantom" takes.
        damping: the weight τ of the new value in a phantom step, (1 − τ) x + τ T(x).
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Returns:
        An :class:`ImplicitFixedPoint`, called as ``(x0, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import implicit_fixed_point
        >>> babylonian = implicit_fixed_point(lambda x, a: (x + a / x) / 2)
        >>> a = torch.tensor(9.0, dtype=torch.float64)
        >>> x, slope = torch.func.jvp(lambda a: babylonian(torch.ones_like(a), a), (a,), (torch.ones_like(a),))
        >>> print(f"{x.item():.4f} {slope.item():.4f}")
        3.0000 0.1667
    """
    if backward not in _MODES:
        raise ValueError(f"backward={backward!r} is not known; choose one of {', '.join(_MODES)}")
    linear = LinearMethod(linear_solver, symmetric=symmetric)
    if backward == "neumann":
        linear = LinearMethod("neumann", max_iter=neumann_terms, truncated=True)
    return ImplicitFixedPoint(
        map_fn,
        solver,
        linear,
        backward=backward,
        steps={"jfb": (1, 1.0), "phantom": (phantom_steps, damping), "unroll": (max_iter or 100, 1.0)}.get(backward, (0, 1.0)),
        has_aux=has_aux,
        batch_ndim=batch_ndim,
        tol=tol,
        max_iter=max_iter,
        on_failure=on_failure,
    )


class ImplicitFixedPoint(ImplicitRoot):
    """What :func:`implicit_fixed_point` returns: ``(x0, *args) -> x``; ``.solve`` adds status, residual and iterations."""

    solvers = ("anderson", "picard", "broyden", "newton")

    def __init__(
        self,
        map_fn: Callable[..., Any],
        solver: str | Callable[..., Any],
        linear: LinearMethod,
        *,
        backward: Backward = "ift",
        steps: tuple[int, float] = (0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(map_fn, solver, linear, **options)
        self.backward, self.steps = backward, steps

    @eager
    def solve(self, x0: Any, *args: Any) -> Solution:
        """As the call, with ``status``, ``residual`` and ``iterations``, each ``(*batch,)``.

        Args:
            x0: a pytree of tensors, the starting point.
            args: pytrees, as in the call.
        """
        if self.backward in ("ift", "neumann"):
            return super().solve(x0, *args)
        if self.backward == "unroll":
            x = self._steps(_detached(x0), args)
            # The check runs inside the core, where every element is a plain tensor, whatever transforms are on.
            check = ImplicitFixedPoint(self.residual_fn, "picard", self.linear, **self._options(max_iter=1, tol=self._unroll_tol(x)))
            found = check.solve(_detached(x), *_detached(args))
            return found._replace(x=self._choose(found.status, x, torch.nan) if self.on_failure == "nan" else x)
        with torch.no_grad():
            found = super().solve(_detached(x0), *_detached(args))
        if self.on_failure != "nan":
            return found._replace(x=self._steps(_detached(found.x), args))
        start = self._choose(found.status, _detached(found.x), _detached(x0))
        return found._replace(x=self._choose(found.status, self._steps(start, args), torch.nan))

    def _choose(self, status: Tensor, x: Any, otherwise: Any) -> Any:
        """``x`` in the elements that are solved, ``otherwise`` (a tree like it, or a number) in the others."""
        if isinstance(otherwise, float):
            otherwise = _pytree.tree_map(lambda _: otherwise, x)

        def choose(a: Any, b: Any) -> Any:
            if not is_floating(a):
                return a
            solved = (status == Status.SOLVED).reshape((*status.shape, *[1] * (a.dim() - status.dim())))
            return torch.where(solved, a, b)

        return _pytree.tree_map(choose, x, otherwise)

    def _steps(self, x: Any, args: tuple[Any, ...]) -> Any:
        count, damping = self.steps
        for _ in range(count):
            new = _fitting(x, super()._residual(x, *args))
            if damping != 1.0:
                new = _pytree.tree_map(lambda a, b: a + damping * (b - a) if is_floating(a) else a, x, new)
            x = new
        return x

    def _residual(self, x: Any, *args: Any) -> Any:
        return _difference(x, super()._residual(x, *args))

    def _wants_map(self) -> bool:
        return self.solver != "newton"

    def _as_map(self, residual: Callable[[Tensor], Tensor], x0: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x - residual(x)  # the user's map, at its own scale

    def _options(self, **changed: Any) -> dict[str, Any]:
        names = ("has_aux", "batch_ndim", "tol", "max_iter", "on_failure")
        return {name: getattr(self, name) for name in names} | changed

    def _unroll_tol(self, x: Any) -> float:
        if self.tol is not None:
            return self.tol
        dtype = next(leaf.dtype for leaf in _pytree.tree_leaves(x) if is_floating(leaf))
        return torch.finfo(dtype).eps ** 0.5


def custom_fixed_point(
    map_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    linear_solver: LinearSolver = "auto",
    symmetric: bool = False,
    on_failure: OnFailure = "raise",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a fixed-point iteration that you already have differentiable, by the fixed point's own equation.

    Args:
        map_fn: ``(x, *args) -> x``, whose fixed point the solver returns.
        has_aux: the solver returns ``(x, aux)``; aux is passed through without a derivative.
        linear_solver: as in :func:`implicit_root`.
        symmetric: ∂T/∂x is symmetric.
        on_failure: what to do if I − ∂T/∂x is singular: ``"raise"``, ``"nan"`` or ``"warn"``.

    Returns:
        A decorator for ``solve(x0, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import custom_fixed_point
        >>> @custom_fixed_point(lambda x, a: torch.cos(a * x))
        ... def solve(x0, a):
        ...     for _ in range(100):
        ...         x0 = torch.cos(a * x0)
        ...     return x0
        >>> slope = torch.func.grad(lambda a: solve(torch.zeros(()), a))(torch.tensor(1.0))
        >>> print(f"{slope.item():.4f}")
        -0.2975
    """

    def residual(x: Any, *args: Any) -> Any:
        return _difference(x, map_fn(x, *args))

    return custom_root(residual, has_aux=has_aux, linear_solver=linear_solver, symmetric=symmetric, on_failure=on_failure)


def _difference(x: Any, image: Any) -> Any:
    """x − T(x), leaf by leaf; leaves that are no unknowns stay."""
    return _pytree.tree_map(lambda a, b: a - b if is_floating(a) else a, x, _fitting(x, image))


def _fitting(x: Any, image: Any) -> Any:
    """``image``, if its leaves have the shapes and dtypes of those of x; arithmetic would broadcast a wrong one in silence."""

    def check(a: Any, b: Any) -> Any:
        if is_floating(a) and (not is_floating(b) or a.shape != b.shape or a.dtype != b.dtype):
            came = f"{tuple(b.shape)} {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
            raise ShapeError(f"the map must return the shape and dtype of x: x is {tuple(a.shape)} {a.dtype}, the map returned {came}")
        return b

    return _pytree.tree_map(check, x, image)


def _detached(tree: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
