r"""Stefan's problem: the generalized porous medium equation with a coefficient that jumps, the model of a melting front.

With η = x / (2 √t), for u(t, 0) = 1 and u = 0 at t = 0, the solution on a half line is

.. math:: u = 1 - (1 - u^*) \frac{\operatorname{erf}(η / \sqrt{k_h})}{\operatorname{erf}(α / \sqrt{k_h})} \;(η \le α), \qquad
          u = u^* \frac{\operatorname{erfc}(η / \sqrt{k_l})}{\operatorname{erfc}(α / \sqrt{k_l})} \;(η > α),

and zero beyond the front if k_l = 0, where k is k_h for u ≥ u* and k_l below; α makes the flux :math:`-k u_x` continuous.

References: Vázquez, The Porous Medium Equation, Oxford 2007; Maddix, Sampaio and Gerritsen, Numerical artifacts in the discontinuous
generalized porous medium equation, Journal of Computational Physics 368 (2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .porous_medium import GeneralizedPorousMedium

__all__ = ["Stefan"]


@dataclass(frozen=True, kw_only=True)
class Stefan(GeneralizedPorousMedium):
    """k jumps from ``low`` to ``high`` at u = u*. u(t, 0) = 1, u = 0 at t = 0, and at the right end u is that of the half line.

    The residual holds on both sides of the front, not at it, where the equation is one of fluxes.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: as in :class:`Problem`.
        duration: as in :class:`Problem`.
        accuracy: as in :class:`Problem`.
        threshold: u*, in (0, 1).
        high: k above it.
        low: k below it; zero makes u jump.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import Stefan
        >>> problem = Stefan(points=51, times=5, duration=0.1, threshold=0.6)
        >>> problem.front()
        tensor([0.0000, 0.1662, 0.2351, 0.2879, 0.3325], dtype=torch.float64)
        >>> (problem.solve(refine=1) - problem.exact()).abs().mean() < 0.02
        tensor(True)
    """

    duration: float = 0.1
    threshold: float = 0.6
    high: float = 1.0
    low: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold = {self.threshold}: it has to lie between the values 0 and 1 of u")
        if not 0 <= self.low <= self.high or self.high == 0:
            raise ValueError(f"low = {self.low}, high = {self.high}: wanted 0 <= low <= high, and high positive")

    def coefficient(self, u: Any) -> Any:  # noqa: D102
        return self.low + (self.high - self.low) * (u >= self.threshold)

    def coefficient_slope(self, u: Any) -> Any:  # noqa: D102
        return 0 * u

    def potential(self, u: Any) -> Any:  # noqa: D102
        return self.low * u + (self.high - self.low) * (u - self.threshold).clip(min=0)

    def ends(self, t: float) -> tuple[float, float]:  # noqa: D102
        alpha, h, low = self.speed / 2, math.sqrt(self.high), math.sqrt(self.low)
        eta = self.length / (2 * math.sqrt(t)) if t > 0 else math.inf
        if eta <= alpha:
            return 1.0, 1 - (1 - self.threshold) * math.erf(eta / h) / math.erf(alpha / h)
        scale = math.erfc(alpha / low) if low else 0.0
        return 1.0, self.threshold * math.erfc(eta / low) / scale if scale else 0.0

    @cached_property
    def speed(self) -> float:
        """The front is at speed · √t; speed = 2 α."""
        from scipy.optimize import brentq
        from scipy.special import erfcx

        h, low, u = math.sqrt(self.high), math.sqrt(self.low), self.threshold

        def excess(alpha: float) -> float:
            # The flux from the left minus that to the right, both times √π exp(α²/k_high): erfcx is exp(z²) erfc(z).
            right = low / erfcx(alpha / low) if low else math.sqrt(math.pi) * alpha
            return h * (1 - u) / math.erf(alpha / h) - u * right * math.exp((alpha / h) ** 2)

        return 2 * brentq(excess, 1e-9 * h, 20 * h, xtol=1e-15 * h, rtol=1e-14)

    def exact(self) -> Tensor:
        """The similarity solution, ``(times, points)`` in float64."""
        return self._value(torch.where(self.x > 0, self.x / (2 * self.t[:, None].sqrt()), 0))

    def mass(self) -> Tensor:
        """Its integral over [0, length] at each time, ``(times,)``."""
        alpha, h, low = self.speed / 2, math.sqrt(self.high), math.sqrt(self.low)
        root = 2 * self.t.sqrt()
        end = self.length / root  # η at the right end
        edge = end.clamp(max=alpha)
        z = edge / h
        integral_of_erf = z * torch.erf(z) + (torch.exp(-z * z) - 1) / math.sqrt(math.pi)
        mass = edge - (1 - self.threshold) / math.erf(alpha / h) * h * integral_of_erf
        if low:
            mass = mass + self.threshold * low * (self._beyond(torch.full_like(end, alpha)) - self._beyond(end.clamp(min=alpha)))
        return root * mass

    def _value(self, eta: Tensor) -> Tensor:
        alpha, h, low = self.speed / 2, math.sqrt(self.high), math.sqrt(self.low)
        before = 1 - (1 - self.threshold) * torch.erf(eta / h) / math.erf(alpha / h)
        if not low:
            return torch.where(eta <= alpha, before, 0)
        return torch.where(eta <= alpha, before, self.threshold * self._relative(eta.clamp(min=alpha)))

    def _relative(self, eta: Tensor) -> Tensor:
        """erfc(η / √k_l) over its value at the front; both may underflow, not their ratio."""
        z, front = eta / math.sqrt(self.low), torch.tensor(self.speed / 2 / math.sqrt(self.low), dtype=torch.float64)
        ratio = torch.exp(front**2 - z**2) * torch.special.erfcx(z) / torch.special.erfcx(front)
        return torch.where(z.isinf(), 0, ratio)

    def _beyond(self, eta: Tensor) -> Tensor:
        """The integral of erfc from η / √k_l to infinity, over erfc at the front."""
        z = eta / math.sqrt(self.low)
        tail = self._relative(eta) * (1 / (math.sqrt(math.pi) * torch.special.erfcx(z)) - z)
        return torch.where(z.isinf(), 0, tail)

    def front(self) -> Tensor:
        """The place where u = u* at each time, ``(times,)``; it may lie beyond the right end."""
        return self.speed * self.t.sqrt()
