r"""Linear systems A u = b as a layer: by factorization or by products alone, differentiable to any order in A and b.

.. math:: \bar b = A^{-T} \bar u, \qquad \bar A = -\bar b\, u^T.

The adjoint system is solved by the same method, reusing the factorization where there is one.

References: Giles, An extended collection of matrix derivative results for forward and reverse mode algorithmic
differentiation, Oxford 2008;
Saad, Iterative Methods for Sparse Linear Systems, SIAM 2003; Kaneda, Akar, Chen, Trevisan, Teran, A deep conjugate
direction method for iteratively solving linear systems, ICML 2023 (learned preconditioners, ``truncation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pytree import Raveler, is_floating
from ..solution import OnFailure, Solution
from .closure import hoist, visible_to_modes
from .eager import eager
from .function import Linearized, Problem, check_residual, nan_where_failed, solve_implicitly
from .methods import LinearMethod

__all__ = ["linear_solve"]


@eager
def linear_solve(
    A: Tensor | Callable[[Any], Any],
    b: Any,
    *,
    method: str | Callable[..., Tensor] = "auto",
    symmetric: bool = False,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    truncation: int | None = None,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> Solution:
    """Solve A u = b, each problem of the batch on its own.

    Args:
        A: a matrix ``(*batch, n, n)``, or the function ``u -> A u``, with b's structure, linear in u. A matrix without
            (some of) b's leading dimensions is factorized once and shared. Tensors that the function closes over are differentiated.
        b: ``(*batch, n)``; for a function of any structure, with its first ``batch_ndim`` dimensions independent problems.
        method: "auto", "lu", "cholesky", "cg", "normal_cg", "gmres", "bicgstab", "neumann", or a callable
            ``(matvec, b) -> u``. "auto" factorizes small matrices (up to 2·10⁶ entries in a batch); above, it
            takes gmres, or cg if ``symmetric``.
        symmetric: A is symmetric. It only chooses the method: every entry of A gets its own derivative.
        preconditioner: ``r -> approximately A⁻¹ r`` on rows ``(*batch, n)`` with any leading dimensions; not differentiated. It may be a
            learned network: cg then keeps ``truncation`` past directions.
        truncation: see ``preconditioner``.
        batch_ndim: for a function only, how many leading dimensions of b index independent problems.
        tol: relative residual ‖b − A u‖ / ‖b‖ of iterative methods; None follows the dtype.
        max_iter: iteration limit; None follows the size.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"``.

    Returns:
        ``Solution(x, status, residual, iterations)``, the last three ``(*batch,)``.

    Raises:
        ShapeError: A and b do not fit.
        SingularError, NotConvergedError: with ``.solution``, if ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import linear_solve
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> linear_solve(A, torch.tensor([3.0, 4.0])).x
        tensor([1., 1.])
        >>> linear_solve(lambda u: A @ u, torch.tensor([3.0, 4.0]), method="cg", symmetric=True).x
        tensor([1.0000, 1.0000])
    """
    linear = LinearMethod(method, symmetric, preconditioner, truncation, tol, max_iter)
    if isinstance(A, Tensor):
        return _with_matrix(A, b, linear, on_failure)
    return _with_function(A, b, linear, batch_ndim, on_failure)


def _with_matrix(A: Tensor, b: Tensor, linear: LinearMethod, on_failure: OnFailure) -> Solution:
    if not is_floating(A) or not is_floating(b):
        raise ShapeError("A and b must be floating tensors; for a b of another structure pass A as a function")
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or b.dim() < 1 or b.shape[-1] != A.shape[-1]:
        raise ShapeError(f"expected A of shape (*batch, n, n) and b of shape (*batch, n), got {tuple(A.shape)} and {tuple(b.shape)}")
    if A.dtype != b.dtype:
        raise ShapeError(f"A and b must share one dtype, got {A.dtype} and {b.dtype}")
    batch = A.shape[:-2]
    lead = b.shape[:-1]
    if lead[len(lead) - len(batch) :] != batch:
        try:
            batch = torch.broadcast_shapes(batch, lead[len(lead) - min(len(batch), len(lead)) :])
        except RuntimeError as error:
            raise ShapeError(f"batch dimensions do not broadcast: got {tuple(A.shape)} and {tuple(b.shape)}") from error
        A = A.expand(*batch, *A.shape[-2:])
    b = b.expand(*torch.broadcast_shapes(batch, lead), b.shape[-1])
    problem = _MatrixProblem(linear, len(batch), on_failure)
    # Made of A, not of b, so that an outer vmap over b alone finds nothing batched but the right-hand sides.
    anywhere = torch.zeros_like(A.diagonal(dim1=-2, dim2=-1))
    return _solve(problem, anywhere, b, len(b.shape) - 1 - len(batch), (A,), on_failure)


def _with_function(matvec: Callable[[Any], Any], b: Any, linear: LinearMethod, batch_ndim: int, on_failure: OnFailure) -> Solution:
    raveler = Raveler(b, batch_ndim)
    rows = raveler.ravel(b)
    explicit, captured, product = hoist(raveler.on_rows(matvec), torch.zeros_like(rows))
    check_residual(product, rows, "A u", "b")

    def residual(x: Tensor, *theta: Tensor) -> Tensor:
        return explicit(theta, x)

    problem = _FunctionProblem(residual, _nothing_to_find, linear, batch_ndim=batch_ndim, on_failure=on_failure)
    found = _solve(problem, torch.zeros_like(rows), rows, 0, captured, on_failure)
    return found._replace(x=raveler.unravel(found.x))


def _solve(problem: Problem, anywhere: Tensor, b: Tensor, columns: int, theta: Sequence[Tensor], on_failure: OnFailure) -> Solution:
    # A linear system is its own linearization: the operator of the residual A x at any x.
    system = Linearized(problem, transpose=False, columns=columns, outermost=True)
    found = solve_implicitly(system, torch.zeros_like(b), visible_to_modes([anywhere, *theta, -b]))
    return found._replace(x=nan_where_failed(found, on_failure))


class _MatrixProblem(Problem):
    """The residual A x with A ``(*batch, n, n)`` given as a matrix, so that nothing is spent on finding it."""

    def __init__(self, linear: LinearMethod, batch_ndim: int, on_failure: OnFailure) -> None:
        super().__init__(_product, _nothing_to_find, linear, batch_ndim=batch_ndim, on_failure=on_failure)

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        matrix = point[1].mT if transpose else point[1]
        return lambda u: _product(u, matrix)

    def matrix(self, point: Sequence[Any]) -> Tensor:
        return point[1]

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        # Only a batched A asks for a new problem (a batched b is a column of this one), and products broadcast by themselves.
        return _MatrixProblem(self.linear, self.batch_ndim + 1, self.on_failure)


class _FunctionProblem(Problem):
    """The residual A x given as a function, which is its own derivative."""

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        if transpose:
            return super().operator(point, transpose)
        theta = point[1:]
        return lambda u: self.residual(u, *theta)

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        key = (in_dims, size, randomness)
        if key not in self._batched:
            residual = torch.func.vmap(self.residual, in_dims=(0, *in_dims), randomness=randomness)
            self._batched[key] = _FunctionProblem(
                residual, self.search, self.linear, batch_ndim=self.batch_ndim + 1, on_failure=self.on_failure
            )
        return self._batched[key]


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _nothing_to_find(*_: Any) -> Any:
    raise RuntimeError("a linear problem is solved by its own linearization")
