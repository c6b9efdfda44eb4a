"""How a solve ended: one :class:`Status` per element of the batch, and what to do about the ones that failed."""

from __future__ import annotations

import warnings
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConvergenceWarning, InfeasibleError, NotConvergedError, SingularError, SolveError, UnboundedError

__all__ = ["OnFailure", "Solution", "Status", "report_failures"]

OnFailure = Literal["raise", "nan", "warn"]


class Status(IntEnum):
    """How one element of a batch ended; ``Status(code).message`` says what happened and what to try."""

    SOLVED = 0
    MAX_ITER = 1
    PRIMAL_INFEASIBLE = 2
    DUAL_INFEASIBLE = 3
    SINGULAR = 4
    NUMERICAL_ERROR = 5
    NOT_TIGHT = 6

    @property
    def message(self) -> str:
        """What happened and what to try, in words for the user."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.SOLVED: "solved to the tolerance",
    Status.MAX_ITER: "the iteration limit came before the tolerance; raise max_iter, loosen tol, scale the problem, or start nearer",
    Status.PRIMAL_INFEASIBLE: "no point satisfies the constraints; loosen the ones that contradict each other, or add slack variables",
    Status.DUAL_INFEASIBLE: "the objective is unbounded below on the feasible set; add bounds, or a positive definite term to P",
    Status.SINGULAR: (
        "the linear system is singular, so its solution (or the derivative) is not unique; look for redundant equations, "
        "for an unknown that no equation contains, or for a solution at a bifurcation"
    ),
    Status.NUMERICAL_ERROR: (
        "an input or an iterate is not finite, a quadratic program is not convex, or the steps became too small to go on; "
        "check the inputs for NaN and inf, P for negative eigenvalues, and scale the problem"
    ),
    Status.NOT_TIGHT: "the relaxation was solved, but its solution does not satisfy the original constraints; see the residual",
}

_ERRORS: dict[Status, type[SolveError]] = {
    Status.PRIMAL_INFEASIBLE: InfeasibleError,
    Status.DUAL_INFEASIBLE: UnboundedError,
    Status.SINGULAR: SingularError,
}


class Solution(NamedTuple):
    """What every solver returns.

    Attributes:
        x: the solution, with the structure of the starting point.
        status: ``(*batch,)`` int64 tensor of :class:`Status` codes.
        residual: ``(*batch,)`` what the stopping rule measured, relative to the scale of the problem.
        iterations: ``(*batch,)`` int64, the iterations that each element used.
    """

    x: Any
    status: Tensor
    residual: Tensor
    iterations: Tensor


def report_failures(solution: Any, what: str, on_failure: OnFailure) -> None:
    """Raise or warn about the elements of ``solution`` that are not solved; silent if all are, or with ``"nan"``.

    Args:
        solution: a NamedTuple with ``status`` of shape ``(*batch,)`` and, where it has them, ``residual`` and ``iterations``.
        what: the name of the solve, which begins the message.
        on_failure: ``"raise"``, ``"warn"`` or ``"nan"`` (the caller fills the elements).

    Raises:
        InfeasibleError, UnboundedError, SingularError, NotConvergedError: the worst failure, with ``.solution`` and ``.indices``.
    """
    if on_failure not in ("raise", "nan", "warn"):
        raise ValueError(f"on_failure={on_failure!r} is not known; choose 'raise', 'nan' or 'warn'")
    status: Tensor = solution.status
    if on_failure == "nan" or not bool((status != Status.SOLVED).any()):
        return
    failed = (status != Status.SOLVED).nonzero().tolist()
    counts = [(Status(code), int((status == code).sum())) for code in torch.unique(status).tolist() if code != Status.SOLVED]
    lines = [f"{what}: {len(failed)} of {status.numel()} problems without a solution."]
    lines += [f"  {count} × {kind.name}: {kind.message}." for kind, count in counts]
    residual = getattr(solution, "residual", None)
    if residual is not None:
        lines.append(f"  Worst residual {float(residual[status != Status.SOLVED].max()):.1e}; first failed index {tuple(failed[0])}.")
    if on_failure == "warn":
        warnings.warn("\n".join(lines), ConvergenceWarning, stacklevel=3)
        return
    lines.append("  The error's .solution holds the best iterates; on_failure='nan' or 'warn' goes on without raising.")
    kind = max(counts, key=lambda pair: pair[1])[0]
    raise _ERRORS.get(kind, NotConvergedError)("\n".join(lines), solution=solution, indices=[tuple(index) for index in failed])
