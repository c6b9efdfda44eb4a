r"""Sparse transport plans as a layer: quadratic regularization, and at most k nonzeros a column.

.. math:: \min_{T \ge 0} \; ⟨T, C⟩ + \frac{γ}{2} \sum_{ij} T_{ij}^2 \quad\text{subject to}\quad T 1 = a,\; T^T 1 = b,\;
   \text{and, with } k, \; ‖T_{\cdot j}‖_0 \le k .

Without k the solution is :math:`T = \max(α ⊕ β - C, 0)/γ` with potentials α and β that meet the marginals: exact zeros, where entropic
plans are positive everywhere. With k the problem is not convex. What is solved is its dual, whose columns are the k largest entries of
:math:`α - c_j`, projected on the simplex of mass :math:`b_j`. If they meet the rows, the plan is a solution; if not, the relaxation is
not tight. The search is in :mod:`~difflayers.transport.quadratic`. The core differentiates the equations of the marginals on the support
that was found (:mod:`~difflayers.transport.support`): one Cholesky factorization of the size of the shorter side.

References: Blondel, Seguy and Rolet, Smooth and sparse optimal transport, AISTATS 2018, arXiv:1710.06276; Liu, Puigcerver and Blondel,
Sparsity-constrained optimal transport, ICLR 2023, arXiv:2209.15466.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..holding import hold
from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..solution import OnFailure, Solution, Status, report_failures
from .arguments import (
    BALANCED,
    centred,
    cleaned,
    filled_where_lost,
    flattened,
    infeasibility,
    marginal_error,
    stopping,
    validate,
    what_failed,
)
from .quadratic import Plan, quadratic_plan, sparse_plan
from .sinkhorn import TransportSolution
from .support import Supported, SupportValue, plan_on

__all__ = ["SparseTransportLayer", "sparse_transport"]

_STEPS = 500


@eager
def sparse_transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    gamma: float | Tensor,
    k: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> TransportSolution:
    """Solve min ⟨T, cost⟩ + γ/2 ‖T‖² subject to T 1 = a, Tᵀ 1 = b, T ≥ 0, for each element of the batch on its own.

    Leading batch dimensions broadcast. An argument without them is shared by the batch; its gradient is the sum. Everything is computed
    in float64; float32 arguments give float32 results. An entry of a or b that is zero gives a row or column of zeros and has the potential
    −inf; it receives the gradient zero.

    With ``k`` the columns of the plan are exact and have at most k nonzeros, and the rows may not be met. The status tells the cases apart:
    SOLVED, the plan meets both marginals and is proved to be a best one with k nonzeros a column; NOT_TIGHT, the potentials are proved to
    maximize the dual, but the columns that they choose miss the rows by ``marginal_error``; MAX_ITER, the dual was not maximized. Nothing
    is repaired: a plan that misses the rows is handed out with ``on_failure="warn"`` only. NOT_TIGHT is the rule for small k with
    marginals that do not fit it, so routing layers use "warn", with the warning filtered out, and look at ``marginal_error``. Ties
    between the k-th and the next entry of a column, which come with NOT_TIGHT, go to the entries that are larger in the relaxed plan.

    Derivatives are those of the plan on its support, which stays the same nearby. Where an entry is just about to enter or to leave it, the
    derivative is the one-sided one of the support that was found. Where the support falls apart into components, derivatives in a and
    b are along marginals that keep the two masses of each component equal, of other directions the nearest such one; and of the
    potentials, which are then not unique, the shortest change is taken. Where the relaxation is not tight (NOT_TIGHT, MAX_ITER), the k
    chosen entries of a column stay chosen and the rows keep missing by what they miss: the derivative is that of the plan with the
    marginals b and T 1, as they move with a and b. It does not see how the potentials of ties move together. The gradient of
    ``dual_value`` is exact also there: in the cost it is the plan of the relaxed problem, which meets both marginals with more than k
    nonzeros.

    Args:
        cost: ``(*batch, n, m)``, finite.
        a: ``(*batch, n)``, masses of the rows, nonnegative. None: 1/n each.
        b: ``(*batch, m)``, masses of the columns, with the sum of a. None: 1/m each.
        gamma: γ, a positive number or a tensor ``(*batch,)``, which is differentiated too, in units of cost per mass. Plans have few
            nonzeros where γ · mass / max(n, m) is small beside the range of the cost.
        k: most nonzeros of a column, at least 1. None: any number.
        tol: marginal error of a solved element, relative to the mass; with ``k`` ten times as much is granted to the duality gap, in
            units of the cost. None: 1e-10 (float64), 1e-6 (float32). Where γ is so small that rounding alone costs more, the rounding
            counts.
        max_iter: most Newton steps. None: 500.
        on_failure: ``"raise"``, ``"nan"`` (failed elements, NOT_TIGHT ones included, are NaN and have zero gradient) or ``"warn"`` (best
            iterate; with ``k`` a plan that has exact columns and at most k nonzeros in each).

    Returns:
        :class:`~difflayers.transport.TransportSolution`, where the plan is (f ⊕ g − cost)/γ on its support and zero elsewhere; f and g are
        potentials, −inf where a marginal is zero, with ⟨a, f⟩ = ⟨b, g⟩; ``value`` is ⟨plan, cost⟩; and ``dual_value`` is the maximum
        of the dual, which is value + γ/2 ‖plan‖² for a solved element and a lower bound of what any plan costs for one that is not
        tight. Its gradient takes no linear system: in the cost it is the (relaxed) plan, in a and b it is f and g up to a constant.
        ``iterations`` are Newton steps.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        ValueError: k is not a positive integer, or gamma a number that is not positive.
        InfeasibleError: a marginal is negative, or the masses differ (``on_failure="raise"``).
        NotConvergedError: the marginals are not met, or an argument is not finite (``on_failure="raise"``); also for NOT_TIGHT, and then
            ``error.solution.status`` says so.

    Example:
        >>> import torch
        >>> from difflayers.transport import sparse_transport
        >>> cost = torch.tensor([[0.0, 1.0, 0.9], [1.0, 0.0, 0.6]])
        >>> sparse_transport(cost, gamma=1.0).plan
        tensor([[0.3333, 0.0000, 0.1667],
                [0.0000, 0.3333, 0.1667]])
        >>> sparse_transport(cost, torch.tensor([1.0, 2.0]) / 3, gamma=1.0, k=1).plan
        tensor([[0.3333, 0.0000, 0.0000],
                [0.0000, 0.3333, 0.3333]])
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be a positive integer or None, got {k!r}")
    batch, given = validate(cost, a, b, gamma, "gamma")
    dtype, (n, m) = cost.dtype, cost.shape[-2:]
    tol = stopping(tol, max_iter, dtype)
    C, a, b, strength, usable = visible_to_modes(list(cleaned(given)))
    search = _Search(len(batch), None if k is None or k >= n else k, tol, max_iter or _STEPS, on_failure, BALANCED.get(dtype, 1e-2))
    start = C.new_zeros(*batch, n + m)
    plain = [part.detach() for part in (C, a, b, strength, usable)]
    _, found, support, share, status, error, iterations = ImplicitFunction.apply(search, start, *plain)
    x = ImplicitFunction.apply(Supported(len(batch), on_failure), found, C, a, b, strength, support)[0]
    plan = plan_on(x, C, strength, support)
    value = (plan * C).sum((-1, -2))
    dual = ImplicitFunction.apply(SupportValue(len(batch)), start[..., :1], C, a, b, strength, x, share)[0].squeeze(-1)
    parts = filled_where_lost([plan, *centred(x, a, b), value, dual], status, on_failure)
    return TransportSolution(*(part.to(dtype) for part in parts), status, error.to(dtype), iterations)


