r"""Reaction and diffusion of two substances that make patterns: the equations of FitzHugh and Nagumo on a square.

.. math:: \partial_t u = D_u\, Δ u + u - u^3 - k - v, \qquad \partial_t v = D_v\, Δ v + u - v, \qquad \partial_n u = \partial_n v = 0.

u is the activator, v the inhibitor. The constants, the square of side 2 and the duration are those of PDEBench. Its initial conditions are
white noise, which no mesh resolves; here they are smooth.

**Two fields, one grid.** The grid is (2, times, points, points): a field holds u and v, and a basis function both of them at once, since
a constraint has one set of weights. Which of the two equations holds at a point is said by :attr:`FitzHughNagumo.species`, an argument of
the constraint after the initial condition.

**Reference solution.** Cosines in space, whose derivatives at the boundary vanish by themselves, and exponential time differencing of order
4 (:mod:`difflayers.pde.problems.exponential`), with steps halved until nothing changes.

References: FitzHugh, Impulses and physiological states in theoretical models of nerve membrane, Biophysical Journal 1 (1961); Nagumo,
Arimoto and Yoshizawa, An active pulse transmission line simulating nerve axon, Proceedings of the IRE 50 (1962); Takamoto et al., PDEBench,
NeurIPS 2022, arXiv:2210.07182.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..finite_difference import finite_difference
from ..rows import BoundaryRows, initial, neumann
from .exponential import exponential_integration
from .method_of_lines import cells_for
from .problem import Problem, initial_values

__all__ = ["FitzHughNagumo"]


@dataclass(frozen=True, kw_only=True)
class FitzHughNagumo(Problem):
    """The FitzHugh–Nagumo equations on a square that nothing leaves: fields are ``(*batch, 2, times, points, points)``.

    Args:
        points: as in :class:`Problem`; PDEBench has 128 (the centres of cells, where this mesh has its ends on the boundary).
        times: as in :class:`Problem`; PDEBench has 101.
        length: of a side.
        duration: as in :class:`Problem`.
        accuracy: as in :class:`Problem`.
        diffusivity: (D_u, D_v).
        threshold: k.
        modes: how many waves an initial condition has in each direction.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import FitzHughNagumo
        >>> problem = FitzHughNagumo(points=17, times=6, duration=1.0)
        >>> problem.solve(problem.initial(1), refine=2).shape
        torch.Size([1, 2, 6, 17, 17])
    """

    points: int = 65
    times: int = 51
    length: float = 2.0
    duration: float = 5.0
    diffusivity: tuple[float, float] = (1e-3, 5e-3)
    threshold: float = 5e-3
    modes: int = 4

    space_ndim: ClassVar[int] = 2

    @property
    def grid(self) -> tuple[int, ...]:
        """(2, times, points, points)."""
        return (2, *super().grid)

    @property
    def space(self) -> tuple[int, ...]:
        """(2, points, points)."""
        return (2, *super().space)

    @property
    def species(self) -> Tensor:
        """``(2, 1, 1, 1)`` in float64: 0 for u, 1 for v."""
        return torch.arange(2, dtype=torch.float64).reshape(2, 1, 1, 1)

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """The substance itself, the other one, and the derivative in time and the Laplacian of the first."""
        dt, dx = self.spacing
        along_x, along_y = (finite_difference(basis, dx, dim=dim, order=2, accuracy=self.accuracy) for dim in (-2, -3))
        return {
            "own": basis,
            "other": basis.flip(-5),
            "own_t": finite_difference(basis, dt, dim=-4, accuracy=self.accuracy),
            "laplacian": along_x + along_y,
        }

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """u_t − D_u Δu − u + u³ + k + v where :attr:`species`, the last argument, is 0, and v_t − D_v Δv − u + v where it is 1."""
        own, other, own_t, laplacian = (products[name] for name in ("own", "other", "own_t", "laplacian"))
        activator = own_t - self.diffusivity[0] * laplacian - own + own**3 + self.threshold + other
        inhibitor = own_t - self.diffusivity[1] * laplacian - other + own
        return torch.where(args[-1].to(own.device) == 0, activator, inhibitor)

    def mesh_residual(self, u: Tensor, *args: Any) -> Tensor:
        """As :meth:`Problem.mesh_residual`, for ``(*batch, 2, times, points, points)``."""
        return super().mesh_residual(u, *(args or (self.species,)))

    def rows(self, *, weight: float = 1.0) -> list[BoundaryRows]:
        """The initial condition, whose values are the first argument of the constraint, and that nothing flows through the boundary.

        Args:
            weight: of all these rows; the equation itself has 1.
        """
        dx = self.spacing[1]
        walls = [neumann(0.0, dx, dim=dim, side=side, weight=weight) for dim in (2, 3) for side in ("lower", "upper")]
        return [initial(initial_values, dim=1, weight=weight), *walls]

    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        r"""``(batch, 2, points, points)``: sums of :math:`\cos(π k x/L) \cos(π l y/L)`, k, l < modes, all factors normal, of variance 1.

        The variance is that of the mean over space. Arguments as in :meth:`Problem.initial`.
        """
        wave = torch.arange(self.modes, dtype=torch.float64)
        cosines = (torch.pi / self.length * wave[:, None] * self.x).cos()
        cosines[1:] *= 2**0.5
        factors = torch.randn(batch, 2, self.modes, self.modes, generator=generator, dtype=torch.float64) / self.modes
        return (cosines.mT @ factors @ cosines).to(device, dtype or torch.get_default_dtype())

    def solve(self, initial: Tensor, *, refine: int | None = None, tol: float = 1e-7) -> Tensor:
        """The reference solution. Not differentiable.

        Args:
            initial: ``(*batch, 2, points, points)``; between the points its cosine series.
            refine: each side of a cell of the mesh is divided into so many. None: as many as make at least 64 of the side of the
                square, where the thin fronts of the default constants leave an error of about 3e-4.
            tol: half the step in time changes no coefficient by more than this, relative to the largest.

        Returns:
            ``(*batch, 2, times, points, points)``, with dtype and device of ``initial``.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` has values that are not finite.
            NotConvergedError: ``tol`` was not reached.
        """
        self._check_initial(initial)
        cells = self.points - 1
        refine = cells_for(64, cells) if refine is None else refine
        n = cells * refine + 1
        waves = _cosines(initial.detach().to("cpu", torch.float64)).reshape(-1, *self.space)
        waves = torch.nn.functional.pad(waves, (0, n - self.points, 0, n - self.points))
        if refine > 1:  # the highest wave counts once on a mesh that ends there, and twice on any other
            waves[..., cells, :] /= 2
            waves[..., :, cells] /= 2
        squares = (torch.pi / self.length * torch.arange(n, dtype=torch.float64)) ** 2
        decay = -torch.tensor(self.diffusivity, dtype=torch.float64).reshape(2, 1, 1) * (squares[:, None] + squares)
        u = [
            _values(exponential_integration(decay, self._reaction, row, self.t, step=0.1, tol=tol))[..., ::refine, ::refine]
            for row in waves
        ]
        fields = torch.stack(u) if u else torch.empty(0, self.times, *self.space)
        return fields.movedim(-4, -3).reshape(*initial.shape[:-3], *self.grid).to(initial)

    def _reaction(self, waves: Tensor) -> Tensor:
        u, v = _values(waves)
        return _cosines(torch.stack([u - u**3 - self.threshold - v, u - v]))


def _cosines(values: Tensor) -> Tensor:
    """The coefficients of a function on a mesh in cosines."""
    from scipy.fft import dctn

    return torch.from_numpy(dctn(values.numpy(), type=1, axes=(-2, -1), norm="forward"))


def _values(waves: Tensor) -> Tensor:
    from scipy.fft import idctn

    return torch.from_numpy(idctn(waves.numpy(), type=1, axes=(-2, -1), norm="forward"))
