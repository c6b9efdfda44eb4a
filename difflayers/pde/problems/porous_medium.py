r"""The generalized porous medium equation: diffusion whose coefficient depends on what diffuses.

.. math:: \frac{\partial u}{\partial t} = \frac{\partial}{\partial x}\Bigl(k(u) \frac{\partial u}{\partial x}\Bigr)
          = \frac{\partial^2 Φ(u)}{\partial x^2}, \qquad Φ(u) = \int_0^u k .

Three kinds, from smooth to discontinuous, each with an exact solution and the total mass :math:`\int_0^L u\, dx` at all times in closed
form:

- :class:`Diffusion`, k constant: a sine series.
- :class:`PorousMedium`, :math:`k = u^m`: degenerate where u = 0, so that what enters at x = 0 moves behind a sharp front at x = t. Also
  Barenblatt's solution, which spreads from a point and keeps its mass.
- :class:`Stefan`, k a step at the value u*: a similarity solution of two error functions with a front that moves like the square root
  of t. There the slope jumps, or, where the lower coefficient is zero, the value itself.

**Reference solution.** Finite volumes in the variable Φ, whose fluxes need no value of k at a face and stay right where k vanishes or
jumps, and an implicit multistep method (LSODA) in time. At a front the error is of first order in the mesh, in the mean.

References: Vázquez, The Porous Medium Equation, Oxford 2007; Maddix, Sampaio and Gerritsen, Numerical artifacts in the generalized porous
medium equation, Journal of Computational Physics 362 (2018); Hansen et al., Learning physical models that can respect conservation laws,
ICML 2023, arXiv:2302.11002 (boundary-driven solutions and parameters).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ShapeError
from ..finite_difference import finite_difference
from .method_of_lines import method_of_lines
from .problem import Problem

__all__ = ["Diffusion", "GeneralizedPorousMedium", "PorousMedium", "Stefan"]


@dataclass(frozen=True, kw_only=True)
class GeneralizedPorousMedium(Problem):
    """What the three kinds have in common: u_t = (k(u) u_x)_x on [0, length], with given values at both ends."""

    points: int = 101
    times: int = 101
    length: float = 1.0
    duration: float = 1.0

    @abstractmethod
    def coefficient(self, u: Any) -> Any:
        """k(u), of a tensor or an array."""

    @abstractmethod
    def coefficient_slope(self, u: Any) -> Any:
        """The derivative of k, where it has one."""

    @abstractmethod
    def potential(self, u: Any) -> Any:
        """Φ(u), the integral of k from 0 to u."""

    def ends(self, t: float) -> tuple[float, float]:
        """The values of u at both ends at the time t."""
        return 0.0, 0.0

    def features(self, basis: Tensor, *args: Tensor) -> dict[str, Tensor]:  # noqa: D102
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3),
            "u_x": finite_difference(basis, dx, dim=-2),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2),
        }

    def residual(self, products: dict[str, Tensor], *args: Tensor) -> Tensor:  # noqa: D102
        u = products["u"]
        return products["u_t"] - self.coefficient(u) * products["u_xx"] - self.coefficient_slope(u) * products["u_x"].square()

    def solve(self, initial: Tensor | None = None, *, refine: int | None = None, rtol: float = 1e-8, atol: float = 1e-10) -> Tensor:
        """The reference solution. Not differentiable: it is what a prediction is compared with.

        Args:
            initial: ``(*batch, points)``, linear between the points; None is zero.
            refine: the solver divides each cell of the mesh into so many. None: as many as make at least 400 cells.
            rtol: relative tolerance of a step in time.
            atol: absolute tolerance of a step in time.

        Returns:
            ``(*batch, times, points)``, with dtype and device of ``initial``, or in float64.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            NotConvergedError: the integration failed.
        """
        initial = torch.zeros(self.points, dtype=torch.float64) if initial is None else initial
        if initial.shape[-1:] != (self.points,):
            raise ShapeError(f"initial has shape {tuple(initial.shape)}; wanted (*batch, points) with points = {self.points}")
        refine = math.ceil(400 / (self.points - 1)) if refine is None else refine
        fine = np.linspace(0, self.length, (self.points - 1) * refine + 1)
        coarse = initial.detach().to("cpu", torch.float64).reshape(-1, self.points).numpy()
        start = np.stack([np.interp(fine, self.x.numpy(), row) for row in coarse])
        times = self.t.numpy()
        inside = method_of_lines(self._rate(fine[1]), start[:, 1:-1], times, rtol=rtol, atol=atol, method="LSODA", lband=1, uband=1)
        ends = torch.tensor([self.ends(t) for t in times], dtype=torch.float64).expand(len(coarse), -1, -1)
        u = torch.cat([ends[..., :1], inside, ends[..., 1:]], -1)[..., ::refine]
        u[:, 0] = torch.from_numpy(coarse)  # which the value at an end may contradict
        return u.reshape(*initial.shape[:-1], self.times, self.points).to(initial)

    def _rate(self, dx: float) -> Any:
        """The finite volumes around the points between the ends."""

        def rate(t: float, inside: Any) -> Any:
            left, right = self.ends(t)
            return np.diff(self.potential(np.concatenate([[left], inside, [right]])), n=2) / dx**2

        return rate


@dataclass(frozen=True, kw_only=True)
class Diffusion(GeneralizedPorousMedium):
    """k constant, u = 0 at both ends.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: as in :class:`Problem`.
        duration: as in :class:`Problem`.
        diffusivity: k.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import Diffusion
        >>> problem = Diffusion(points=33, times=5, diffusivity=0.1)
        >>> initial = problem.initial(2, generator=torch.Generator().manual_seed(0))
        >>> (problem.solve(initial, refine=1) - problem.exact(initial)).abs().amax() < 1e-2
        tensor(True)
    """

    diffusivity: float = 0.1

    def coefficient(self, u: Any) -> Any:  # noqa: D102
        return self.diffusivity + 0 * u

    def coefficient_slope(self, u: Any) -> Any:  # noqa: D102
        return 0 * u

    def potential(self, u: Any) -> Any:  # noqa: D102
        return self.diffusivity * u

    def initial(
        self, batch: int, *, modes: int = 4, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Random initial conditions: sums of sines, the j-th with a normal amplitude of standard deviation 1/j.

        Args:
            batch: how many.
            modes: how many sines.
            generator: where the numbers come from; on the CPU.
            dtype: of the result.

        Returns:
            ``(batch, points)``.
        """
        j = torch.arange(1, modes + 1, dtype=torch.float64)
        amplitudes = torch.randn(batch, modes, generator=generator, dtype=torch.float64) / j
        return (amplitudes @ torch.sin(math.pi / self.length * j[:, None] * self.x)).to(dtype)

    def exact(self, initial: Tensor) -> Tensor:
        """The solution for an initial condition that is a sum of at most ``points − 2`` sines.

        Args:
            initial: ``(*batch, points)``.

        Returns:
            ``(*batch, times, points)``.
        """
        return (self._amplitudes(initial) @ self._sines()).to(initial)

    def mass(self, initial: Tensor) -> Tensor:
        """The integral of that solution over [0, length] at each time, ``(*batch, times)``.

        Args:
            initial: ``(*batch, points)``.
        """
        j = torch.arange(1, self.points - 1, dtype=torch.float64)
        return (self._amplitudes(initial) @ ((1 - torch.cos(math.pi * j)) * self.length / (math.pi * j))).to(initial)

    def _sines(self) -> Tensor:
        j = torch.arange(1, self.points - 1, dtype=torch.float64)
        return torch.sin(math.pi / self.length * j[:, None] * self.x)

    def _amplitudes(self, initial: Tensor) -> Tensor:
        """``(*batch, times, points − 2)``: of each sine at each time."""
        first = initial.to("cpu", torch.float64) @ self._sines().mT * 2 / (self.points - 1)
        j = torch.arange(1, self.points - 1, dtype=torch.float64)
        return first.unsqueeze(-2) * torch.exp(-self.diffusivity * (math.pi / self.length * j) ** 2 * self.t[:, None])


