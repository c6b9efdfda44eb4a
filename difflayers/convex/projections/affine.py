r"""Projections on affine sets and polyhedra.

.. math:: \{A x = b\}: \quad Π(x) = x - A^+ (A x - b), \qquad
   \{A x = b,\; G x \le h\}: \quad Π(x) = \arg\min_p \tfrac12 \|p - x\|^2 \text{ subject to } A p = b,\; G p \le h.

The pseudoinverse takes redundant rows as they are; its derivative is exact as long as A keeps its rank. The polyhedron
is a quadratic program for :func:`~difflayers.convex.solve_qp`, whose active set is differentiated implicitly.

Reference: Golub and Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems whose variables separate,
SIAM Journal on Numerical Analysis 10 (1973).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ...solution import OnFailure
from ..qp import solve_qp
from .arguments import check_parameter, check_rows, failures_reported

__all__ = ["projection_affine_set", "projection_polyhedron"]


def projection_affine_set(x: Tensor, hyperparams: tuple[Tensor, Tensor], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : A x = b}, by the pseudoinverse of A.

    Differentiable in x, A and b. Redundant rows are tolerated: the derivative is right as long as a change of A and b keeps
    them redundant.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (A, b), A ``(*batch, m, n)`` and b ``(*batch, m)``. A matrix without batch dimensions is decomposed once.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where the equations contradict each other.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: no point satisfies the equations (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_affine_set
        >>> A = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])  # one equation, twice
        >>> projection_affine_set(torch.zeros(3), (A, torch.tensor([1.0, 2.0])))
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_rows(x, "x")
    A, b = hyperparams
    A = check_parameter(A, "A", x, (None, x.shape[-1]))
    b = check_parameter(b, "b", x, (A.shape[-2],))
    try:
        torch.broadcast_shapes(x.shape[:-1], A.shape[:-2], b.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(f"batch dimensions do not broadcast: x {tuple(x.shape)}, A {tuple(A.shape)}, b {tuple(b.shape)}") from error
    # LAPACK stops at a NaN, and with it the whole batch.
    finite = torch.isfinite(A).all(-1).all(-1)[..., None]
    safe = torch.where(finite.unsqueeze(-1), A, 0)
    inverse = torch.linalg.pinv(safe)
    point = x - _times(inverse, _times(safe, x) - b)
    # Once more, for what the first step has left of a large residual.
    point = point - _times(inverse, _times(safe, point) - b)
    point = torch.where(finite, point, torch.nan)
    miss = (_times(safe, point) - b).detach().abs()
    size = (_times(safe.abs(), point.abs()) + b.abs()).detach()
    slack = 100 * max(A.shape[-2:], default=1) ** 0.5 * torch.finfo(x.dtype).eps * size.amax(-1, keepdim=True) if A.shape[-2] else size
    return failures_reported(point, (miss > slack).any(-1), _largest(miss), "projection_affine_set", on_failure)


def projection_polyhedron(
    x: Tensor, hyperparams: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], *, on_failure: OnFailure = "raise"
) -> Tensor:
    """The nearest point of {x : A x = b, G x ≤ h}, by :func:`~difflayers.convex.solve_qp`.

    Differentiable in x and in all the parameters. A constraint that is active with a zero multiplier counts as inactive.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (A, b, G, h), A ``(*batch, p, n)``, b ``(*batch, p)``, G ``(*batch, m, n)``, h ``(*batch, m)``;
            A and b, or G and h, may be None.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where the set is empty or something is not finite.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: the set is empty (``on_failure="raise"``).
        NotConvergedError: x or a parameter is not finite.
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_polyhedron
        >>> G = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> projection_polyhedron(torch.tensor([2.0, 1.0]), (None, None, G, torch.tensor([1.0, 0.0])))
        tensor([1., 1.])
    """
    check_rows(x, "x")
    A, b, G, h = hyperparams
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return solve_qp(identity, -x, G, h, A, b, on_failure=on_failure).x


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _largest(rows: Tensor) -> Tensor:
    return rows.amax(-1) if rows.shape[-1] else rows.sum(-1)
