r"""Newton's method on the optimality conditions of a conic program, from where a solver stops.

.. math:: z ← z - J(z)^{-1} F(z).

An interior-point method leaves s and y both near the square root of its gap where they touch their cones, and F is as large. From
there Newton's method is nearly quadratic: one factor serves a few steps, and usually no second one is needed. It is semismooth, and
near a degenerate solution it first picks wrong pieces of Π, with a larger residual; there it goes on, and the best point is kept.

Reference: Qi and Sun, A nonsmooth version of Newton's method, Mathematical Programming 58 (1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cone_factor import ConeFactor
from .cone_geometry import project_near
from .cone_structure import Structure

__all__ = ["Polished", "measure", "polish", "residual_at"]

# Factors, and steps with each, that may not increase the residual; then factors with a step each that may.
_FACTORS, _STEPS, _WANDERINGS = 2, 4, 10
# The residual at which it ends, relative to what is asked for: a derivative loses digits.
_GOAL = 1e-4


class Polished(NamedTuple):
    """Where it ended.

    Attributes:
        point: rows (x, v).
        slack: the projections of v.
        measured: the residuals of :func:`measure`.
        factor: one that was made near the point of every element, and is good for refinement there; or None.
    """

    point: Tensor
    slack: Tensor
    measured: list[Tensor]
    factor: ConeFactor | None


def polish(structure: Structure, point: Tensor, slack: Tensor, theta: Sequence[Any], wanted: Tensor, tol: float) -> Polished:
    """Sharpen the points of the elements that are wanted.

    Args:
        structure: that of the batch.
        point: ``(batch, n + m)``, rows (x, v).
        slack: ``(batch, m)``, near the projections of v.
        theta: the flat arguments.
        wanted: ``(batch,)``.
        tol: the relative residual that is asked for.
    """
    slack, measured = measure(structure, point, slack, theta)
    state, kept, going = Polished(point, slack, measured, None), None, wanted
    for turn in range(_FACTORS):
        rows = (going & ~(state.measured[0] <= _GOAL * tol)).nonzero().squeeze(-1)
        if len(rows) == 0:
            break
        before = state.measured[0]
        state, factor = _descend(structure, state, theta, rows, _GOAL * tol)
        if turn == 0 and len(rows) == len(point) and factor.regular:
            kept = factor
        going = going & (state.measured[0] < 0.5 * before)
    rows = (wanted & ~(state.measured[0] <= tol)).nonzero().squeeze(-1)
    return (_wander(structure, state, theta, rows, _GOAL * tol) if len(rows) else state)._replace(factor=kept)


def _descend(structure: Structure, state: Polished, theta: Sequence[Any], rows: Tensor, goal: float) -> tuple[Polished, ConeFactor]:
    """Steps with one factor, each of which halves the residual at least."""
    structure, part, z, s, now = _chosen(structure, state, theta, rows)
    factor = ConeFactor(structure, structure.split(z)[1], s, part)
    for _ in range(_STEPS):
        new = z - factor.solve(residual_at(structure, z, s, part), transpose=False)[0]
        near, trial = measure(structure, new, s, part)
        better = trial[0] < 0.5 * now[0]
        z, s = torch.where(better.unsqueeze(-1), new, z), torch.where(better.unsqueeze(-1), near, s)
        now = [torch.where(better, after, before) for before, after in zip(now, trial, strict=True)]
        if not bool((better & (now[0] > goal)).any()):
            break
    return _put(state, rows, z, s, now), factor


def _wander(structure: Structure, state: Polished, theta: Sequence[Any], rows: Tensor, goal: float) -> Polished:
    """Newton's steps, whatever they do to the residual; the best points are kept."""
    structure, part, z, s, now = _chosen(structure, state, theta, rows)
    best = (z, s, now)
    for _ in range(_WANDERINGS):
        factor = ConeFactor(structure, structure.split(z)[1], s, part)
        z = z - factor.solve(residual_at(structure, z, s, part), transpose=False)[0]
        z = torch.where(torch.isfinite(z).all(-1, keepdim=True), z, best[0])
        s, trial = measure(structure, z, s, part)
        better = trial[0] < best[2][0]
        kept = [torch.where(better, after, before) for before, after in zip(best[2], trial, strict=True)]
        best = (torch.where(better.unsqueeze(-1), z, best[0]), torch.where(better.unsqueeze(-1), s, best[1]), kept)
        if bool((best[2][0] <= goal).all()):
            break
    return _put(state, rows, *best)


def _chosen(
    structure: Structure, state: Polished, theta: Sequence[Any], rows: Tensor
) -> tuple[Structure, list[Any], Tensor, Tensor, list[Tensor]]:
    part = [None if leaf is None else leaf[rows] for leaf in theta]
    return structure._replace(batch=(len(rows),)), part, state.point[rows], state.slack[rows], [each[rows] for each in state.measured]


def _put(state: Polished, rows: Tensor, z: Tensor, s: Tensor, now: list[Tensor]) -> Polished:
    measured = [was.index_copy(0, rows, part) for was, part in zip(state.measured, now, strict=True)]
    return Polished(state.point.index_copy(0, rows, z), state.slack.index_copy(0, rows, s), measured, None)


def residual_at(structure: Structure, z: Tensor, s: Tensor, theta: Sequence[Any]) -> Tensor:
    """F at rows z = (x, v) with the projections s of v.

    Args:
        structure: that of the batch.
        z: ``(*batch, n + m)``.
        s: ``(*batch, m)``.
        theta: values of P (or None), q, values of A, b.
    """
    P, q, A, b = theta
    x, v = structure.split(z)
    gradient = q + structure.A.times(A, s - v, transpose=True)
    if structure.P is not None:
        gradient = gradient + structure.P.times(P, x)
    return torch.cat([gradient, structure.A.times(A, x) + s - b], -1)


def measure(structure: Structure, z: Tensor, near: Tensor, theta: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """The slack, and four residuals: the largest relative to 1 + the size of its terms, and primal, dual and duality gap, absolute.

    Args:
        structure: that of the batch.
        z: ``(batch, n + m)``, plain rows (x, v).
        near: ``(batch, m)``, near the slack.
        theta: values of P (or None), q, values of A, b.
    """
    P, q, A, b = theta
    x, v = structure.split(z)
    s = project_near(structure.cones, v, near)
    y = s - v
    Px = torch.zeros_like(q) if structure.P is None else structure.P.times(P, x)
    Aty, Ax = structure.A.times(A, y, transpose=True), structure.A.times(A, x)
    dual, primal = _largest(Px + q + Aty), _largest(Ax + s - b)
    gap = ((Px + q) * x).sum(-1) + (b * y).sum(-1)
    relative = torch.maximum(dual / (1 + _largest(torch.cat([Px, q, Aty], -1))), primal / (1 + _largest(torch.cat([Ax, s, b], -1))))
    return s, [relative, primal, dual, gap.abs()]


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