@dataclass(frozen=True, kw_only=True)
class PorousMedium(GeneralizedPorousMedium):
    """k = u^m. Filled from the left by u(t, 0) = (m t)^(1/m), u is (m (t − x))^(1/m) up to the front at x = t, and zero beyond.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: as in :class:`Problem`. The front may not pass it: at least ``duration`` if ``driven``.
        duration: as in :class:`Problem`.
        exponent: m ≥ 1; the slope at the front is infinite for m > 1.
        driven: whether u enters from the left; else u = 0 at both ends, and mass is kept until it reaches them.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import PorousMedium
        >>> problem = PorousMedium(points=51, times=5, exponent=2.0)
        >>> (problem.solve(refine=1) - problem.exact()).abs().mean() < 1e-3
        tensor(True)
        >>> problem.mass()
        tensor([0.0000, 0.1179, 0.3333, 0.6124, 0.9428], dtype=torch.float64)
    """

    exponent: float = 2.0
    driven: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponent >= 1:
            raise ValueError(f"exponent = {self.exponent}: it has to be at least 1")
        if self.driven and self.duration > self.length:
            raise ValueError(f"the front at x = t leaves [0, {self.length}] before t = {self.duration}; shorten duration")

    def coefficient(self, u: Any) -> Any:  # noqa: D102
        return u.clip(min=0) ** self.exponent

    def coefficient_slope(self, u: Any) -> Any:  # noqa: D102
        return self.exponent * u.clip(min=0) ** (self.exponent - 1)

    def potential(self, u: Any) -> Any:  # noqa: D102
        return u.clip(min=0) ** (self.exponent + 1) / (self.exponent + 1)

    def ends(self, t: float) -> tuple[float, float]:  # noqa: D102
        return ((self.exponent * t) ** (1 / self.exponent), 0.0) if self.driven else (0.0, 0.0)

    def exact(self) -> Tensor:
        """The solution that enters from the left, ``(times, points)`` in float64."""
        return (self.exponent * (self.t[:, None] - self.x).clamp(min=0)) ** (1 / self.exponent)

    def mass(self) -> Tensor:
        """Its integral over [0, length] at each time, ``(times,)``: what has flown in."""
        power = 1 + 1 / self.exponent
        return (self.exponent * self.t) ** power / (self.exponent + 1)

    def front(self) -> Tensor:
        """The place of the front at each time, ``(times,)``."""
        return self.t

    def barenblatt(self, start: float, mass: float) -> Tensor:
        """Barenblatt's solution around the middle of the interval, ``(times, points)``: at t = 0 it is ``start`` old.

        Args:
            start: how long ago all of the mass was in one point.
            mass: the integral of u, for all times.
        """
        m = self.exponent
        rate = 1 / (m + 2)
        # The integral of (C - κ ξ²)^(1/m) is C^(1/m + 1/2) times this one.
        unit = math.exp(math.lgamma(0.5) + math.lgamma(1 / m + 1) - math.lgamma(1 / m + 1.5)) / math.sqrt(m * rate / 2)
        height = (mass / unit) ** (1 / (1 / m + 0.5))
        age = (self.t[:, None] + start) ** rate
        return (height - m * rate / 2 * ((self.x - self.length / 2) / age) ** 2).clamp(min=0) ** (1 / m) / age


