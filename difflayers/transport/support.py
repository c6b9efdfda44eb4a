r"""Transport plans on a given support, as the root problem that the core differentiates.

With a mask S of the entries that may be positive, the potentials solve linear equations,

.. math:: F(α, β) = \begin{pmatrix} T 1 - a \\ T^T 1 - b \end{pmatrix}, \qquad T = \frac1γ S ∘ (α ⊕ β - C), \qquad
   \frac{∂F}{∂(α, β)} = \frac1γ K, \quad K = \begin{pmatrix} \operatorname{diag}(S 1) & S \\ S^T & \operatorname{diag}(S^T 1) \end{pmatrix}.

K is the signless Laplacian of the bipartite graph of S. Each connected component of the graph has one null vector, 1 on its rows and −1 on
its columns. Systems are solved by the pseudo-inverse of K: what is not in its range is taken off the right-hand side, and of all solutions
the shortest is chosen. For the derivatives of a plan that loses nothing, because constants of a component cancel in α ⊕ β. Derivatives in a
and b are those along changes of the marginals that keep the two masses of each component equal; others leave the support's equations
without a solution, and are projected on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..solution import OnFailure, Solution
from .arguments import flattened
from .marginals import DualValue

__all__ = ["Support", "SupportValue", "Supported", "plan_on"]


def plan_on(x: Tensor, cost: Tensor, gamma: Tensor, support: Tensor) -> Tensor:
    """The plan ``(*batch, n, m)`` of potentials on a support.

    Args:
        x: (α, β), ``(*batch, n + m)``.
        cost: ``(*batch, n, m)``.
        gamma: ``(*batch,)``.
        support: ``(*batch, n, m)`` bool.
    """
    alpha, beta = x.split(list(cost.shape[-2:]), -1)
    excess = alpha.unsqueeze(-1) + beta.unsqueeze(-2) - cost
    return torch.where(support, excess, 0) / gamma[..., None, None]


class Supported(BroadcastingProblem):
    """F(α, β; C, a, b, γ, S). The solution is the starting point, which was found together with S."""

    core_ndims = (2, 1, 1, 0, 2)

    def __init__(self, batch_ndim: int, on_failure: OnFailure = "raise") -> None:
        super().__init__(batch_ndim, residual=_marginal_error, on_failure=on_failure)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """The starting point."""
        return (x0.clone(),)

    def operator(self, point: Sequence[Any], transpose: bool) -> Any:
        """K/γ, equal to its transpose."""
        _, C, _, _, gamma, support = point
        S, scale, sizes = support.to(C.dtype), gamma.unsqueeze(-1), list(C.shape[-2:])
        rows, columns = S.sum(-1), S.sum(-2)

        def apply(u: Tensor) -> Tensor:
            left, right = u.split(sizes, -1)
            upper = rows * left + (S @ right.unsqueeze(-1)).squeeze(-1)
            lower = columns * right + (left.unsqueeze(-2) @ S).squeeze(-2)
            return torch.cat([upper, lower], -1) / scale

        return apply

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve by the pseudo-inverse of K."""
        x, *theta = point
        batch, size = x.shape[:-1], x.shape[-1]
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        if rhs.numel() == 0 or not bool(rhs.any()):
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        gamma, support = flattened(theta[3:], batch, self.core_ndims[3:])
        if self._factor is None:
            self._factor = Support(support)
        several = rhs.reshape(rhs.shape[0] if columns else 1, -1, size).permute(1, 2, 0)
        u = gamma[:, None, None] * self._factor.solve(several)
        return Solution(u.permute(2, 0, 1).reshape(rhs.shape), status, rhs.new_zeros(rhs.shape[:-1]), torch.zeros_like(status))

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form."""
        C, _, _, gamma, support = theta
        left, right = u.split(list(C.shape[-2:]), -1)
        spread = plan_on(u, torch.zeros_like(C), -gamma, support) if 0 in which or 3 in which else C
        closed = (
            lambda: spread,
            lambda: -left,
            lambda: -right,
            lambda: (spread * plan_on(x, C, gamma, support)).sum((-1, -2)),
        )
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def deeper(self, size: int) -> Supported:
        """The same problem with one more leading dimension."""
        return Supported(self.batch_ndim + 1, self.on_failure)


class SupportValue(DualValue):
    """v − L(C, a, b, γ, x, U) = 0 with the dual function L at shares U of the entries, which is stationary in the potentials x."""

    core_ndims = (2, 1, 1, 0, 1, 2)

    def __init__(self, batch_ndim: int) -> None:
        super().__init__(batch_ndim)
        self.residual = _dual_error

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """The dual value."""
        return (-_dual_error(torch.zeros_like(x0), *theta),)

    def deeper(self, size: int) -> SupportValue:
        """The same problem with one more leading dimension."""
        return SupportValue(self.batch_ndim + 1)


class Support:
    """The pseudo-inverse of K for masks ``(N, n, m)``, with the shorter side's Laplacian factorized."""

    def __init__(self, mask: Tensor) -> None:
        self.flipped = mask.shape[-1] > mask.shape[-2]
        n = mask.shape[-2]
        self.component, self.inverse_size, self.sign = _components(mask)
        S = (mask.mT if self.flipped else mask).to(torch.float64)
        self.S, degree = S, S.sum(-1, keepdim=True)
        self.inverse = torch.where(degree > 0, 1 / degree, 0)
        matrix = -(S.mT @ (self.inverse * S))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.zero_()
        diagonal.copy_(-matrix.sum(-1))
        # On the null space, the constants of each component, the matrix is made the identity divided by the component's size.
        short = self.component[:, :n] if self.flipped else self.component[:, n:]
        size = self.inverse_size[:, :n] if self.flipped else self.inverse_size[:, n:]
        matrix += (short.unsqueeze(-1) == short.unsqueeze(-2)) * size.unsqueeze(-1)
        self.factor = torch.linalg.cholesky_ex(matrix).L

    def solve(self, rhs: Tensor) -> Tensor:
        """K⁺ rhs for columns ``(N, n + m, k)``."""
        rhs = self._in_range(rhs)
        n, m = (self.S.shape[-1], self.S.shape[-2]) if self.flipped else self.S.shape[-2:]
        upper, lower = rhs.split([n, m], -2)
        long, short = (lower, upper) if self.flipped else (upper, lower)
        reduced = short - self.S.mT @ (self.inverse * long)
        half = torch.linalg.solve_triangular(self.factor, reduced, upper=False)
        u = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        v = self.inverse * (long - self.S @ u)
        return self._in_range(torch.cat((u, v) if self.flipped else (v, u), -2))

    def _in_range(self, u: Tensor) -> Tensor:
        """u without its part along the null vectors."""
        label = self.component.unsqueeze(-1).expand_as(u)
        sums = torch.zeros_like(u).scatter_add_(-2, label, self.sign * u)
        return u - self.sign * self.inverse_size.unsqueeze(-1) * sums.gather(-2, label)


