"""Which algorithm solves the linear systems behind a derivative, and with which limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solution import Solution, Status
from ..solvers import linear
from ..solvers.linearize import vjp

__all__ = ["DENSE_LIMIT", "METHODS", "LinearMethod"]

METHODS = ("auto", "lu", "cholesky", "cg", "normal_cg", "gmres", "bicgstab", "neumann")

# A factorization beats matrix-free iterations up to about this many entries of all Jacobians of a batch together
# (benchmarks/core.py prints the crossing), and small systems are factorized whatever their number.
DENSE_LIMIT = 2_000_000
_SMALL = 64

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearMethod:
    """The choice of a linear solver.

    Args:
        method: one of ``METHODS``, or a callable ``(matvec, b) -> u`` on rows ``(*batch, n)``.
        symmetric: A is symmetric. It chooses the algorithm; derivatives still treat every entry of A as free.
        preconditioner: ``r -> approximately A⁻¹ r`` on rows; may be a learned network.
        truncation: how many past directions a preconditioned cg keeps.
        tol: relative residual; None follows the dtype.
        max_iter: limit of a Krylov or Neumann iteration.
        truncated: stopping at ``max_iter`` is intended (a truncated Neumann series), not a failure.
    """

    method: str | Callable[[MatVec, Tensor], Tensor] = "auto"
    symmetric: bool = False
    preconditioner: MatVec | None = None
    truncation: int | None = None
    tol: float | None = None
    max_iter: int | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in METHODS:
            raise ValueError(
                f"linear solver {self.method!r} is not known; choose one of {', '.join(METHODS)}, or a callable (matvec, b) -> u"
            )

    def is_dense(self, x: Tensor) -> bool:
        """Whether A is formed and factorized for unknowns ``(*batch, n)``."""
        n = x.shape[-1]
        small = self.preconditioner is None and (n <= _SMALL or x.numel() * n <= DENSE_LIMIT)
        return self.method in ("lu", "cholesky") or (self.method == "auto" and small)

    def factorize(self, matrix: Tensor) -> linear.DenseFactor:
        """Factorize A ``(*batch, n, n)``."""
        return linear.cholesky_factor(matrix) if self.method == "cholesky" else linear.lu_factor(matrix)

    def iterate(self, matvec: MatVec, b: Tensor, make_rmatvec: Callable[[], MatVec], *, transpose: bool = False) -> Solution:
        """Solve ``matvec(u) = b`` without a matrix; ``make_rmatvec`` builds the product with the transpose where it is needed."""
        if callable(self.method):
            return _as_solution(self.method(matvec, b), matvec, b)
        options: dict[str, Any] = {"tol": self.tol, "max_iter": self.max_iter}
        if self.preconditioner is not None:
            options["preconditioner"] = _transposed(self.preconditioner, b) if transpose and not self.symmetric else self.preconditioner
        name = ("cg" if self.symmetric else "gmres") if self.method == "auto" else self.method
        if name == "cg":
            options["truncation"] = self.truncation
        if name == "normal_cg":
            options["rmatvec"] = make_rmatvec()
        found: Solution = getattr(linear, str(name))(matvec, b, **options)
        if name == "cg" and self.method == "auto" and bool((found.status != Status.SOLVED).any()):
            # Symmetric does not mean definite; gmres takes the rows that conjugate gradients could not.
            again = linear.gmres(matvec, b, tol=self.tol, max_iter=self.max_iter)
            better = (found.status != Status.SOLVED) & (again.residual <= found.residual)
            found = Solution(
                *(
                    torch.where(better.unsqueeze(-1) if new.dim() == b.dim() else better, new, old)
                    for new, old in zip(again, found, strict=True)
                )
            )
        if self.truncated:
            found = found._replace(status=torch.where(found.status == Status.MAX_ITER, int(Status.SOLVED), found.status))
        return found


def _transposed(preconditioner: MatVec, b: Tensor) -> MatVec:
    # A linear preconditioner M has the transpose Mᵀ, which is its own pullback.
    _, pullback = vjp(preconditioner, torch.zeros_like(b))
    return lambda r: pullback(r)[0]


def _as_solution(found: Any, matvec: MatVec, b: Tensor) -> Solution:
    if isinstance(found, Solution):
        return found
    residual = torch.linalg.vector_norm(b - matvec(found), dim=-1) / torch.linalg.vector_norm(b, dim=-1).clamp_min(
        torch.finfo(b.dtype).tiny
    )
    finite = torch.isfinite(found).all(-1)
    status = torch.where(finite, int(Status.SOLVED), int(Status.NUMERICAL_ERROR))
    return Solution(found, status, residual, torch.zeros_like(status))
