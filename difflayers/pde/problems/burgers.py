r"""Burgers' equation, the simplest one with shocks.

.. math:: \partial_t u + u\, \partial_x u = ν\, \partial_x^2 u, \qquad u \text{ periodic in } x \text{ with period } L.

**Reference solution**, by Cole and Hopf. Let c be the mean of :math:`u_0`, :math:`w = u_0 - c`, and Ψ the antiderivative of w, which is
periodic. In the frame that moves with c, the substitution :math:`w = -2ν\, \partial_x \log φ` makes it the heat equation for φ, and so

.. math:: u(t, x) = c + \frac{\int w(y)\, e^{-G(y)/2ν}\, dy}{\int e^{-G(y)/2ν}\, dy}, \qquad G(y) = Ψ(y) + \frac{(x - c t - y)^2}{2 t},

a mean of the initial values with weights that a softmax computes at any ν, however small. There are no steps in time and no error that
grows. The trapezoidal rule converges faster than any power of its step as soon as the step resolves the initial condition and the
narrowest peak of the weights, of the width :math:`\sqrt{2ν / (1/t + \max w')}`. For ν = 0 the mean becomes the value at the minimum of G
(Lax, Oleinik): the entropy solution, shocks included.

References: Cole, On a quasi-linear parabolic equation occurring in aerodynamics, Quarterly of Applied Mathematics 9 (1951); Hopf, The
partial differential equation u_t + u u_x = μ u_xx, Communications on Pure and Applied Mathematics 3 (1950); Evans, Partial
Differential Equations, section 3.4 (1998).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..finite_difference import finite_difference
from ..rows import BoundaryRows, initial
from .problem import Problem, initial_values

__all__ = ["Burgers"]


@dataclass(frozen=True, kw_only=True)
class Burgers(Problem):
    """Burgers' equation on a periodic interval.

    Args:
        points: as in :class:`Problem`; the right end of the interval is the left one.
        times: as in :class:`Problem`.
        length: L.
        duration: the last time.
        accuracy: as in :class:`Problem`.
        viscosity: ν ≥ 0. A front that falls by d is about 4ν/d wide, and a mesh has to resolve it if its residual is to mean anything. With
            ν = 0 fronts are jumps.
        modes: how many waves an initial condition has.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import Burgers
        >>> problem = Burgers(points=64, times=21, viscosity=0.05)
        >>> u = problem.solve(problem.initial(2))
        >>> u.shape
        torch.Size([2, 21, 64])
        >>> torch.allclose(u.mean(-1), torch.zeros(2, 21), atol=1e-6)       # momentum is conserved
        True
    """

    points: int = 256
    times: int = 101
    length: float = 1.0
    duration: float = 1.0
    viscosity: float = 0.02
    modes: int = 4

    periodic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.viscosity >= 0:
            raise ValueError(f"viscosity = {self.viscosity}: it cannot be negative")

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """u, u_t, u_x and u_xx of each basis function."""
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3, accuracy=self.accuracy),
            "u_x": finite_difference(basis, dx, dim=-2, accuracy=self.accuracy, boundary="periodic"),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2, accuracy=self.accuracy, boundary="periodic"),
        }

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """u_t + u u_x − ν u_xx."""
        return products["u_t"] + products["u"] * products["u_x"] - self.viscosity * products["u_xx"]

    def rows(self, *, weight: float = 1.0) -> list[BoundaryRows]:
        """The initial condition, whose values are the argument of the constraint. The features are periodic as they are.

        Args:
            weight: of these rows; the equation itself has 1.
        """
        return [initial(initial_values, weight=weight)]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        r"""``(batch, points)``: :math:`\sum_{k \le \text{modes}} (a_k \cos 2πkx/L + b_k \sin 2πkx/L)/2k`, all a_k and b_k normal.

        Arguments as in :meth:`Problem.initial`.
        """
        wave = torch.arange(1, self.modes + 1, dtype=torch.float64)
        phase = 2 * torch.pi / self.length * wave[:, None] * self.x
        a, b = torch.randn(2, batch, self.modes, generator=generator, dtype=torch.float64) / (2 * wave)
        return (a @ phase.cos() + b @ phase.sin()).to(device, dtype or torch.get_default_dtype())

    @torch.no_grad()
    def solve(self, initial: Tensor, *, refine: int | None = None) -> Tensor:
        """The reference solution, by quadrature; where ν = 0, the entropy solution. Not differentiable.

        Args:
            initial: ``(*batch, points)``; between the points its Fourier series.
            refine: the quadrature divides each cell of the mesh into so many. None: as many as resolve every peak of the weights (ν > 0),
                or as make at least 4096 cells (ν = 0, where the error goes with the square of their size).

        Returns:
            ``(*batch, times, points)``, with dtype and device of ``initial``.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` has values that are not finite.
        """
        self._check_initial(initial)
        rows = initial.to("cpu", torch.float64).reshape(-1, self.points)
        solutions = torch.stack([self._solve_row(row, refine) for row in rows]) if len(rows) else rows.new_empty(0, *self.grid)
        return solutions.reshape(*initial.shape[:-1], *self.grid).to(initial)

    def _solve_row(self, u0: Tensor, refine: int | None) -> Tensor:
        mean = u0.mean()
        modes = torch.fft.rfft(u0 - mean)
        if self.points % 2 == 0:
            modes[-1] = 0  # of the highest wave the mesh sees the cosine only
        wave = 2j * torch.pi / self.length * torch.arange(len(modes), dtype=torch.float64)
        if refine is None:
            refine = self._refinement(float(torch.fft.irfft(wave * modes, self.points).amax()))
        n = self.points * refine
        w = torch.fft.irfft(modes, n) * refine
        antiderivative = torch.fft.irfft(torch.cat([modes[:1] * 0, modes[1:] / wave[1:]]), n) * refine
        y = self.length / n * torch.arange(n, dtype=torch.float64)
        # x_i − ct − y_j is one of n distances only: those of −ct from y.
        pair = (refine * torch.arange(self.points)[:, None] - torch.arange(n)) % n
        rows = [u0 if k == 0 else mean + self._mean(w, antiderivative, y - mean * t, pair, float(t)) for k, t in enumerate(self.t)]
        return torch.stack(rows)

    def _refinement(self, slope: float) -> int:
        if self.viscosity == 0:
            return math.ceil(4096 / self.points)
        narrowest = math.sqrt(2 * self.viscosity / (1 / self.spacing[0] + slope))
        return max(2, math.ceil(1.5 * self.spacing[1] / narrowest))

    def _mean(self, w: Tensor, antiderivative: Tensor, distance: Tensor, pair: Tensor, t: float) -> Tensor:
        """Σ w e^{−G/2ν} / Σ e^{−G/2ν} at each x, or its limit for ν = 0."""
        distance = torch.remainder(distance + self.length / 2, self.length) - self.length / 2
        if self.viscosity == 0:
            return self._at_minimum(antiderivative + (distance**2 / (2 * t))[pair], distance[pair], t)
        # Every period has an image of y. Those that are farther off than nine widths of the heat kernel weigh nothing.
        images = math.ceil(9 * math.sqrt(2 * self.viscosity * t) / self.length)
        shifts = self.length * torch.arange(-images, images + 1, dtype=torch.float64)[:, None]
        kernel = torch.logsumexp(-((distance + shifts) ** 2) / (4 * self.viscosity * t), 0)
        return torch.softmax(kernel[pair] - antiderivative / (2 * self.viscosity), -1) @ w

    def _at_minimum(self, G: Tensor, distance: Tensor, t: float) -> Tensor:
        """(x − y)/t at the minimum of G over y, which the parabola through the three lowest neighbours places between the points."""
        n = G.shape[-1]
        lowest = G.argmin(-1, keepdim=True)
        before, at, after = (G.gather(-1, (lowest + step) % n) for step in (-1, 0, 1))
        curvature = before - 2 * at + after
        offset = torch.where(curvature > 0, 0.5 * (before - after) / curvature, 0)
        return ((distance.gather(-1, lowest) - offset * self.length / n) / t).squeeze(-1)
