r"""Projections on the transport polytope and the Birkhoff polytope, by Newton's method on the dual.

.. math:: \{T \ge 0,\; T 1 = a,\; T^T 1 = b\}: \quad Π(S) = \arg\min_T \tfrac12 \|T - S\|_F^2.

With multipliers α of the row sums, each column of T is a projection on a simplex: :math:`t_j = Π_{Δ(b_j)}(s_j + α)`. The α that meets the
row sums minimizes a convex function with the piecewise linear gradient

.. math:: F(α) = \sum_j Π_{Δ(b_j)}(s_j + α) - a = 0, \qquad
   \frac{∂F}{∂α} = \operatorname{diag}(M 1) - M \operatorname{diag}(1 / M^T 1) M^T,

M the support of T: a Laplacian, found exactly by a few regularized Newton steps with line search. The core differentiates F = 0. The
Laplacian has one zero eigenvalue for each connected component of the support; its systems are solved in the least norm, so the
derivative in a and b is right for changes that keep the sums of each component equal (and is projected on those).

References: Blondel, Seguy and Rolet, Smooth and sparse optimal transport, AISTATS 2018, arXiv:1710.06276; Lorenz, Manns and
Meyer, Quadratically regularized optimal transport, Applied Mathematics and Optimization 83 (2021), arXiv:1903.01112.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction
from ...solution import OnFailure, Solution, Status, report_failures
from .arguments import check_parameter, check_rows
from .simplex import on_simplex, simplex_support

__all__ = ["projection_birkhoff", "projection_transport"]

_MAX_ITER = 500
_NEAR = 1e-2
_GROWTH = 3.0
# The marginals that are met to this relative error are met; sums of a and b may differ by as much.
_MET = 1e-10
_BALANCED = {torch.float64: 1e-9, torch.float32: 1e-5}


@eager
def projection_transport(sim_matrix: Tensor, marginals: tuple[Tensor, Tensor], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest plan with the given marginals: {T : T ≥ 0, T 1 = a, Tᵀ 1 = b}. For a cost C pass −C / γ.

    Computed in float64. Differentiable in the matrix and in both marginals; an entry that is zero without a push counts as part of
    the support.

    Args:
        sim_matrix: ``(*batch, m, n)``.
        marginals: (a, b), ``(*batch, m)`` and ``(*batch, n)``, nonnegative, with equal sums.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where a marginal is negative, their sums differ, or something is not finite.

    Returns:
        ``(*batch, m, n)``.

    Raises:
        InfeasibleError: the marginals admit no plan (``on_failure="raise"``).
        NotConvergedError: the matrix or a marginal is not finite.
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_transport
        >>> similarity = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> projection_transport(similarity, (torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3])))
        tensor([[0.5000, 0.0000],
                [0.2000, 0.3000]])
    """
    check_rows(sim_matrix, "sim_matrix")
    if sim_matrix.dim() < 2 or 0 in sim_matrix.shape[-2:]:
        raise ShapeError(f"sim_matrix must have the shape (*batch, m, n) with m, n ≥ 1, got {tuple(sim_matrix.shape)}")
    m, n = sim_matrix.shape[-2:]
    a, b = marginals
    a, b = check_parameter(a, "a", sim_matrix, (m,)), check_parameter(b, "b", sim_matrix, (n,))
    try:
        batch = torch.broadcast_shapes(sim_matrix.shape[:-2], a.shape[:-1], b.shape[:-1])
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in (sim_matrix, a, b))
        raise ShapeError(f"batch dimensions of the matrix and the marginals do not broadcast: {shapes}") from error
    S, a, b = sim_matrix.to(torch.float64), a.to(torch.float64), b.to(torch.float64)
    S, a, b = S.expand(*batch, m, n), a.expand(*batch, m), b.expand(*batch, n)
    flipped = m > n
    if flipped:
        S, a, b = S.mT, b, a
    balanced = _BALANCED.get(sim_matrix.dtype, 1e-2)
    finite = torch.isfinite(S).all(-1).all(-1) & torch.isfinite(a).all(-1) & torch.isfinite(b).all(-1)
    # A NaN would come back as 0 · NaN in the gradients.
    S = torch.where(finite[..., None, None], S, 0)
    a, b = torch.where(finite[..., None], a, 1), torch.where(finite[..., None], b, 1)
    start, S, a, b, finite = visible_to_modes([torch.zeros_like(a), S, a, b, finite])
    start = start.detach()
    anchor = ImplicitFunction.apply(_Dual(len(batch), "nan", balanced), start, S.detach(), a.detach(), b.detach(), finite)[0].detach()
    # A constant added to a row or a column changes nothing. With those of the solution the numbers that make up the plan are as small as
    # the plan, however large S is, and a second solve meets the marginals to rounding.
    S = S + anchor.unsqueeze(-1)
    S = S - S.detach().amax(-2, keepdim=True)
    alpha, status = ImplicitFunction.apply(_Dual(len(batch), on_failure, balanced), start, S, a, b, finite)[:2]
    plan = _columns(alpha, S, b)
    if on_failure != "raise":
        lost = status != Status.SOLVED if on_failure == "nan" else status == Status.NUMERICAL_ERROR
        plan = torch.where(lost[..., None, None], torch.nan, plan)
    return (plan.mT if flipped else plan).to(sim_matrix.dtype)


