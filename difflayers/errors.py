"""What can go wrong, as exceptions that say what came, what is wanted and what to try.

Every error is a :class:`DiffLayersError` and also the builtin error that a caller would expect, so that
``except ValueError`` keeps working. An error about a solve carries what the solver had reached: nothing is lost.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ConvergenceWarning",
    "DiffLayersError",
    "InfeasibleError",
    "MissingExtraError",
    "NotConvergedError",
    "ShapeError",
    "SingularError",
    "SolveError",
    "UnboundedError",
    "UnsupportedModuleError",
]


class DiffLayersError(Exception):
    """Parent of every error that this package raises on purpose."""


class ShapeError(DiffLayersError, ValueError):
    """A tensor has the wrong shape, dtype or device for its role."""


class SolveError(DiffLayersError):
    """A solve ended without an answer for at least one element of the batch.

    Attributes:
        solution: the NamedTuple that the solve would have returned, best iterates included.
        indices: for each failed element its index in the batch, as a list of tuples (one empty tuple without a batch).
    """

    def __init__(self, message: str, *, solution: Any = None, indices: list[tuple[int, ...]] | None = None) -> None:
        super().__init__(message)
        self.solution = solution
        self.indices = [] if indices is None else indices


class InfeasibleError(SolveError, ValueError):
    """No point satisfies the constraints (a certificate was found)."""


class UnboundedError(SolveError, ValueError):
    """The objective decreases without limit on the feasible set (a certificate was found)."""


class NotConvergedError(SolveError, RuntimeError):
    """The iteration limit came first, the numbers stopped being finite, or a relaxation was solved and is not tight."""


class SingularError(SolveError, RuntimeError):
    """A linear system has no unique solution, so the derivative through it does not exist."""


class UnsupportedModuleError(DiffLayersError, TypeError):
    """A module contains an operation whose structure cannot be proved."""


class MissingExtraError(DiffLayersError, ImportError):
    """An optional dependency is not installed; the message has the line that installs it."""


class ConvergenceWarning(UserWarning):
    """A solve failed for some elements and ``on_failure="warn"`` kept their best iterates."""