def _components(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each node of each graph its component's number and 1 / its size, ``(N, n + m)``; and 1 for rows, −1 for columns."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, n, m = mask.shape
    element, row, column = mask.cpu().numpy().nonzero()
    start = element * (n + m)
    total = count * (n + m)
    graph = coo_array((np.ones(len(element), dtype=np.int8), (start + row, start + n + column)), shape=(total, total))
    label = torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64)).to(mask.device)
    size = torch.zeros(total, dtype=torch.float64, device=mask.device).scatter_add_(
        0, label, torch.ones(total, dtype=torch.float64, device=mask.device)
    )
    inverse_size = (1 / size[label]).reshape(count, n + m)
    label = label.reshape(count, n + m)
    # Numbers begin anew in each graph.
    label = label - label.amin(-1, keepdim=True)
    sign = torch.ones(n + m, 1, dtype=torch.float64, device=mask.device)
    sign[n:] = -1
    return label, inverse_size, sign


def _marginal_error(x: Tensor, C: Tensor, a: Tensor, b: Tensor, gamma: Tensor, support: Tensor) -> Tensor:
    T = plan_on(x, C, gamma, support)
    return torch.cat([T.sum(-1) - a, T.sum(-2) - b], -1)


def _dual_error(v: Tensor, C: Tensor, a: Tensor, b: Tensor, gamma: Tensor, x: Tensor, share: Tensor) -> Tensor:
    alpha, beta = x.split(list(C.shape[-2:]), -1)
    excess = alpha.unsqueeze(-1) + beta.unsqueeze(-2) - C
    quadratic = (share * excess * excess).sum((-1, -2)) / (2 * gamma)
    return v - ((a * alpha).sum(-1) + (b * beta).sum(-1) - quadratic).unsqueeze(-1)