def projection_birkhoff(x: Tensor, hyperparams: None = None, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest doubly stochastic matrix: {T : T ≥ 0, T 1 = 1, Tᵀ 1 = 1}.

    Args:
        x: ``(*batch, n, n)``.
        hyperparams: not used; the place where other projections have their parameters.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where x is not finite.

    Returns:
        ``(*batch, n, n)``.

    Raises:
        NotConvergedError: x is not finite (``on_failure="raise"``).
        ShapeError: x is not a floating tensor of square matrices.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_birkhoff
        >>> projection_birkhoff(torch.tensor([[2.0, 1.0], [1.5, 0.0]]))
        tensor([[0.3750, 0.6250],
                [0.6250, 0.3750]])
    """
    check_rows(x, "x")
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ShapeError(f"x must have the shape (*batch, n, n), got {tuple(x.shape)}")
    ones = x.new_ones(x.shape[-1])
    return projection_transport(x, (ones, ones), on_failure=on_failure)


def _columns(alpha: Tensor, S: Tensor, b: Tensor) -> Tensor:
    """The plan whose columns are projected on their simplices."""
    return on_simplex((S + alpha.unsqueeze(-1)).mT, b.unsqueeze(-1)).mT


class _Dual(BroadcastingProblem):
    """F(α; S, a, b) for α ``(*batch, m)``; the last argument says where all of them are finite."""

    core_ndims = (2, 1, 1, 0)

    def __init__(self, batch_ndim: int, on_failure: OnFailure, balanced: float) -> None:
        super().__init__(batch_ndim, residual=_row_error, on_failure=on_failure)
        self.balanced = balanced

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        S, a, b, finite = theta
        batch, (m, n) = x0.shape[:-1], S.shape[-2:]
        S = S.expand(*batch, m, n).reshape(-1, m, n)
        a, b = a.expand(*batch, m).reshape(-1, m), b.expand(*batch, n).reshape(-1, n)
        found = _newton(S, a, b, finite.expand(batch).flatten(), self.balanced)
        found = Solution(*(part.reshape((*batch, *part.shape[1:])) for part in found))
        report_failures(found, "projection_transport", self.on_failure)
        return found

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        alpha, S, _, b, _ = point
        if self._factor is None:
            laplacian = _laplacian(alpha, S, b)
            values, vectors = torch.linalg.eigh(torch.nan_to_num(laplacian))
            zero = values <= values.shape[-1] * 1e-12 * values.amax(-1, keepdim=True)
            self._factor = torch.where(zero, 0, 1 / torch.where(zero, 1, values)), vectors
        inverse, vectors = self._factor
        solved = (vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ rhs.unsqueeze(-1)))).squeeze(-1)
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        return Solution(solved, status, rhs.new_zeros(rhs.shape[:-1]), status.clone())

    def deeper(self, size: int) -> _Dual:
        return _Dual(self.batch_ndim + 1, self.on_failure, self.balanced)


def _row_error(alpha: Tensor, S: Tensor, a: Tensor, b: Tensor, finite: Tensor) -> Tensor:
    return _columns(alpha, S, b).sum(-1) - a


def _laplacian(alpha: Tensor, S: Tensor, b: Tensor) -> Tensor:
    support = simplex_support((S + alpha.unsqueeze(-1)).mT, b.unsqueeze(-1)).mT.to(S.dtype)
    counts = support.sum(-2, keepdim=True).clamp(min=1)
    return torch.diag_embed(support.sum(-1)) - (support / counts) @ support.mT


class _State(NamedTuple):
    alpha: Tensor
    error: Tensor
    value: Tensor


def _newton(S: Tensor, a: Tensor, b: Tensor, finite: Tensor, balanced: float) -> Solution:
    """The multipliers of each problem ``(N, m, n)``, by semismooth Newton steps on the dual function with Armijo's rule."""
    mass = torch.maximum(a.abs().sum(-1), b.abs().sum(-1))
    miss = torch.maximum((a.sum(-1) - b.sum(-1)).abs() - balanced * mass, -torch.minimum(a.amin(-1), b.amin(-1)))
    feasible = (miss <= 0) | ~finite
    usable = finite & feasible
    a, b = (torch.where(usable[:, None], part, 0) for part in (a, b))
    # Equal sums to the last digit: what they differ by is rounding, and no plan meets both.
    a = a * torch.where(a.sum(-1) > 0, b.sum(-1) / torch.where(a.sum(-1) > 0, a.sum(-1), 1), 1)[:, None]
    mass = torch.where(usable & (mass > 0), mass, 1)

    # Plans of a matrix that is large beside them are sparse, and far from where Newton's method starts. A smaller multiple of it is
    # projected first, and then larger ones, each from the solution of the one before.
    spread = S.flatten(1).amax(-1) - S.flatten(1).amin(-1)
    scale = (mass / S.shape[-1] / spread.clamp(min=torch.finfo(S.dtype).tiny)).clamp(max=1)

    def state(alpha: Tensor) -> _State:
        matrix = scale[:, None, None] * S
        plan = _columns(alpha, matrix, b)
        value = ((matrix + alpha.unsqueeze(-1)) * plan - plan * plan / 2).sum((-1, -2)) - (alpha * a).sum(-1)
        return _State(alpha, plan.sum(-1) - a, value)

    small, scale = scale, torch.ones_like(scale)
    now = state(torch.zeros_like(a))
    solved = now.error.abs().sum(-1) <= _NEAR * mass
    scale = torch.where(solved, 1, small)
    now = state(torch.where(solved[:, None], 0, (a - scale[:, None] * S.sum(-1)) / S.shape[-1]))
    # What the sums lose to the size of S, whatever α is.
    noise = torch.finfo(S.dtype).eps * (64 * S.shape[-1] + 16 * S.shape[-2] * S.abs().flatten(1).amax(-1) / mass)
    iterations = torch.zeros(len(S), dtype=torch.int64, device=S.device)
    settled = torch.zeros_like(usable)
    eye = torch.eye(S.shape[-2], dtype=S.dtype, device=S.device)
    for _ in range(_MAX_ITER):
        residual = now.error.abs().sum(-1) / mass
        near = (residual <= _NEAR) & (scale < 1)
        if bool(near.any()):
            larger = torch.where(near, (_GROWTH * scale).clamp(max=1), scale)
            alpha = now.alpha * (larger / scale)[:, None]
            scale = larger
            now = state(alpha)
            residual = now.error.abs().sum(-1) / mass
        running = ((residual > 4 * torch.finfo(S.dtype).eps * S.shape[-1] ** 0.5) | (scale < 1)) & ~settled
        if not bool(running.any()):
            break
        shift = 1e-9 + 1e-2 * residual.clamp(max=1)
        factor = torch.linalg.cholesky(_laplacian(now.alpha, scale[:, None, None] * S, b) + shift[:, None, None] * eye)
        step = -torch.cholesky_solve(now.error.unsqueeze(-1), factor).squeeze(-1)
        step = step - step.mean(-1, keepdim=True)
        slope = (step * now.error).sum(-1)
        taken = now
        length = torch.ones_like(residual)
        waiting = running
        for _ in range(30):
            tried = state(now.alpha + length[:, None] * step)
            good = waiting & (
                (tried.value <= now.value + 1e-4 * length * slope) | (tried.error.abs().sum(-1) <= 0.5 * now.error.abs().sum(-1))
            )
            taken = _chosen(good, tried, taken)
            waiting = waiting & ~good
            if not bool(waiting.any()):
                break
            length = torch.where(waiting, length / 2, length)
        iterations = iterations + running
        # Rounding alone is left where the marginals are met and a step does not gain.
        gained = taken.error.abs().sum(-1) <= 0.5 * now.error.abs().sum(-1)
        settled = settled | (running & ~gained & (residual <= noise.clamp(min=_MET)) & (scale == 1))
        now = _chosen(running & ~settled, taken, now)
    residual = now.error.abs().sum(-1) / mass
    status = torch.where((residual <= _MET) & (scale == 1), int(Status.SOLVED), int(Status.MAX_ITER))
    status = torch.where(finite, status, int(Status.NUMERICAL_ERROR))
    status = torch.where(feasible, status, int(Status.PRIMAL_INFEASIBLE))
    return Solution(now.alpha, status, torch.where(feasible, residual, miss), iterations)


def _chosen(where: Tensor, new: _State, old: _State) -> _State:
    return _State(*(torch.where(where.reshape(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(new, old, strict=True)))
