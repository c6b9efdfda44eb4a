r"""The conditional swap, relaxed by a distribution.

Two wires carry a and b. With :math:`d = b - a` and a distribution function f that is symmetric, :math:`f(-v) = 1 - f(v)`,

.. math:: \mathrm{softmin}(a, b) = αa + (1 - α)b, \qquad \mathrm{softmax}(a, b) = (1 - α)a + αb, \qquad α = f(sd).

The weight α solves a linear program over one unknown, regularized by Ω,

.. math:: α = \arg\max_{α \in [0, 1]} \; α\,sd - Ω(α), \qquad sd = Ω'(α) = f^{-1}(α),

so :math:`dα/dv = 1/Ω''(α) = f'(v)`, and as s grows α becomes the hard choice. With :math:`q(d) = f(-sd) = 1 - α`, the share that changes
wires, the swap moves :math:`h(d) = q(d)\,d` from one wire to the other: softmin = a + h, softmax = b − h. Hence
:math:`∂\,\mathrm{softmin}/∂b = h'(d)`, and the relaxation is monotone where :math:`0 \le h' \le 1`.

================= ============================================ ==================================== ======== =============
distribution      f(v)                                         Ω(α), with t = |2α − 1|              monotone sup(h) · s
================= ============================================ ==================================== ======== =============
``logistic``      1 / (1 + exp(−v))                            α log α + (1 − α) log(1 − α)         no       0.2785
``logistic_phi``  the same of :math:`sd/|d|^λ`                 the same                             no       unbounded
``gaussian``      Φ(v)                                         −φ(Φ⁻¹(α))                           no       0.1700
``cauchy``        arctan(v)/π + ½                              −log(sin πα)/π                       yes      1/π
``reciprocal``    ½ + ½ v/(2 + |v|)                            −t − log(1 − t)                      yes      1
``optimal``       v + ½, beyond \|v\| = ¼ it is 1 − 1/(16 v)   t²/8, beyond t = ½ −log(1 − t)/16    yes      1/16
================= ============================================ ==================================== ======== =============

References: Petersen, Borgelt, Kuehne and Deussen, Differentiable sorting networks for scalable sorting and ranking supervision, ICML
2021, arXiv:2105.04019; Monotonic differentiable sorting networks, ICLR 2022, arXiv:2203.09630.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "ConditionalSwap", "Distribution"]

# Keeps logistic_phi finite at d = 0. The authors' program adds it in ``optimal`` as well; so do we, to agree with it to rounding.
_TINY = 1e-10


@dataclass(frozen=True)
class Distribution:
    """A symmetric distribution.

    Attributes:
        cdf: f.
        density: f'.
        monotone: whether the swap that it relaxes is monotone.
    """

    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]
    monotone: bool


def _logistic_density(v: Tensor) -> Tensor:
    return torch.sigmoid(v) * torch.sigmoid(-v)


def _reciprocal_cdf(v: Tensor) -> Tensor:
    # Not by abs, whose derivative at zero is none; and no ∞/∞ where v overflows.
    tail = 1 / (2 + torch.where(v < 0, -v, v))
    return torch.where(v < 0, tail, 1 - tail)


def _optimal_cdf(v: Tensor) -> Tensor:
    return torch.where(v.abs() <= 0.25, 0.5 + v, 0.5 + v.sign() * (0.5 - 1 / (16 * _beyond(v))))


def _optimal_density(v: Tensor) -> Tensor:
    return torch.where(v.abs() <= 0.25, 1.0, (4 * _beyond(v)) ** -2)


def _beyond(v: Tensor) -> Tensor:
    """|v| where it is more than a quarter."""
    return v.abs().clamp(min=0.25) + _TINY


_LOGISTIC = Distribution(torch.sigmoid, _logistic_density, monotone=False)

DISTRIBUTIONS: dict[str, Distribution] = {
    "cauchy": Distribution(lambda v: torch.atan(v) / math.pi + 0.5, lambda v: 1 / (math.pi * (1 + v * v)), monotone=True),
    "logistic": _LOGISTIC,
    "logistic_phi": _LOGISTIC,
    "gaussian": Distribution(
        lambda v: 0.5 * torch.erfc(-v / math.sqrt(2)), lambda v: torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi), monotone=False
    ),
    "reciprocal": Distribution(_reciprocal_cdf, lambda v: (2 + v.abs()) ** -2, monotone=True),
    "optimal": Distribution(_optimal_cdf, _optimal_density, monotone=True),
}


@dataclass(frozen=True)
class ConditionalSwap:
    """q(d), the share of two values at distance d that changes places.

    Args:
        distribution: a name in ``DISTRIBUTIONS``.
        steepness: s.
        art_lambda: λ of ``logistic_phi``.
    """

    distribution: str
    steepness: float
    art_lambda: float

    def weight(self, difference: Tensor) -> Tensor:
        """q(d) = f(−s d).

        Args:
            difference: d, any shape.
        """
        return DISTRIBUTIONS[self.distribution].cdf(-self._argument(difference))

    def slope(self, difference: Tensor) -> Tensor:
        """The derivative h'(d) of h(d) = q(d) d, what the swap moves.

        Args:
            difference: d, any shape.
        """
        distribution, v = DISTRIBUTIONS[self.distribution], self._argument(difference)
        # d · dv/dd, which is v itself for an argument that is linear in d.
        growth = v
        if self.distribution == "logistic_phi":
            size = difference.abs()
            growth = v * (1 - self.art_lambda * size / (size + _TINY))
        return distribution.cdf(-v) - distribution.density(v) * growth

    def _argument(self, d: Tensor) -> Tensor:
        v = d * self.steepness
        return v * (d.abs() + _TINY) ** -self.art_lambda if self.distribution == "logistic_phi" else v
