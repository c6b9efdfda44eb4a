r"""Proofs that a conic program has no solution, checked in the data as given.

:math:`\min \tfrac12 x^T P x + q^T x` subject to :math:`A x + s = b,\; s \in K` has

* no feasible point if some y in the dual cone has :math:`A^T y = 0` and :math:`b^T y < 0`: a feasible x would give
  :math:`0 = y^T A x = y^T (b - s) \le b^T y`;
* no lower bound, if it is feasible, if some ray x has :math:`P x = 0`, :math:`-A x \in K` and :math:`q^T x < 0`.

A solver's word is not enough: its vectors are put into the cone they must lie in, and then hold up to a distance, as in
:mod:`~difflayers.convex.certificates`.

Reference: S. Boyd, L. Vandenberghe, Convex Optimization (2004), section 5.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cone_geometry import project
from .cone_structure import Structure

__all__ = ["proves_infeasible", "proves_unbounded"]

_REACH = 1e6  # a certificate holds for every x up to this many times the size of the problem
_CANCELLED = 1e-9  # a sum that is smaller than this share of its terms may be rounding


def proves_infeasible(structure: Structure, theta: Sequence[Any], y: Tensor) -> Tensor:
    """Whether ``y`` ``(batch, m)`` shows that no x within reach is feasible; ``(batch,)`` bool.

    Args:
        structure: what the batch shares.
        theta: the flat values of P, q, A and b.
        y: the claimed certificates, of any length.
    """
    _, _, A, b = theta
    y = torch.where(torch.isfinite(y), y, 0)
    y = y + project(structure.cones, -y)
    terms = b * y
    value, total = -terms.sum(-1), terms.abs().sum(-1)
    pull = structure.A.times(A, y, transpose=True).abs()
    forces = structure.A.times(A.abs(), y.abs(), transpose=True).sum(-1)
    largest = pull.amax(-1) if pull.shape[-1] else torch.zeros_like(value)
    return (value > _CANCELLED * total) & (value * torch.where(forces > 0, forces, 1.0) > _REACH * total * largest)


def proves_unbounded(structure: Structure, theta: Sequence[Any], ray: Tensor) -> Tensor:
    """Whether the objective falls along ``ray`` ``(batch, n)`` for many times its length inside the cone; ``(batch,)`` bool.

    Args:
        structure: what the batch shares.
        theta: the flat values of P, q, A and b.
        ray: the claimed rays, of any length.
    """
    P, q, A, _ = theta
    ray = torch.where(torch.isfinite(ray), ray, 0)
    length = ray.abs().amax(-1) if ray.shape[-1] else q.new_zeros(len(q))
    fall, push = -(q * ray).sum(-1), q.abs().sum(-1)
    curve = torch.zeros_like(q) if structure.P is None else structure.P.times(P, ray)
    move = -structure.A.times(A, ray)
    leaving = (move - project(structure.cones, move)).abs()
    size = A.abs().amax(-1) if A.shape[-1] else torch.ones_like(length)
    leaving = leaving.amax(-1) if leaving.shape[-1] else torch.zeros_like(length)
    inside = leaving * _REACH <= torch.where(size > 0, size, 1.0) * length
    flat = curve.abs().amax(-1) * length * _REACH <= fall * (1 + push) if curve.shape[-1] else torch.ones_like(inside)
    return (fall > 1e-6 * push * length) & inside & flat
