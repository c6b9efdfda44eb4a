"""The contestants of the QP benchmarks behind one signature: a :class:`QP` in, a :class:`Point` out."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers.convex import QPLayer

__all__ = ["PEERS", "QP", "Layer", "Point", "gradients", "ours", "times"]

_ABSENT = 1e20  # proxsuite's way to say that a row has no lower limit


class QP(NamedTuple):
    """min ½xᵀPx + qᵀx  s.t.  Gx ≤ h, Ax = b, lb ≤ x ≤ ub; vectors ``(B, ·)``, matrices ``(B, ·, n)`` or shared ``(·, n)``."""

    P: Tensor
    q: Tensor
    G: Tensor | None = None
    h: Tensor | None = None
    A: Tensor | None = None
    b: Tensor | None = None
    lb: Tensor | None = None
    ub: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters that the problem has."""
        return [part for part in self if part is not None]

    @property
    def shared(self) -> list[bool]:
        """Which of the leaves the whole batch shares."""
        return [name in "PGA" and part.dim() == 2 for name, part in zip(self._fields, self, strict=True) if part is not None]

    def differentiable(self) -> QP:
        """The same problem, whose parameters all require a gradient."""
        return QP(*(None if part is None else part.detach().clone().requires_grad_() for part in self))


class Point(NamedTuple):
    """A solution with the multipliers of the equalities, of the inequalities (z ≥ 0) and of the bounds (upper minus lower)."""

    x: Tensor
    y: Tensor | None
    z: Tensor | None
    z_box: Tensor | None
    status: Tensor | None = None


Layer = Callable[[QP], Point]


def ours(qp: QP, on_failure: str = "raise") -> Point:
    """``QPLayer.solve``, whose x is what ``forward`` returns."""
    found = QPLayer(on_failure=on_failure).solve(*qp)
    return Point(found.x, found.y, found.z, found.z_box, found.status)


def qpth(qp: QP) -> Point:
    """One-sided rows; the bounds become rows of identity matrices."""
    from qpth.qp import QPFunction

    n, none = qp.q.shape[-1], qp.q.new_empty(0)
    G, h = qp.G, qp.h
    if qp.lb is not None:
        G, h = torch.cat((-torch.eye(n), torch.eye(n))), torch.cat((-qp.lb, qp.ub), -1)
    x = QPFunction(verbose=-1)(qp.P, qp.q, G, h, none if qp.A is None else qp.A, none if qp.b is None else qp.b)
    y, z = (None if qp.A is None else x.grad_fn.nus), x.grad_fn.lams
    return Point(x, y, z, None) if qp.lb is None else Point(x, y, None, z[..., n:] - z[..., :n])


def proxsuite(qp: QP, **options: float) -> Point:
    """Two-sided rows; for a box the matrix is the identity."""
    from proxsuite.torch.qplayer import QPFunction

    n = qp.q.shape[-1]
    if qp.lb is None:
        G, lower, upper = qp.G, torch.full_like(qp.h, -_ABSENT), qp.h
    else:
        G, lower, upper = torch.eye(n), qp.lb, qp.ub
    A, b = (qp.q.new_empty(0, n), qp.q.new_empty(0)) if qp.A is None else (qp.A, qp.b)
    x, y, z = QPFunction(**options)(qp.P, qp.q, A, b, G, lower, upper)
    return Point(x, y, z, None) if qp.lb is None else Point(x, y, None, z)


@functools.cache
def _moreau_solver(n: int, rows: tuple[int, int], batch: int, shared: bool) -> Any:
    import moreau
    from moreau.torch import Solver

    def full(count: int) -> list[Tensor]:
        return [torch.arange(0, count * n + 1, n), torch.arange(n).repeat(count)]

    cones = moreau.Cones(num_zero_cones=rows[0], num_nonneg_cones=rows[1])
    settings = moreau.Settings(device="cpu", batch_size=batch, enable_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it has chosen its active-set method
        return Solver(n, sum(rows), *full(n), *full(sum(rows)), cones, settings)


def moreau(qp: QP) -> Point:
    """Rows A, then G; the bounds become rows of identity matrices. Matrices are batched, or all of them shared."""
    batch, n = qp.q.shape
    equations = 0 if qp.b is None else qp.b.shape[-1]
    G, h = qp.G, qp.h
    if qp.lb is not None:
        G, h = torch.cat((-torch.eye(n), torch.eye(n))), torch.cat((-qp.lb, qp.ub), -1)
    rows = G if qp.A is None else torch.cat((qp.A, G), -2)
    P = qp.P
    if P.dim() != rows.dim():
        P, rows = P.expand(batch, n, n), rows.expand(batch, *rows.shape[-2:])
    # It keeps what it made of P and the rows while they do not change: one solver for shared ones, and one for batches.
    solver = _moreau_solver(n, (equations, h.shape[-1]), batch, P.dim() == 2)
    found = solver.solve(P.flatten(-2), rows.flatten(-2), qp.q, h if qp.b is None else torch.cat((qp.b, h), -1))
    y, z = found.z[..., :equations], found.z[..., equations:]
    return Point(found.x, y, z, None) if qp.lb is None else Point(found.x, y, None, z[..., n:] - z[..., :n])


# By the heading of its column: the package, and the layer. By default proxsuite's backward pass stops at 1e-4.
PEERS: dict[str, tuple[str, Layer]] = {
    "qpth": ("qpth", qpth),
    "moreau": ("moreau", moreau),
    "proxsuite": ("proxsuite", proxsuite),
    "tight": ("proxsuite", functools.partial(proxsuite, eps_backward=1e-12, rho_backward=1e-9, mu_backward=1e-9)),
}


def gradients(layer: Layer, qp: QP, cotangent: Tensor) -> tuple[Point, tuple[Tensor, ...], str]:
    """One forward and one backward pass, and what was printed meanwhile."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        point = layer(qp)
        found = torch.autograd.grad(point.x, qp.leaves, cotangent)
    return point, found, said.getvalue()


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrices ``(B, m, n)`` or ``(m, n)`` times vectors ``(B, n)``."""
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
