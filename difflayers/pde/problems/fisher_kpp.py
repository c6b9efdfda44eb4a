r"""The equation of Fisher, Kolmogorov, Petrovsky and Piskunov: a population that spreads and grows until the place is full.

.. math:: \partial_t u = D\, \partial_x^2 u + r\, u (1 - u), \qquad \partial_x u = 0 \text{ at both ends}.

u = 1 is stable, u = 0 is not: wherever there is something, fronts go out, with the speed :math:`2\sqrt{r D}` or faster. One of them has a
closed form, :math:`u = (1 + e^{\sqrt{r / 6D}\, (x - c t)})^{-2}` with :math:`c = 5 \sqrt{r D / 6}`.

**Reference solution.** Vertex-centred finite volumes of second order, with half a cell at each end, and SciPy's implicit multistep
method (LSODA) in time.

References: Fisher, The wave of advance of advantageous genes, Annals of Eugenics 7 (1937); Ablowitz and Zeppetella, Explicit solutions of
Fisher's equation for a special wave speed, Bulletin of Mathematical Biology 41 (1979).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..finite_difference import finite_difference
from ..rows import BoundaryRows, initial, neumann
from .method_of_lines import cells_for, method_of_lines, refined
from .problem import Problem, initial_values

__all__ = ["FisherKPP"]


@dataclass(frozen=True, kw_only=True)
class FisherKPP(Problem):
    """The Fisher–KPP equation on an interval that nothing leaves.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: L.
        duration: the last time.
        accuracy: as in :class:`Problem`.
        diffusivity: D.
        rate: r, of the growth.
        modes: how many waves an initial condition has.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import FisherKPP
        >>> problem = FisherKPP(points=65, times=21)
        >>> u = problem.solve(problem.initial(2, dtype=torch.float64))
        >>> bool((u > 0).all() and (u < 1).all() and (u[:, 1:].mean(-1) > u[:, :-1].mean(-1)).all())
        True
    """

    points: int = 129
    times: int = 65
    length: float = 1.0
    duration: float = 1.0
    diffusivity: float = 5e-3
    rate: float = 5.0
    modes: int = 4

    nonnegative: ClassVar[bool] = True

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """u, u_t and u_xx of each basis function."""
        dt, dx = self.spacing
        return {
            "u": basis,
            "u_t": finite_difference(basis, dt, dim=-3, accuracy=self.accuracy),
            "u_xx": finite_difference(basis, dx, dim=-2, order=2, accuracy=self.accuracy),
        }

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """u_t − D u_xx − r u (1 − u)."""
        u = products["u"]
        return products["u_t"] - self.diffusivity * products["u_xx"] - self.rate * u * (1 - u)

    def rows(self, *, weight: float = 1.0) -> list[BoundaryRows]:
        """The initial condition, whose values are the argument of the constraint, and that nothing flows through the ends.

        Args:
            weight: of all these rows; the equation itself has 1. As u = 0 obeys it, too, rows of little weight may be given up.
        """
        dx = self.spacing[1]
        return [
            initial(initial_values, weight=weight),
            neumann(0.0, dx, dim=1, weight=weight),
            neumann(0.0, dx, dim=1, side="upper", weight=weight),
        ]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        r"""``(batch, points)``: the logistic function of :math:`-2 + 4 \sum_{k \le \text{modes}} a_k \cos(πkx/L) / k`, all a_k normal.

        Arguments as in :meth:`Problem.initial`.
        """
        wave = torch.arange(1, self.modes + 1, dtype=torch.float64)
        a = torch.randn(batch, self.modes, generator=generator, dtype=torch.float64) / wave
        series = a @ (torch.pi / self.length * wave[:, None] * self.x).cos()
        return torch.sigmoid(4 * series - 2).to(device, dtype or torch.get_default_dtype())

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
            ValueError: ``initial`` has negative values, which the equation sends to −∞, or such as are not finite.
            NotConvergedError: the integrator gave up.
        """
        self._check_initial(initial)
        refine = cells_for(1000, self.points - 1) if refine is None else refine
        rate = self._rate(self.spacing[1] / refine)
        u = method_of_lines(rate, refined(initial, refine), self.t, rtol=rtol, atol=atol, method="LSODA", lband=1, uband=1)
        return u[..., ::refine].to(initial)

    def _rate(self, dx: float) -> Callable[[float, Any], Any]:
        """The finite volumes: a cell around each vertex, half of one at each end."""
        import numpy as np

        def rate(t: float, u: Any) -> Any:
            flux = np.diff(u, prepend=u[0], append=u[-1]) / dx
            net = np.diff(flux) / dx
            net[[0, -1]] *= 2
            return self.diffusivity * net + self.rate * u * (1 - u)

        return rate
