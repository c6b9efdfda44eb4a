r"""Quadratic programs as a layer: batched, differentiable to any order; dense here, sparse in :mod:`~difflayers.convex.sparse`.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad\text{subject to}\quad G x \le h,\; A x = b,\; l \le x \le u,

with P positive semidefinite (zero gives a linear program). Two engines find the solution, a compiled active-set method
(:mod:`~difflayers.convex.native`) and a batched interior-point method that ends in an exact solve on its active set
(:mod:`~difflayers.convex.interior_point`). A status is decided by the measured residuals of the
optimality conditions, which are also what the core differentiates (:mod:`~difflayers.convex.kkt`).

The solution is differentiable where strict complementarity holds (no constraint is active with a zero multiplier). Elsewhere the
derivative is a choice: a weakly active constraint counts as inactive. Where multipliers are not unique
(redundant equalities, duplicate active rows) the derivative of x is right as long as the perturbation keeps the redundant rows
consistent, and the multipliers move by the least norm.

References: Amos and Kolter, OptNet, ICML 2017, arXiv:1703.00443; Fiacco, Introduction to Sensitivity and
Stability Analysis in Nonlinear Programming, Academic Press 1983.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError, ShapeError
from ..implicit.eager import eager
from ..solution import OnFailure
from .kkt import CORE_NDIMS, KKTProblem, QPSolution, Sizes
from .native import is_available
from .qp_call import make_options, solve_conditions, with_both_bounds
from .smoothing import SmoothedProblem
from .sparse import solve_sparse
from .sparse_matrix import SparseMatrix, is_sparse

__all__ = ["QPLayer", "QPSolution", "solve_qp"]

_NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")


@eager
def solve_qp(
    P: Tensor | SparseMatrix | None,
    q: Tensor,
    G: Tensor | SparseMatrix | None = None,
    h: Tensor | None = None,
    A: Tensor | SparseMatrix | None = None,
    b: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    *,
    solver: Literal["auto", "daqp", "interior_point"] = "auto",
    tol: float | None = None,
    max_iter: int | None = None,
    warm_start: QPSolution | None = None,
    smoothing: float | None = None,
    on_failure: OnFailure = "raise",
) -> QPSolution:
    """Solve min ½ xᵀPx + qᵀx subject to Gx ≤ h, Ax = b, lb ≤ x ≤ ub, for each element of the batch on its own.

    P, G and A may be sparse: torch tensors in the layouts COO, CSR or CSC, or :class:`SparseMatrix`, with gradients on the same pattern.
    Leading batch dimensions broadcast. An argument without them is shared by the batch; its gradient is the sum.
    Everything is computed in float64; float32 arguments give float32 results.

    Args:
        P: ``(*batch, n, n)``, positive semidefinite; read as its symmetric part, its gradient is symmetric. None is zero
            (a linear program).
        q: ``(*batch, n)``.
        G: ``(*batch, m, n)``, or None.
        h: ``(*batch, m)``; +inf switches a row off.
        A: ``(*batch, p, n)``, or None.
        b: ``(*batch, p)``.
        lb: ``(*batch, n)``, or None; −inf is no bound.
        ub: ``(*batch, n)``, or None; +inf is no bound.
        solver: "daqp", compiled (:mod:`~difflayers.convex.native`), for up to some hundred unknowns on the CPU; "interior_point", batched
            (:mod:`~difflayers.convex.interior_point`), everywhere; "auto" chooses. All answers carry the same certificate.
        tol: largest KKT residual of a solved element, relative to 1 + the size of its terms. None: 1e-9 (float64), 1e-6 (float32).
        max_iter: iterations of the interior-point method; None: 100.
        warm_start: the solution of a similar problem; an unchanged active set then costs one factorization. It is used where it pays.
        smoothing: weight μ > 0 of a logarithmic barrier, in units of the objective: returns the point of the central path where every
            product of a multiplier and its slack is μ (:mod:`~difflayers.convex.smoothing`), which is differentiable everywhere and has a
            gradient where that of the solution is zero. Needs a strictly feasible point; ``solver`` and ``warm_start`` are not used.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Returns:
        :class:`QPSolution`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        InfeasibleError, UnboundedError, NotConvergedError: some elements have no solution (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.convex import solve_qp
        >>> q = torch.tensor([-1.0, -3.0], requires_grad=True)
        >>> found = solve_qp(torch.eye(2), q, lb=torch.zeros(2), ub=torch.full((2,), 2.0))
        >>> found.x.detach()
        tensor([1., 2.])
        >>> gradient, = torch.autograd.grad(found.x[0], q)
        >>> gradient + 0.0
        tensor([-1., 0.])
    """
    arguments: tuple[Any, ...] = (P, q, G, h, A, b, lb, ub)
    if solver not in ("auto", "daqp", "interior_point"):
        raise ValueError(f"solver={solver!r} is not known; choose 'auto', 'daqp' or 'interior_point'")
    if smoothing is not None and not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing must be a positive number or None, got {smoothing}")
    if any(is_sparse(part) for part in (P, G, A)):
        if smoothing is not None:
            raise ValueError("smoothing is for dense problems; pass P, G and A as dense tensors (.to_dense())")
        return solve_sparse(arguments, _validate, tol=tol, max_iter=max_iter, warm_start=warm_start, on_failure=on_failure)
    sizes = _validate(arguments)
    if solver == "daqp" and not is_available():
        raise MissingExtraError("solver='daqp' needs the package daqp: pip install daqp; solver='interior_point' needs nothing")
    if solver == "daqp" and q.device.type != "cpu":
        raise ValueError(f"solver='daqp' runs on the CPU, and the problem is on {q.device}; take solver='interior_point'")
    options = make_options(
        q.dtype,
        solver=solver,
        tol=tol,
        max_iter=100 if max_iter is None else max_iter,
        warm=warm_start is not None,
        smoothing=0.0 if smoothing is None else smoothing,
        on_failure=on_failure,
    )
    smooth = smoothing is not None and (sizes.m > 0 or sizes.boxed)
    problem = SmoothedProblem(sizes, options) if smooth else KKTProblem(sizes, options)
    return solve_conditions(problem, sizes, with_both_bounds(arguments, sizes, q), warm_start, q)


class QPLayer(nn.Module):
    """:func:`solve_qp` as a module: ``forward`` returns the minimizer, ``solve`` the whole :class:`QPSolution`.

    Args:
        solver: as in :func:`solve_qp`.
        tol: as in :func:`solve_qp`.
        max_iter: as in :func:`solve_qp`.
        on_failure: as in :func:`solve_qp`.
        smoothing: as in :func:`solve_qp`.
        warm_start: start each solve from the last solution, while the sizes stay the same. What is returned does not depend on it.

    Example:
        >>> import torch
        >>> from difflayers import QPLayer
        >>> layer = QPLayer()
        >>> q = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
        >>> layer(torch.eye(2), q, A=torch.ones(1, 2), b=torch.ones(1), lb=torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        *,
        solver: Literal["auto", "daqp", "interior_point"] = "auto",
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
        smoothing: float | None = None,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        self.solver: Literal["auto", "daqp", "interior_point"] = solver
        self.tol, self.max_iter = tol, max_iter
        self.on_failure: OnFailure = on_failure
        self.smoothing, self.warm_start = smoothing, warm_start
        self._last: QPSolution | None = None

    def forward(
        self,
        P: Tensor | SparseMatrix | None,
        q: Tensor,
        G: Tensor | SparseMatrix | None = None,
        h: Tensor | None = None,
        A: Tensor | SparseMatrix | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
    ) -> Tensor:
        """The minimizer ``(*batch, n)``.

        Args:
            P: ``(*batch, n, n)`` or None.
            q: ``(*batch, n)``.
            G: ``(*batch, m, n)`` or None.
            h: ``(*batch, m)`` or None.
            A: ``(*batch, p, n)`` or None.
            b: ``(*batch, p)`` or None.
            lb: ``(*batch, n)`` or None.
            ub: ``(*batch, n)`` or None.
        """
        return self.solve(P, q, G, h, A, b, lb, ub).x

    def solve(
        self,
        P: Tensor | SparseMatrix | None,
        q: Tensor,
        G: Tensor | SparseMatrix | None = None,
        h: Tensor | None = None,
        A: Tensor | SparseMatrix | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        *,
        warm_start: QPSolution | None = None,
    ) -> QPSolution:
        """As ``forward``, with multipliers, status and residuals.

        Args:
            P: as in ``forward``, and so the arguments that follow.
            q: ``(*batch, n)``.
            G: ``(*batch, m, n)`` or None.
            h: ``(*batch, m)`` or None.
            A: ``(*batch, p, n)`` or None.
            b: ``(*batch, p)`` or None.
            lb: ``(*batch, n)`` or None.
            ub: ``(*batch, n)`` or None.
            warm_start: the solution of a similar problem.
        """
        problem = (P, q, G, h, A, b, lb, ub)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("solver", "tol", "max_iter", "smoothing", "on_failure")}
        if not self.warm_start:
            return solve_qp(*problem, warm_start=warm_start, **options)
        try:
            found = solve_qp(*problem, warm_start=self._last if warm_start is None else warm_start, **options)
        except ShapeError:
            if self._last is None or warm_start is not None:
                raise
            found = solve_qp(*problem, **options)  # the last problem had other sizes
        if torch._C._functorch.peek_interpreter_stack() is None:  # what a transform wraps must not outlive it
            self._last = QPSolution(*(None if part is None else part.detach().nan_to_num() for part in found))
        return found

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and ``on_failure``."""
        shown = [f"on_failure={self.on_failure!r}"]
        shown += [
            f"{name}={value!r}"
            for name in ("solver", "tol", "max_iter", "smoothing", "warm_start")
            if (value := getattr(self, name)) not in (None, "auto", False)
        ]
        return ", ".join(shown)


def _validate(arguments: Sequence[Tensor | None]) -> Sizes:
    given = dict(zip(_NAMES, arguments, strict=True))
    q = given["q"]
    for name, value in given.items():
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{name} must be a floating tensor or None, got {came}")
    if q is None or q.dim() < 1:
        raise ShapeError("q must be a tensor of shape (*batch, n); use zeros for a problem without a linear term")
    for first, second in (("G", "h"), ("A", "b")):
        if (given[first] is None) != (given[second] is None):
            raise ShapeError(f"{first} and {second} come together; got only {first if given[second] is None else second}")
    n = q.shape[-1]
    m = 0 if given["h"] is None else given["h"].shape[-1]
    p = 0 if given["b"] is None else given["b"].shape[-1]
    wanted = {"P": (n, n), "q": (n,), "G": (m, n), "h": (m,), "A": (p, n), "b": (p,), "lb": (n,), "ub": (n,)}
    for name, core in zip(_NAMES, CORE_NDIMS, strict=True):
        value = given[name]
        if value is None:
            continue
        if value.dim() < core or tuple(value.shape[value.dim() - core :]) != wanted[name]:
            raise ShapeError(
                f"{name} must have the shape (*batch, {', '.join(map(str, wanted[name]))}) where n={n} is the length of q, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != q.dtype or value.device != q.device:
            raise ShapeError(f"{name} is {value.dtype} on {value.device}, q is {q.dtype} on {q.device}; convert one of them")
    leads = {
        name: tuple(value.shape[: value.dim() - core])
        for (name, value), core in zip(given.items(), CORE_NDIMS, strict=True)
        if value is not None
    }
    try:
        batch = leads["q"] if len(set(leads.values())) == 1 else torch.broadcast_shapes(*leads.values())
    except RuntimeError as error:
        raise ShapeError("batch dimensions do not broadcast: " + ", ".join(f"{name} {lead}" for name, lead in leads.items())) from error
    return Sizes(tuple(batch), n, p, m, given["lb"] is not None or given["ub"] is not None)
