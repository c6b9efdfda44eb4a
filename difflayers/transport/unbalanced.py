r"""Transport whose marginals may be missed at a price: optimality equations, and the value.

.. math:: \min_{P ≥ 0} \; ⟨P, C⟩ + ε \sum_{ij} P_{ij} (\log P_{ij} - 1) + ρ_a \operatorname{KL}(P 1 \mid a)
   + ρ_b \operatorname{KL}(P^T 1 \mid b), \qquad \operatorname{KL}(p \mid a) = \sum_i p_i \log (p_i / a_i) - p_i + a_i .

The plan is :math:`P = e^{(f ⊕ g - C)/ε}` again, and the potentials are the marginal prices :math:`f = -ρ_a \log(P 1 / a)`:

.. math:: F(f, g) = \begin{pmatrix} P 1 - a e^{-f/ρ_a} \\ P^T 1 - b e^{-g/ρ_b} \end{pmatrix} = 0 .

The Jacobian is that of the marginal equations (:mod:`~difflayers.transport.marginals`) with :math:`a e^{-f/ρ_a} / ρ_a` and :math:`b
e^{-g/ρ_b} / ρ_b` added to its diagonal: positive definite, so that the potentials are unique, even if one side alone has a price.
Everything is written in :math:`1/ρ`, which is zero for a side that must be met. The sweeps and Newton's method are those of the balanced
problem with damped updates.

References: Chizat, Peyré, Schmitzer and Vialard, Scaling algorithms for unbalanced optimal transport problems, Mathematics of Computation
87 (2018), arXiv:1607.05816; Séjourné, Feydy, Vialard, Trouvé and Peyré, Sinkhorn divergences for unbalanced optimal transport, 2019,
arXiv:1910.12958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .marginals import DualValue, Factor, Marginals, plan_of

__all__ = ["PricedDualValue", "PricedMarginals", "prices_of"]

Penalty = float | Tensor | None


def prices_of(penalty: Penalty | tuple[Penalty, Penalty], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """1/ρ of the rows and of the columns in float64, zero where a side must be met; None if both must.

    Args:
        penalty: ρ of both sides, or of each; None and infinity stand for a side that must be met.
        like: on the device that is wanted.

    Raises:
        ValueError: a number that is not positive, or not two of them.
    """
    pair = penalty if isinstance(penalty, tuple) else (penalty, penalty)
    if len(pair) != 2:
        raise ValueError(f"marginal_penalty must be one value, or a pair for rows and columns, got {len(pair)} of them")
    prices = []
    for rho in pair:
        if isinstance(rho, Tensor):
            # A NaN would come back as 0 · NaN in the gradient.
            price = 1 / torch.where(rho > 0, rho, 1).to(torch.float64)
            prices.append(torch.where(rho > 0, price, torch.nan))
            continue
        rho = math.inf if rho is None else rho
        if not rho > 0:
            raise ValueError(f"marginal_penalty must be positive, got {rho}; None or infinity if the marginals must be met")
        prices.append(torch.full((), 1 / rho, dtype=torch.float64, device=like.device))
    if not any(isinstance(rho, Tensor) or (rho is not None and rho < math.inf) for rho in pair):
        return None
    return prices[0], prices[1]


def _left(marginal: Tensor, potential: Tensor, price: Tensor) -> Tensor:
    """What its price leaves of a marginal."""
    return marginal * torch.exp(-price.unsqueeze(-1) * potential)


class PricedMarginals(Marginals):
    """F(f, g; C, a, b, ε, 1/ρ_a, 1/ρ_b, usable). Potentials of zero marginals are held at zero."""

    core_ndims = (2, 1, 1, 0, 0, 0, 0)
    inadmissible = "where one marginal has no mass at all the other one's potentials are infinite"

    @staticmethod
    def equations(x: Tensor, C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *rest: Tensor) -> Tensor:
        """F."""
        P = plan_of(x, C, a, b, epsilon)
        f, g = x.split(list(C.shape[-2:]), -1)
        rows, columns = P.sum(-1) - _left(a, f, rest[0]), P.sum(-2) - _left(b, g, rest[1])
        return torch.cat([torch.where(a > 0, rows, f), torch.where(b > 0, columns, g)], -1)

    def surplus(self, left: Tensor, right: Tensor) -> Tensor:
        """All of the mass, where the other side has none."""
        return torch.where((left > 0) == (right > 0), 0, torch.maximum(left, right))

    def balanced(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The marginals as they are."""
        return a, b

    def slack(self, flat: Sequence[Tensor]) -> Tensor:
        """ε/ρ of both sides."""
        epsilon, left, right = flat[3:6]
        return torch.stack([epsilon * left, epsilon * right], -1)

    def height(self, a: Tensor, b: Tensor, flat: Sequence[Tensor]) -> Tensor:
        """The constant that makes what the prices leave of the masses equal."""
        masses = [part.sum(-1).clamp(min=torch.finfo(part.dtype).tiny) for part in (a, b)]
        return (masses[0] / masses[1]).log().abs() / (flat[4] + flat[5])

    def wanted(self, x: Tensor, a: Tensor, b: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the prices leave of the marginals."""
        f, g = x.split([a.shape[-1], b.shape[-1]], -1)
        return _left(a, f, flat[4]), _left(b, g, flat[5])

    def diagonal(self, P: Tensor, point: Sequence[Any]) -> Tensor:
        """That of the marginal equations and what the prices add."""
        x, _, a, b, epsilon, *prices, _ = point
        return super().diagonal(P, point) + torch.cat(_added(x, a, b, epsilon, prices), -1)

    def factorized(self, P: Tensor, x: Tensor, flat: Sequence[Tensor]) -> Factor:
        """The Jacobian at flat points, whose plans are P."""
        return _PricedFactor(P, x, *flat[1:6])

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form."""
        C, a, b, epsilon, *prices, usable = theta
        as_balanced = [i for i in which if i in (0, 3)]
        slopes = dict(zip(as_balanced, super().pullback(x, (C, a, b, epsilon, usable), as_balanced, u), strict=True))
        sides = zip((a, b), x.split(list(C.shape[-2:]), -1), u.split(list(C.shape[-2:]), -1), prices, strict=True)
        for i, (marginal, potential, weight, price) in enumerate(sides):
            factor = torch.where(marginal > 0, torch.exp(-price.unsqueeze(-1) * potential) * weight, 0)
            slopes[1 + i] = (-factor).sum_to_size(marginal.shape)
            slopes[4 + i] = (factor * marginal * potential).sum(-1).sum_to_size(price.shape)
        return [slopes[i] for i in which]


def _added(x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, prices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the prices add to the diagonal of the Jacobian, times ε."""
    f, g = x.split([a.shape[-1], b.shape[-1]], -1)
    left, right = ((epsilon * price).unsqueeze(-1) for price in prices)
    return left * _left(a, f, prices[0]), right * _left(b, g, prices[1])


class _PricedFactor(Factor):
    """The same elimination, with a longer diagonal."""

    def __init__(self, P: Tensor, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__(P, a, b, epsilon)
        added = [part.unsqueeze(-1) for part in _added(x, a, b, epsilon, (left, right))]
        long, short = added[::-1] if self.flipped else added
        diagonal = self.rows + long
        self.inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
        self.excess = (short + self.P.mT @ (self.inverse * long)).squeeze(-1)
        self.columns = self.columns + short


class PricedDualValue(DualValue):
    """v − L(C, a, b, ε, 1/ρ_a, 1/ρ_b, potentials) = 0, with the Lagrangian of the objective plus ε (Σ a + Σ b)/2."""

    core_ndims = (2, 1, 1, 0, 0, 0, 1)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """L."""
        return ((-self.lagrangian_error(x0.new_zeros(()), *theta)).expand(x0.shape).clone(),)

    @staticmethod
    def lagrangian_error(v: Tensor, C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *rest: Tensor) -> Tensor:
        """v − L."""
        *prices, potentials = rest
        P = plan_of(potentials, C, a, b, epsilon)
        f, g = potentials.split(list(C.shape[-2:]), -1)
        mass = (a.sum(-1) + b.sum(-1)) / 2
        return v - (_gain(a, f, prices[0]) + _gain(b, g, prices[1]) + epsilon * (mass - P.sum((-1, -2)))).unsqueeze(-1)


def _gain(marginal: Tensor, potential: Tensor, price: Tensor) -> Tensor:
    """Σ a ρ (1 − e^(−f/ρ)), or ⟨a, f⟩ where nothing has a price."""
    price = price.unsqueeze(-1)
    some = torch.where(price > 0, price, 1)
    return (marginal * torch.where(price > 0, -torch.expm1(-some * potential) / some, potential)).sum(-1)
