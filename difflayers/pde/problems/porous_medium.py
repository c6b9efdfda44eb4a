r"""The generalized porous medium equation: diffusion whose coefficient depends on what diffuses.

.. math:: \frac{\partial u}{\partial t} = \frac{\partial}{\partial x}\Bigl(k(u) \frac{\partial u}{\partial x}\Bigr)
          = \frac{\partial^2 Φ(u)}{\partial x^2}, \qquad Φ(u) = \int_0^u k .

Three kinds, from smooth to discontinuous, each with an exact solution and the total mass :math:`\int_0^L u\, dx` at all times in closed
form:

- :class:`Diffusion`, k constant: a sine series.
- :class:`PorousMedium`, :math:`k = u^m`: degenerate where u = 0, so that what enters at x = 0 moves behind a sharp front at x = t. Also
  Barenblatt's solution, which spreads from a point and keeps its mass.
- :class:`~difflayers.pde.problems.Stefan`, k a step at the value u*: a similarity solution of two error functions with a
  front that moves like the square root of t. There the slope jumps, or, where the lower coefficient is zero, the value itself.

**Reference solution.** Finite volumes in the variable Φ, whose fluxes need no value of k at a face and stay right where k vanishes or
jumps, and an implicit multistep method (LSODA) in time. At a front the error is of first order in the mesh, in the mean.

References: Vázquez, The Porous Medium Equation, Oxford 2007; Maddix, Sampaio and Gerritsen, Numerical artifacts in the generalized porous
medium equation, Journal of Computational Physics 362 (2018); Hansen et al., Learning physical models that can respect conservation laws,
ICML 2023, arXiv:2302.11002 (boundary-driven solutions and parameters).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..finite_difference import finite_difference
from ..rows import BoundaryRows, dirichlet, initial
from .method_of_lines import cells_for, method_of_lines, refined
from .problem import Problem

__all__ = ["Diffusion", "GeneralizedPorousMedium", "PorousMedium"]


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

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """u, u_t, u_x and u_xx of each basis function."""
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3, accuracy=self.accuracy),
            "u_x": finite_difference(basis, dx, dim=-2, accuracy=self.accuracy),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2, accuracy=self.accuracy),
        }

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """u_t − k(u) u_xx − k'(u) u_x²."""
        u = products["u"]
        return products["u_t"] - self.coefficient(u) * products["u_xx"] - self.coefficient_slope(u) * products["u_x"].square()

    def rows(self, *, weight: float = 1.0) -> list[BoundaryRows]:
        """The initial condition, which is the argument of the constraint, and the values at both ends; at t = 0 the ends win.

        Args:
            weight: of all these rows; the equation itself has 1.
        """
        ends = torch.tensor([self.ends(t) for t in self.t.tolist()], dtype=torch.float64)
        return [
            initial(_WithEnds(*ends[0].tolist()), weight=weight),
            dirichlet(ends[:, 0], dim=1, weight=weight),
            dirichlet(ends[:, 1], dim=1, side="upper", weight=weight),
        ]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``(batch, points)``: zero, where it is the value at the left end that drives; what varies is then a parameter of the problem.

        Arguments as in :meth:`Problem.initial`.
        """
        return torch.zeros(batch, self.points, dtype=dtype, device=device)

    def solve(self, initial: Tensor | None = None, *, refine: int | None = None, rtol: float = 1e-8, atol: float = 1e-10) -> Tensor:
        """The reference solution, on a finer mesh than this one. Not differentiable.

        Args:
            initial: ``(*batch, points)``, between the points a monotone cubic; None is zero.
            refine: each cell of the mesh is divided into so many. None: as many as make at least 400 cells.
            rtol: relative tolerance of a step in time.
            atol: absolute tolerance of a step in time.

        Returns:
            ``(*batch, times, points)``, with dtype and device of ``initial``, or in float64.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` has values that are not finite, or negative ones where the equation knows none.
            NotConvergedError: the integrator gave up.
        """
        initial = torch.zeros(self.points, dtype=torch.float64) if initial is None else initial
        self._check_initial(initial)
        refine = cells_for(400, self.points - 1) if refine is None else refine
        rate, start = self._rate(self.spacing[1] / refine), refined(initial, refine)
        inside = method_of_lines(rate, start[..., 1:-1], self.t, rtol=rtol, atol=atol, method="LSODA", lband=1, uband=1)
        ends = torch.tensor([self.ends(t) for t in self.t.tolist()], dtype=torch.float64).expand(*initial.shape[:-1], -1, -1)
        u = torch.cat([ends[..., :1], inside, ends[..., 1:]], -1)[..., ::refine].to(initial)
        u[..., 0, :] = initial  # which the value at an end may contradict
        return u

    def _rate(self, dx: float) -> Callable[[float, Any], Any]:
        """The finite volumes around the points between the ends."""
        import numpy as np

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
        accuracy: as in :class:`Problem`.
        diffusivity: k.
        modes: how many sines an initial condition has.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import Diffusion
        >>> problem = Diffusion(points=33, times=5, diffusivity=0.1)
        >>> initial = problem.initial(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> (problem.solve(initial, refine=1) - problem.exact(initial)).abs().amax() < 1e-2
        tensor(True)
    """

    diffusivity: float = 0.1
    modes: int = 4

    def coefficient(self, u: Any) -> Any:  # noqa: D102
        return self.diffusivity + 0 * u

    def coefficient_slope(self, u: Any) -> Any:  # noqa: D102
        return 0 * u

    def potential(self, u: Any) -> Any:  # noqa: D102
        return self.diffusivity * u

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``(batch, points)``: sums of sines, the j-th with a normal amplitude of standard deviation 1/j.

        Arguments as in :meth:`Problem.initial`.
        """
        return _sine_series(self, batch, self.modes, generator).to(device, dtype or torch.get_default_dtype())

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
        accuracy: as in :class:`Problem`.
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

    nonnegative: ClassVar[bool] = True

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

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``(batch, points)``: zero if ``driven``; else squares of sums of four sines.

        Arguments as in :meth:`Problem.initial`.
        """
        if self.driven:
            return super().initial(batch, generator=generator, dtype=dtype, device=device)
        return _sine_series(self, batch, 4, generator).square().to(device, dtype or torch.get_default_dtype())

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


@dataclass(frozen=True)
class _WithEnds:
    left: float
    right: float

    def __call__(self, initial: Tensor, *args: Any) -> Tensor:
        left, right = (torch.full_like(initial[..., :1], value) for value in (self.left, self.right))
        return torch.cat([left, initial[..., 1:-1], right], -1)


def _sine_series(problem: Problem, batch: int, modes: int, generator: torch.Generator | None) -> Tensor:
    """``(batch, points)``, zero at both ends."""
    j = torch.arange(1, modes + 1, dtype=torch.float64)
    amplitudes = torch.randn(batch, modes, generator=generator, dtype=torch.float64) / j
    return amplitudes @ torch.sin(math.pi / problem.length * j[:, None] * problem.x)
