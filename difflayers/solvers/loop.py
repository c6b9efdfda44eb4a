"""The skeleton of every batched loop here: rows that run, the best iterate of each row, and how each row ended.

A solver works on a matrix ``(*batch, n)`` whose rows are independent problems. A row that has ended is frozen with
``torch.where``, so neither its NaN nor its remaining neighbours can change it, and the loop ends with the last row:
one ``any_running()`` per iteration is the only moment when the host waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pytree import Raveler
from ..solution import Solution, Status

__all__ = ["Rows", "check_options", "default_tol", "dot", "norm", "relative", "scale_of"]


def default_tol(dtype: torch.dtype) -> float:
    """The relative tolerance when the caller gives none: 1e-12 in float64, 1e-6 in float32, 8 eps below."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 8 * torch.finfo(dtype).eps)


def check_options(tol: float | None, max_iter: int | None) -> None:
    """Refuse a tolerance or an iteration limit that is negative or NaN."""
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be a number that is not negative, got {tol}")
    if max_iter is not None and not max_iter >= 0:
        raise ValueError(f"max_iter must not be negative, got {max_iter}")


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row: ``(*batch, n)``, ``(*batch, n)`` → ``(*batch,)``."""
    return (a * b).sum(-1)


def norm(a: Tensor) -> Tensor:
    """The Euclidean norm of each row: ``(*batch, n)`` → ``(*batch,)``."""
    return torch.linalg.vector_norm(a, dim=-1)


def relative(size: Tensor, scale: Tensor) -> Tensor:
    """``size / scale``, where 0/0 is 0."""
    return torch.where(size == 0, 0, size / scale)


def scale_of(x: Tensor, start: Tensor) -> Tensor:
    """The scale of the unknowns of each row: the norm of x, but not less than √eps times the norm of the starting point.

    The second term lets a row whose solution is zero converge, and changes nothing in any other.
    """
    return torch.maximum(norm(x), torch.finfo(x.dtype).eps ** 0.5 * norm(start))


class Rows:
    """The state that every loop shares.

    Args:
        x: ``(*batch, n)``, the starting points.

    Attributes:
        x: the best iterate of each row so far, that with the smallest residual.
        residual: ``(*batch,)``, its residual; inf before the first :meth:`record`.
        running: ``(*batch,)`` bool, the rows that have not ended.
        status: ``(*batch,)``, a :class:`~difflayers.solution.Status`; MAX_ITER while the row runs, so that a loop may simply end.
        iterations: ``(*batch,)``, advanced by :meth:`count`.
        idle: ``(*batch,)``, calls of :meth:`record` since the last one that improved the row.
    """

    def __init__(self, x: Tensor) -> None:
        batch = x.shape[:-1]
        self.x = x
        self.residual = torch.full(batch, torch.inf, dtype=x.dtype, device=x.device)
        self.running = torch.ones(batch, dtype=torch.bool, device=x.device)
        self.status = torch.full(batch, int(Status.MAX_ITER), dtype=torch.int64, device=x.device)
        self.iterations = torch.zeros_like(self.status)
        self.idle = torch.zeros_like(self.status)

    def any_running(self) -> bool:
        """Whether the loop must go on; waits for the device."""
        return bool(self.running.any())

    def count(self, where: Tensor | None = None) -> None:
        """Add one iteration to the running rows (of ``where``)."""
        self.iterations = self.iterations + (self.running if where is None else self.running & where)

    def record(self, x: Tensor, residual: Tensor) -> Tensor:
        """Keep ``x`` in the running rows where its residual is the smallest so far (never a NaN); returns where it was."""
        better = self.running & (residual < self.residual)
        self.x = torch.where(better[..., None], x, self.x)
        self.residual = torch.where(better, residual, self.residual)
        self.idle = (self.idle + 1) * ~better
        return better

    def stop(self, where: Tensor, status: Status) -> None:
        """End the running rows of ``where`` with ``status``."""
        ending = self.running & where
        self.status = torch.where(ending, int(status), self.status)
        self.running = self.running & ~ending

    def settle(self, stalled: Tensor, noise: Tensor) -> None:
        """End the ``stalled`` rows that have reached the rounding level, whatever tolerance was asked for, as solved.

        Args:
            stalled: ``(*batch,)`` bool, rows that no longer improve.
            noise: ``(*batch,)``, the current residual relative to 1 or to the problem's scale, whichever is larger: a solution at
                zero is often a difference of numbers of order 1, whose rounding no iteration can remove.
        """
        reached = self.running & stalled & (noise <= 100 * torch.finfo(noise.dtype).eps)
        self.residual = torch.where(reached, torch.minimum(noise, self.residual), self.residual)
        self.stop(reached, Status.SOLVED)

    def solution(self, raveler: Raveler | None = None) -> Solution:
        """The result; rows that still run met the iteration limit."""
        x = self.x if raveler is None else raveler.unravel(self.x)
        return Solution(x, self.status, self.residual, self.iterations)