class SparseTransportLayer(nn.Module):
    """:func:`sparse_transport` as a module: ``forward`` returns the plan, ``solve`` the whole solution.

    Args:
        gamma: as in :func:`sparse_transport`; a tensor becomes a buffer, an ``nn.Parameter`` is learned.
        k: as in :func:`sparse_transport`.
        tol: as in :func:`sparse_transport`.
        max_iter: as in :func:`sparse_transport`.
        on_failure: as in :func:`sparse_transport`.

    Example:
        >>> import torch
        >>> from difflayers import SparseTransportLayer
        >>> layer = SparseTransportLayer(gamma=2.0)
        >>> layer(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    def __init__(
        self,
        gamma: float | Tensor,
        *,
        k: int | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.gamma: float | Tensor
        hold(self, "gamma", gamma)
        self.k, self.tol, self.max_iter = k, tol, max_iter
        self.on_failure: OnFailure = on_failure

    def forward(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The plan ``(*batch, n, m)``.

        Args:
            cost: ``(*batch, n, m)``.
            a: ``(*batch, n)`` or None.
            b: ``(*batch, m)`` or None.
        """
        return self.solve(cost, a, b).plan

    def solve(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> TransportSolution:
        """The plan with its potentials, values and status.

        Args:
            cost: ``(*batch, n, m)``.
            a: ``(*batch, n)`` or None.
            b: ``(*batch, m)`` or None.
        """
        return sparse_transport(cost, a, b, gamma=self.gamma, k=self.k, tol=self.tol, max_iter=self.max_iter, on_failure=self.on_failure)

    def extra_repr(self) -> str:
        """The strength of the regularization, the options that differ from their defaults, and ``on_failure``."""
        gamma = tuple(self.gamma.shape) if isinstance(self.gamma, Tensor) else self.gamma
        options = {"k": self.k, "tol": self.tol, "max_iter": self.max_iter}
        shown = [f"gamma={gamma}", *(f"{name}={value!r}" for name, value in options.items() if value is not None)]
        return ", ".join([*shown, f"on_failure={self.on_failure!r}"])


class _Search(BroadcastingProblem):
    """The potentials, support, shares, status, marginal error and iterations; arguments as of the marginal equations, and ``usable``."""

    core_ndims = (2, 1, 1, 0, 0)

    def __init__(self, batch_ndim: int, k: int | None, tol: float, max_iter: int, on_failure: OnFailure, balanced: float) -> None:
        super().__init__(batch_ndim, on_failure=on_failure)
        self.options = (k, tol, max_iter, on_failure, balanced)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        k, tol, max_iter, on_failure, balanced = self.options
        batch, (n, m) = x0.shape[:-1], theta[0].shape[-2:]
        if 0 in batch:
            none = x0.new_zeros((*batch, n, m))
            status = torch.zeros(batch, dtype=torch.int64, device=x0.device)
            return x0.clone(), x0.clone(), none.bool(), none, status, x0.new_zeros(batch), status.clone()
        C, a, b, gamma, usable = given = flattened(theta, batch, self.core_ndims)
        lacking = infeasibility(a, b, balanced)
        a, b = a.clamp(min=0), b.clamp(min=0)
        mass = a.sum(-1)
        # Equal masses to the last digit: what they differ by is rounding, or a failure, and no plan meets both.
        b = b * (mass / b.sum(-1).clamp(min=torch.finfo(b.dtype).tiny)).unsqueeze(-1)
        x, share, support = x0.new_zeros(C.shape[0], n + m), torch.zeros_like(C), torch.zeros_like(C, dtype=torch.bool)
        iterations = torch.zeros(C.shape[0], dtype=torch.int64, device=x0.device)
        optimal = torch.ones_like(usable)
        # Rounding of an entry of the plan, of which both sides have no more than this many.
        noise = torch.finfo(C.dtype).eps * (n + m) * (C.amax((-1, -2)) - C.amin((-1, -2))) / gamma
        tol = torch.maximum(tol * mass, noise)
        index = (usable & (mass > 0) & (b.sum(-1) > 0)).nonzero().squeeze(-1)
        if index.numel():
            plan = _plan_of_best_orientation(*(part[index] for part in (C, a, b, gamma)), k, tol[index] / 2, max_iter)
            x[index] = torch.cat([plan.alpha, plan.beta], -1)
            support[index], share[index], optimal[index], iterations[index] = plan.support, plan.share, plan.optimal, plan.iterations
        plan = plan_on(x, C, gamma, support)
        error = marginal_error(plan, a, b)
        missed = torch.where(optimal & (k is not None), int(Status.NOT_TIGHT), int(Status.MAX_ITER))
        status = torch.where((error <= tol) & optimal, int(Status.SOLVED), missed)
        status = torch.where(lacking <= 0, status, int(Status.PRIMAL_INFEASIBLE))
        status = torch.where(usable, status, int(Status.NUMERICAL_ERROR))
        error = torch.where(usable, torch.where(lacking <= 0, error, lacking), torch.nan)
        parts = [part.reshape((*batch, *part.shape[1:])) for part in (x, support, share, status, error, iterations)]
        solution = Solution(parts[0], parts[3], parts[4], parts[5])
        report_failures(solution, what_failed("sparse_transport", status, given[1], given[2]), on_failure)
        return (x0.clone(), *parts)

    def deeper(self, size: int) -> _Search:
        return _Search(self.batch_ndim + 1, *self.options)


def _plan_of_best_orientation(C: Tensor, a: Tensor, b: Tensor, gamma: Tensor, k: int | None, tol: Tensor, max_iter: int) -> Plan:
    """The plan with the rows first; without k the shorter side is the one that is factorized."""
    if k is None and C.shape[-1] < C.shape[-2]:
        found = quadratic_plan(C, b, a, gamma, tol, max_iter)
        return found._replace(alpha=found.beta, beta=found.alpha)
    X = C.mT.contiguous()
    found = quadratic_plan(X, a, b, gamma, tol, max_iter) if k is None else sparse_plan(X, a, b, gamma, k, tol, max_iter)
    return found._replace(support=found.support.mT, share=found.share.mT)