@dataclass(frozen=True, kw_only=True)
class Stefan(GeneralizedPorousMedium):
    r"""k jumps from ``low`` to ``high`` at u = u*, the model of a melting front. u(t, 0) = 1, and u = 0 at t = 0.

    With η = x / (2 √t) the solution on a half line is

    .. math:: u = 1 - (1 - u^*) \frac{\operatorname{erf}(η / \sqrt{k_h})}{\operatorname{erf}(α / \sqrt{k_h})} \;(η \le α), \qquad
              u = u^* \frac{\operatorname{erfc}(η / \sqrt{k_l})}{\operatorname{erfc}(α / \sqrt{k_l})} \;(η > α),

    and zero behind the front if k_l = 0; α makes the flux continuous. The right end has the values of that solution.

    The residual holds on both sides of the front, not at it, where the equation is one of fluxes.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: as in :class:`Problem`.
        duration: as in :class:`Problem`.
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
        return 1.0, float(self._value(np.array(self.length), t)) if t > 0 else 0.0

    @cached_property
    def speed(self) -> float:
        """The front is at speed · √t; speed = 2 α."""
        from scipy.optimize import brentq
        from scipy.special import erfcx

        h, u = math.sqrt(self.high), self.threshold

        def excess(alpha: float) -> float:
            # The flux from the left minus that to the right, both times √π exp(α²/k_high): erfcx is exp(z²) erfc(z).
            right = math.sqrt(self.low) / erfcx(alpha / math.sqrt(self.low)) if self.low else math.sqrt(math.pi) * alpha
            return h * (1 - u) / math.erf(alpha / h) - u * right * math.exp((alpha / h) ** 2)

        return 2 * brentq(excess, 1e-9 * h, 20 * h, xtol=1e-15 * h, rtol=1e-14)

    def _value(self, x: Any, t: float) -> Any:
        from scipy.special import erf, erfc

        alpha, h, low = self.speed / 2, math.sqrt(self.high), math.sqrt(self.low)
        eta = x / (2 * math.sqrt(t))
        behind = self.threshold * erfc(eta / low) / erfc(alpha / low) if low else 0.0
        return np.where(eta <= alpha, 1 - (1 - self.threshold) * erf(eta / h) / erf(alpha / h), behind)

    def exact(self) -> Tensor:
        """The similarity solution, ``(times, points)`` in float64."""
        x = self.x.numpy()
        rows = [self._value(x, float(t)) if t > 0 else np.where(x > 0, 0.0, 1.0) for t in self.t]
        return torch.from_numpy(np.stack(rows))

    def mass(self) -> Tensor:
        """Its integral over [0, length] at each time, ``(times,)``."""
        alpha, h, low = self.speed / 2, math.sqrt(self.high), math.sqrt(self.low)
        root = 2 * self.t.sqrt()
        inside = torch.where(self.t > 0, self.length / root, torch.inf)  # η at the right end
        edge = inside.clamp(max=alpha)
        before = edge - (1 - self.threshold) / math.erf(alpha / h) * h * (_integral_of_erf(edge / h))
        if not low:
            return root * before
        tail = (_integral_of_erfc(torch.tensor(alpha / low)) - _integral_of_erfc(inside / low)).clamp(min=0)
        return root * (before + self.threshold * low / math.erfc(alpha / low) * tail)

    def front(self) -> Tensor:
        """The place where u = u* at each time, ``(times,)``; it may lie beyond the right end."""
        return self.speed * self.t.sqrt()


def _integral_of_erf(z: Tensor) -> Tensor:
    """From 0 to z."""
    return z * torch.erf(z) + (torch.exp(-z * z) - 1) / math.sqrt(math.pi)


def _integral_of_erfc(z: Tensor) -> Tensor:
    """From z to infinity."""
    return torch.where(z.isinf(), 0, torch.exp(-z * z) / math.sqrt(math.pi) - z.nan_to_num(posinf=0) * torch.erfc(z))
