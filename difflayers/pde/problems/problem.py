r"""What the problems have in common: a mesh in space and time, and the residual of a field on it.

A problem is one equation with all of its constants, and the three things that learning to solve it takes: the residual that a
:class:`~difflayers.pde.HardConstraint` drives to zero, random initial conditions, and a reference solution to compare with.

The mesh has the grid dimensions (time, space): fields are ``(*batch, times, points)``, basis functions ``(*batch, times, points, N)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ShapeError

__all__ = ["Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """An equation on a space-time mesh, with its constants as fields. Frozen: another constant is another problem.

    Args:
        points: number of points in space.
        times: number of points in time, the initial one included.
        length: the interval in space is [0, length].
        duration: the interval in time is [0, duration].
    """

    points: int
    times: int
    length: float
    duration: float

    periodic = False

    def __post_init__(self) -> None:
        for name, least in (("points", 3), ("times", 3)):
            if getattr(self, name) < least:
                raise ShapeError(f"{name} = {getattr(self, name)}: a mesh of {type(self).__name__} has at least {least}")
        for name in ("length", "duration"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it has to be positive")

    @property
    def x(self) -> Tensor:
        """``(points,)`` in float64: both ends included, or, if the problem is periodic, the right one left out."""
        ends = torch.linspace(0, self.length, self.points + 1 if self.periodic else self.points, dtype=torch.float64)
        return ends[: self.points]

    @property
    def t(self) -> Tensor:
        """``(times,)`` in float64, both ends included."""
        return torch.linspace(0, self.duration, self.times, dtype=torch.float64)

    @property
    def spacing(self) -> tuple[float, float]:
        """The steps (Δt, Δx) of the mesh."""
        return self.duration / (self.times - 1), self.length / (self.points if self.periodic else self.points - 1)

    @abstractmethod
    def features(self, basis: Tensor, *args: Tensor) -> dict[str, Tensor]:
        """The derivatives that the residual is made of, for each basis function: linear in the basis.

        Args:
            basis: ``(*batch, times, points, N)``.
            *args: not used; a constraint passes its arguments here.

        Returns:
            Tensors ``(*batch, times, points, N)`` by name: ``"u"``, ``"u_t"``, ….
        """

    @abstractmethod
    def residual(self, products: dict[str, Tensor], *args: Tensor) -> Tensor:
        """The residual of the equation, pointwise.

        Args:
            products: values and derivatives of u by name, as :meth:`features` names them, of any one shape.
            *args: not used; a constraint passes its arguments here.

        Returns:
            A tensor of that shape.
        """

    def mesh_residual(self, u: Tensor) -> Tensor:
        """The residual of a field on the mesh.

        Args:
            u: ``(*batch, times, points)``.

        Returns:
            ``(*batch, times, points)``, zero up to the error of the stencils where u solves the equation.
        """
        grid = (self.times, self.points)
        if u.shape[-2:] != grid:
            raise ShapeError(f"u has shape {tuple(u.shape)}; wanted (*batch, times, points), which ends in {grid}")
        return self.residual({name: feature.squeeze(-1) for name, feature in self.features(u.unsqueeze(-1)).items()})
