r"""Diffusion of a substance in a porous medium that takes part of it up.

.. math:: \frac{\partial u}{\partial t} = \frac{D}{R(u)} \frac{\partial^2 u}{\partial x^2}, \qquad
          R(u) = 1 + \frac{1 - φ}{φ}\, ρ_s\, k\, n_f\, u^{n_f - 1}, \qquad u(t, 0) = 1, \quad u(t, L) = -D\, \frac{\partial u}{\partial x}(t, L).

u is the dissolved concentration, φ the porosity, :math:`ρ_s` the density of the solid, and :math:`k u^{n_f}` Freundlich's sorption isotherm.
The retardation factor R is the derivative of the total content :math:`m(u) = u + \frac{1 - φ}{φ} ρ_s k\, u^{n_f}`, so the equation is the
conservation law :math:`\partial_t m(u) = D\, \partial_x^2 u`. Constants, mesh and initial conditions (a uniform random constant in [0, 0.2])
are those of PDEBench, whose condition on the right is meant as here, whatever sign is printed: flowing out at rate u damps, the other sign
has solutions that grow at the rate 1/(D R).

**Near u = 0.** For :math:`n_f < 1` the factor R is infinite at zero, and so is the derivative of the residual. Here u² + δ² stands in the
place of u², :math:`R_δ(u) = 1 + \dots (u^2 + δ^2)^{(n_f - 1)/2}` with δ = 1e-6: smooth for every u of either sign, so an iteration may
pass through negative values, and for u ≫ δ off by :math:`\tfrac{1 - n_f}{2} (δ/u)^2` relative to itself. (The published code has
:math:`(u + 10^{-6})^{n_f - 1}`, with the same largest R, no value below -1e-6, and an error of first order in δ/u.) A larger δ makes an easier
problem; the reference solver solves the same one.

**Reference solution.** Vertex-centred finite volumes of second order, whose total content changes exactly by the fluxes through the ends,
and an implicit multistep method (LSODA) in time. The initial condition jumps at x = 0: near that corner all meshes are too coarse, so the
solver works on a finer one than the constraint.

References: Takamoto et al., PDEBench: an extensive benchmark for scientific machine learning, NeurIPS 2022, arXiv:2210.07182;
Nowak and Guthke, Entropy-based experimental design for optimal model discrimination in the geosciences, Entropy 18 (2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ShapeError
from ..finite_difference import finite_difference
from .method_of_lines import method_of_lines
from .problem import Problem

__all__ = ["DiffusionSorption"]


@dataclass(frozen=True, kw_only=True)
class DiffusionSorption(Problem):
    """Diffusion–sorption on [0, length] × [0, duration], on a mesh with both ends of both intervals.

    Args:
        points: as in :class:`Problem`; PDEBench has 1024 (the centres of cells, where this mesh has its ends on the boundary).
        times: as in :class:`Problem`; PDEBench has 101.
        length: L.
        duration: the last time.
        diffusivity: D.
        porosity: φ.
        density: ρ_s.
        freundlich: k.
        exponent: n_f. 1 makes the equation linear.
        regularization: δ, below which R stops growing.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import DiffusionSorption
        >>> problem = DiffusionSorption(points=33, times=11)
        >>> u = problem.solve(problem.initial(2, generator=torch.Generator().manual_seed(0)))
        >>> u.shape
        torch.Size([2, 11, 33])
        >>> problem.mesh_residual(u)[:, 5:-1, 1:-1].abs().amax() < 1e-4
        tensor(True)
    """

    points: int = 1024
    times: int = 101
    length: float = 1.0
    duration: float = 500.0
    diffusivity: float = 5e-4
    porosity: float = 0.29
    density: float = 2880.0
    freundlich: float = 3.5e-4
    exponent: float = 0.874
    regularization: float = 1e-6

    @property
    def sorption(self) -> float:
        """(1 − φ)/φ · ρ_s · k: what the solid takes up at u = 1, for each unit that is dissolved."""
        return (1 - self.porosity) / self.porosity * self.density * self.freundlich

    def retardation(self, u: Any) -> Any:
        """R(u), of a tensor or an array."""
        return 1 + self.sorption * self.exponent * (u * u + self.regularization**2) ** ((self.exponent - 1) / 2)

    def features(self, basis: Tensor, *args: Tensor) -> dict[str, Tensor]:  # noqa: D102
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3, order=1),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2),
        }

    def residual(self, products: dict[str, Tensor], *args: Tensor) -> Tensor:  # noqa: D102
        return products["u_t"] - self.diffusivity / self.retardation(products["u"]) * products["u_xx"]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random initial conditions: one constant in [0, 0.2] for each element.

        Args:
            batch: how many.
            generator: where the numbers come from; on the CPU.
            dtype: of the result.
            device: of the result.

        Returns:
            ``(batch, points)``.
        """
        level = 0.2 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
        return level.expand(batch, self.points).to(device, dtype).contiguous()

    def solve(self, initial: Tensor, *, refine: int | None = None, rtol: float = 1e-8, atol: float = 1e-10) -> Tensor:
        """The reference solution. Not differentiable: it is what a prediction is compared with.

        Args:
            initial: ``(*batch, points)``, nonnegative; linear between the points.
            refine: the solver divides each cell of the mesh into so many. None: as many as make at least 1000 cells.
            rtol: relative tolerance of a step in time.
            atol: absolute tolerance of a step in time.

        Returns:
            ``(*batch, times, points)``, with dtype and device of ``initial``.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            NotConvergedError: the integration failed.
        """
        if initial.shape[-1:] != (self.points,):
            raise ShapeError(f"initial has shape {tuple(initial.shape)}; wanted (*batch, points) with points = {self.points}")
        refine = math.ceil(1000 / (self.points - 1)) if refine is None else refine
        fine = np.linspace(0, self.length, (self.points - 1) * refine + 1)
        coarse = initial.detach().to("cpu", torch.float64).reshape(-1, self.points).numpy()
        start = np.stack([np.interp(fine, self.x.numpy(), row) for row in coarse])
        start[:, 0] = 1
        u = method_of_lines(self._rate(fine[1]), start, self.t.numpy(), rtol=rtol, atol=atol, method="LSODA", lband=1, uband=1)
        u = u[..., ::refine].reshape(*initial.shape[:-1], self.times, self.points)
        return u.to(initial)

    def _rate(self, dx: float) -> Any:
        """The finite volumes: a cell around each vertex, half of one at the right end, where u flows out."""
        D = self.diffusivity

        def rate(t: float, u: Any) -> Any:
            flux = np.append(-D / dx * np.diff(u), u[-1])
            net = np.zeros_like(u)
            net[1:] = (flux[:-1] - flux[1:]) / dx
            net[-1] *= 2
            return net / self.retardation(u)

        return rate
