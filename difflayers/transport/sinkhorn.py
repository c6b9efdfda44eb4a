r"""Entropic optimal transport as a layer: batched, differentiable to any order at any temperature.

.. math:: \min_{P \ge 0} \; ⟨P, C⟩ + ε \sum_{ij} P_{ij} (\log P_{ij} - 1) \quad\text{subject to}\quad P 1 = a,\; P^T 1 = b .

The solution is :math:`P = e^{(f ⊕ g - C)/ε}` with potentials f and g that meet the marginals. They are found by Sinkhorn's sweeps
(:mod:`~difflayers.transport.sweeps`), or, where those are slow, by Newton's method (:mod:`~difflayers.transport.newton`). The core
differentiates the marginal equations (:mod:`~difflayers.transport.marginals`): one Cholesky factorization of the size of the shorter side,
whatever the iterations were. With ``marginal_penalty`` the marginals may be missed, at the price of a relative entropy
(:mod:`~difflayers.transport.unbalanced`).

References: Cuturi, Sinkhorn distances, NeurIPS 2013, arXiv:1306.0895; Peyré and Cuturi, Computational optimal transport, 2019,
arXiv:1803.00567; Eisenberger et al., A unified framework for implicit Sinkhorn differentiation, CVPR 2022, arXiv:2205.06688.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..holding import hold
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..solution import OnFailure
from .arguments import BALANCED, centred, cleaned, filled_where_lost, stopping, validate
from .marginals import DualValue, Marginals, Options, plan_of
from .potentials import Method
from .unbalanced import Penalty, PricedDualValue, PricedMarginals, prices_of
from .unrolled import unrolled_potentials

__all__ = ["SinkhornLayer", "TransportSolution", "sinkhorn"]


class TransportSolution(NamedTuple):
    """What :func:`sinkhorn` returns; plan, f, g, value and dual_value are differentiable.

    :func:`~difflayers.transport.sparse_transport` returns it, too, and says there what differs.

    Attributes:
        plan: ``(*batch, n, m)``, exp((f ⊕ g − cost)/ε).
        f: ``(*batch, n)``, potentials of the rows; −inf where a is zero. The constant that f and g could exchange is chosen so that
            ⟨a, f⟩ = ⟨b, g⟩.
        g: ``(*batch, m)``, potentials of the columns; −inf where b is zero.
        value: ``(*batch,)``, ⟨plan, cost⟩, the cost of the plan without the entropy.
        dual_value: ``(*batch,)``, ⟨a, f⟩ + ⟨b, g⟩ = value + ε Σ plan log plan. Its gradient takes no linear system: in the cost it
            is the plan, in a and b it is f and g up to a constant. With ``marginal_penalty``: the optimal objective plus
            ε (Σ a + Σ b)/2, which tends to the former as the penalties grow.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`.
        marginal_error: ``(*batch,)``, the larger of ‖plan 1 − a‖₁ and ‖planᵀ 1 − b‖₁. With ``marginal_penalty`` it is the residual of the
            optimality equations, in which a exp(−f/ρ) takes the place of a, and b exp(−g/ρ) that of b.
        iterations: ``(*batch,)`` int64, sweeps and Newton steps.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    value: Tensor
    dual_value: Tensor
    status: Tensor
    marginal_error: Tensor
    iterations: Tensor


@eager
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.1,
    marginal_penalty: Penalty | tuple[Penalty, Penalty] = None,
    method: Method = "auto",
    backward: Literal["implicit", "unroll"] = "implicit",
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> TransportSolution:
    """Solve min ⟨P, cost⟩ + ε Σ P (log P − 1) subject to P 1 = a, Pᵀ 1 = b, for each element of the batch on its own.

    Leading batch dimensions broadcast. An argument without them is shared by the batch; its gradient is the sum. Everything is computed
    in float64; float32 arguments give float32 results.

    With ``marginal_penalty`` ρ the constraints become terms ρ KL(P 1 | a) + ρ KL(Pᵀ 1 | b) of the objective, KL(p | a) = Σ p log(p/a) − p
    + a: mass that is too far from everything is given up, and the masses of a and b may differ (unbalanced transport).

    An entry of a or b that is zero gives a row or column of zeros and has the potential −inf; it receives the gradient zero.

    Args:
        cost: ``(*batch, n, m)``, finite.
        a: ``(*batch, n)``, masses of the rows, nonnegative. None: 1/n each.
        b: ``(*batch, m)``, masses of the columns, with the sum of a. None: 1/m each.
        epsilon: the temperature, a positive number in units of the cost or a tensor ``(*batch,)``, which is differentiated too. Small
            values give plans near the unregularized ones, sharp and sparse.
        marginal_penalty: ρ, what missing the marginals costs (``reg_m`` of other packages, or the ``reach`` to the power of the cost), in
            units of the cost: a positive number, or a tensor ``(*batch,)`` of finite ones, which is differentiated too; or a pair for the
            rows and the columns. None or infinity: they are met; one of a pair: only the other side is relaxed.
        method: "sinkhorn", "newton", "sparse_newton" (steps by conjugate gradients on the large entries, for large plans whose marginals
            are met), or "auto": sweeps, and where they converge slowly Newton's method, the sparse one if the plan is large.
        backward: "implicit", or "unroll", which lets autograd follow plain sweeps: slow and inexact, to compare with.
        tol: marginal error of a solved element, relative to the mass of the plan. None: 1e-10 (float64), 1e-6 (float32). Where ε is so
            small that rounding alone costs more, the rounding counts.
        max_iter: most sweeps, and most Newton steps. None: 10000 and 200.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate; where the masses
            differ, the plan for b scaled to the mass of a).

    Returns:
        :class:`TransportSolution`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        InfeasibleError: a marginal is negative, or the masses differ though none may be missed (``on_failure="raise"``).
        NotConvergedError: the marginals are not met, or an argument is not finite (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> found = sinkhorn(cost, epsilon=0.5)
        >>> found.plan.detach()
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])
        >>> torch.autograd.grad(found.dual_value, cost)[0]
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(map(repr, get_args(Method)))}")
    if backward not in ("implicit", "unroll"):
        raise ValueError(f"backward={backward!r} is not known; choose 'implicit' or 'unroll'")
    batch, given = validate(cost, a, b, epsilon)
    prices = prices_of(marginal_penalty, cost) or ()
    if prices:
        if backward == "unroll" or method == "sparse_newton":
            raise ValueError("backward='unroll' and method='sparse_newton' know no marginal_penalty; use the defaults")
        try:
            batch = tuple(torch.broadcast_shapes(batch, *(price.shape for price in prices)))
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(price.shape)) for price in prices)
            raise ShapeError(f"the batch dimensions {shapes} of marginal_penalty do not broadcast with {batch}") from error
    dtype = cost.dtype
    tol = stopping(tol, max_iter, dtype)
    options = Options(method, tol, max_iter, on_failure, BALANCED.get(dtype, 1e-2))
    C, a, b, eps, *prices, usable = cleaned(given, prices)
    start = C.new_zeros(*batch, sum(C.shape[-2:]))
    start, C, a, b, eps, usable, *prices = visible_to_modes([start, C, a, b, eps, usable, *prices])
    if backward == "unroll":
        x, status, error, iterations = unrolled_potentials(C, a, b, eps, usable, start, options)
    else:
        equations = (PricedMarginals if prices else Marginals)(len(batch), options)
        x, status, error, iterations = ImplicitFunction.apply(equations, start.detach(), C, a, b, eps, *prices, usable)
    plan = plan_of(x, C, a, b, eps)
    value = (plan * C).sum((-1, -2))
    lagrangian = (PricedDualValue if prices else DualValue)(len(batch))
    dual = ImplicitFunction.apply(lagrangian, start.detach()[..., :1], C, a, b, eps, *prices, x)[0].squeeze(-1)
    f, g = centred(x, a, b, free=not prices)
    found = filled_where_lost([plan, f, g, value, dual], status, on_failure)
    return TransportSolution(*(part.to(dtype) for part in found), status, error.to(dtype), iterations)


class SinkhornLayer(nn.Module):
    """:func:`sinkhorn` as a module: ``forward`` returns the plan, ``solve`` the whole :class:`TransportSolution`.

    Args:
        epsilon: as in :func:`sinkhorn`; a tensor becomes a buffer, an ``nn.Parameter`` is learned.
        marginal_penalty: as in :func:`sinkhorn`; a tensor becomes a buffer, an ``nn.Parameter`` is learned.
        method: as in :func:`sinkhorn`.
        backward: as in :func:`sinkhorn`.
        tol: as in :func:`sinkhorn`.
        max_iter: as in :func:`sinkhorn`.
        on_failure: as in :func:`sinkhorn`.

    Example:
        >>> import torch
        >>> from difflayers import SinkhornLayer
        >>> layer = SinkhornLayer(epsilon=0.5)
        >>> layer(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])
    """

    def __init__(
        self,
        epsilon: float | Tensor = 0.1,
        *,
        marginal_penalty: Penalty | tuple[Penalty, Penalty] = None,
        method: Method = "auto",
        backward: Literal["implicit", "unroll"] = "implicit",
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.epsilon: float | Tensor
        self.row_penalty: Penalty
        self.column_penalty: Penalty
        pair = marginal_penalty if isinstance(marginal_penalty, tuple) else (marginal_penalty, marginal_penalty)
        for name, value in zip(("epsilon", "row_penalty", "column_penalty"), (epsilon, *pair), strict=True):
            hold(self, name, value)
        self.method: Method = method
        self.backward_mode: Literal["implicit", "unroll"] = backward
        self.tol, self.max_iter = tol, max_iter
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
        return sinkhorn(
            cost,
            a,
            b,
            epsilon=self.epsilon,
            marginal_penalty=(self.row_penalty, self.column_penalty),
            method=self.method,
            backward=self.backward_mode,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )

    def extra_repr(self) -> str:
        """The temperature, the options that differ from their defaults, and ``on_failure``."""
        epsilon, *pair = (
            tuple(part.shape) if isinstance(part, Tensor) else part for part in (self.epsilon, self.row_penalty, self.column_penalty)
        )
        shown = [f"epsilon={epsilon}", f"on_failure={self.on_failure!r}"]
        if pair != [None, None]:
            shown.append(f"marginal_penalty={pair[0] if pair[0] == pair[1] else tuple(pair)}")
        options = {"method": self.method, "backward": self.backward_mode, "tol": self.tol, "max_iter": self.max_iter}
        shown += [f"{name}={value!r}" for name, value in options.items() if value not in (None, "auto", "implicit")]
        return ", ".join(shown)
