r"""What the problems have in common: a mesh in space and time, and the residual of a field on it.

A problem is one equation with all of its constants, and the three things that learning to solve it takes: the residual that a
:class:`~difflayers.pde.HardConstraint` drives to zero, random initial conditions, and a reference solution to compare with.

The mesh has the grid dimensions (time, space): fields are ``(*batch, times, points)``, basis functions ``(*batch, times, points, N)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ShapeError

__all__ = ["Problem", "initial_values"]


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """An equation on a space-time mesh, with its constants as fields. Frozen: another constant is another problem.

    Args:
        points: number of points in each dimension of space.
        times: number of points in time, the initial one included.
        length: space is [0, length] in each dimension.
        duration: time is [0, duration].
        accuracy: order of accuracy of the stencils in :meth:`features`.
    """

    points: int
    times: int
    length: float
    duration: float
    accuracy: int = 2

    periodic: ClassVar[bool] = False
    space_ndim: ClassVar[int] = 1
    nonnegative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("length", "duration"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it has to be positive")
        for name in ("points", "times"):
            if not getattr(self, name) >= 2:
                raise ValueError(f"{name} = {getattr(self, name)}: a mesh needs at least 2, and as many as its stencils are wide")

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the mesh: times, then points for each dimension of space."""
        return (self.times, *(self.points,) * self.space_ndim)

    @property
    def space(self) -> tuple[int, ...]:
        """The shape of an initial condition: points for each dimension of space."""
        return (self.points,) * self.space_ndim

    @property
    def x(self) -> Tensor:
        """``(points,)`` in float64: both ends included, or, if the problem is periodic, the right one left out."""
        dx = self.spacing[-1]
        return dx * torch.arange(self.points, dtype=torch.float64)

    @property
    def t(self) -> Tensor:
        """``(times,)`` in float64, both ends included."""
        return torch.linspace(0, self.duration, self.times, dtype=torch.float64)

    @property
    def spacing(self) -> tuple[float, float]:
        """The steps (Δt, Δx) of the mesh."""
        return self.duration / (self.times - 1), self.length / (self.points if self.periodic else self.points - 1)

    @abstractmethod
    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """The derivatives that the residual is made of, for each basis function: linear in the basis.

        Args:
            basis: ``(*batch, *grid, N)``.
            *args: not used; a constraint passes its arguments here.

        Returns:
            Tensors ``(*batch, *grid, N)`` by name: ``"u"``, ``"u_t"``, ….
        """

    @abstractmethod
    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """The residual of the equation, pointwise.

        Args:
            products: u and its derivatives by the names of :meth:`features`, all of one shape, which can be any.
            *args: not used; a constraint passes its arguments here.

        Returns:
            A tensor of that shape.
        """

    @abstractmethod
    def initial(
        self,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random initial conditions.

        Args:
            batch: how many.
            generator: where the numbers come from, a generator on the CPU.
            dtype: of the result; None for torch's default.
            device: of the result.

        Returns:
            ``(batch, *space)``.
        """

    @abstractmethod
    def solve(self, initial: Tensor) -> Tensor:
        """The reference solution. Not differentiable: it is what a prediction is compared with.

        Args:
            initial: ``(*batch, *space)``.

        Returns:
            ``(*batch, *grid)``, with dtype and device of ``initial``. Inside, everything is float64.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` has values that the equation does not know.
            NotConvergedError: no solution was found.
        """

    def mesh_residual(self, u: Tensor, *args: Any) -> Tensor:
        """The residual of a field on the mesh: zero up to the error of the stencils where u solves the equation.

        Args:
            u: ``(*batch, *grid)``.
            *args: passed on to :meth:`features` and :meth:`residual`.

        Returns:
            ``(*batch, *grid)``.
        """
        if u.shape[-len(self.grid) :] != self.grid:
            raise ShapeError(f"u has shape {tuple(u.shape)}; wanted (*batch, *grid), which ends in {self.grid}")
        features = self.features(u.unsqueeze(-1), *args)
        return self.residual({name: feature.squeeze(-1) for name, feature in features.items()}, *args)

    def _check_initial(self, initial: Tensor) -> None:
        space = self.space
        if initial.shape[-len(space) :] != space or not initial.is_floating_point():
            came = f"{initial.dtype} of shape {tuple(initial.shape)}"
            raise ShapeError(f"initial is {came}; wanted floating numbers, (*batch, *space), where space is {space}")
        if not torch.isfinite(initial).all() or (self.nonnegative and bool((initial < 0).any())):
            raise ValueError(
                f"initial has values that are not finite{' or negative' if self.nonnegative else ''}: look at them before solving"
            )


def initial_values(initial: Tensor, *args: Any) -> Tensor:
    """The first argument of a constraint, which the initial rows of a problem take for their values."""
    return initial
