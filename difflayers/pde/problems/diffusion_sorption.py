r"""Diffusion of a substance in a porous medium that takes part of it up.

.. math:: \partial_t u = \frac{D}{R(u)}\, \partial_x^2 u, \qquad R(u) = 1 + \frac{1 - φ}{φ}\, ρ_s\, k\, n_f\, u^{n_f - 1}, \qquad
          u(t, 0) = 1, \quad u(t, L) = -D\, \partial_x u(t, L).

u is the dissolved concentration, φ the porosity, :math:`ρ_s` the density of the solid, :math:`k u^{n_f}` Freundlich's isotherm of
sorption. The retardation factor R is the derivative of the total content :math:`m(u) = u + \frac{1 - φ}{φ} ρ_s k\, u^{n_f}`, so this is the
conservation law :math:`\partial_t m(u) = D\, \partial_x^2 u`.

Constants, duration and initial conditions (a random constant in [0, 0.2]) are PDEBench's. Its paper prints the condition at the right end
with the other sign, :math:`u = D\, \partial_x u`, under which disturbances grow at the rate 1/(D R); its data obey the one above, by
which the substance flows out at the rate u. On the data both say that u is almost zero there.

**Near u = 0.** For :math:`n_f < 1` the factor R is infinite at zero, and there the residual has no finite derivative. So
:math:`(u^2 + δ^2)^{(n_f - 1)/2}` stands in place of :math:`u^{n_f - 1}`: smooth for every u of either sign, so that an iteration may pass
through negative values, and off by no more than :math:`\tfrac{1 - n_f}{2} (δ/u)^2` of itself. The published code has
:math:`(u + δ)^{n_f - 1}` with the same δ = 1e-6, hence the same largest R, but no value below −δ and an error of first order in δ/u.
A larger δ makes a milder problem, and the reference solver solves the same one.

**Reference solution.** Vertex-centred finite volumes of second order, whose total content changes exactly by what flows through the ends,
and SciPy's implicit multistep method (LSODA) in time. The initial condition jumps at x = 0, and next to that corner every mesh is too
coarse: the solver works on a finer one.

References: Takamoto et al., PDEBench: an extensive benchmark for scientific machine learning, NeurIPS 2022, arXiv:2210.07182;
Nowak and Guthke, Entropy-based experimental design for optimal model discrimination in the geosciences, Entropy 18 (2016).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..finite_difference import finite_difference
from ..rows import BoundaryRows, dirichlet, initial, robin
from .method_of_lines import cells_for, method_of_lines, refined
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
        >>> u = problem.solve(problem.initial(2, dtype=torch.float64))
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

    nonnegative: ClassVar[bool] = True

    @property
    def sorption(self) -> float:
        """(1 − φ)/φ · ρ_s · k: what the solid takes up at u = 1, for each unit that is dissolved."""
        return (1 - self.porosity) / self.porosity * self.density * self.freundlich

    def retardation(self, u: Any) -> Any:
        """R(u), of a tensor or an array."""
        return 1 + self.sorption * self.exponent * (u * u + self.regularization**2) ** ((self.exponent - 1) / 2)

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """u, u_t and u_xx of each basis function."""
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3, order=1, accuracy=self.accuracy),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2, accuracy=self.accuracy),
        }

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """u_t − D/R(u) u_xx."""
        return products["u_t"] - self.diffusivity / self.retardation(products["u"]) * products["u_xx"]

    def rows(self, *, weight: float = 1.0) -> list[BoundaryRows]:
        """The initial condition, relative to its size, and those at both ends. The initial values are the argument of the constraint.

        At the corner t = 0, x = 0 the left end wins: there 1 stands in place of the initial value.

        Args:
            weight: of all these rows; the equation itself has 1.
        """
        return [
            initial(_with_left_end, relative=True, weight=weight),
            dirichlet(1.0, dim=1, weight=weight),
            robin(0.0, self.spacing[1], dim=1, side="upper", b=self.diffusivity, weight=weight),
        ]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``(batch, points)``: one random constant in [0, 0.2] for each element. Arguments as in :meth:`Problem.initial`."""
        level = 0.2 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
        return level.to(device, dtype or torch.get_default_dtype()).repeat(1, self.points)

    def solve(self, initial: Tensor, *, refine: int | None = None, rtol: float = 1e-8, atol: float = 1e-10) -> Tensor:
        """The reference solution, on a finer mesh than this one. Not differentiable.

        Args:
            initial: ``(*batch, points)``, nonnegative; between the points a monotone cubic.
            refine: each cell of the mesh is divided into so many. None: as many as make at least 1000 cells.
            rtol: relative tolerance of a step in time.
            atol: absolute tolerance of a step in time.

        Returns:
            ``(*batch, times, points)``, with dtype and device of ``initial``.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` has values that are negative or not finite.
            NotConvergedError: the integrator gave up.
        """
        self._check_initial(initial)
        refine = cells_for(1000, self.points - 1) if refine is None else refine
        start = refined(initial, refine)
        start[..., 0] = 1
        rate = self._rate(self.spacing[1] / refine)
        u = method_of_lines(rate, start, self.t, rtol=rtol, atol=atol, method="LSODA", lband=1, uband=1)
        return u[..., ::refine].to(initial)

    def _rate(self, dx: float) -> Callable[[float, Any], Any]:
        """The finite volumes: a cell around each vertex, half of one at the right end, where u flows out."""
        import numpy as np

        def rate(t: float, u: Any) -> Any:
            flux = np.append(-self.diffusivity / dx * np.diff(u), u[-1])
            net = np.append(0.0, (flux[:-1] - flux[1:]) / dx)
            net[-1] *= 2
            return net / self.retardation(u)

        return rate


def _with_left_end(initial: Tensor, *args: Any) -> Tensor:
    return torch.cat([torch.ones_like(initial[..., :1]), initial[..., 1:]], -1)
