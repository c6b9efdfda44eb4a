r"""Incompressible flow in two dimensions, in vorticity form, on a periodic square of side L.

.. math:: \frac{\partial ω}{\partial t} + v \cdot \nabla ω = ν\, Δω + f, \qquad v = (ψ_y, -ψ_x), \quad -Δψ = ω, \qquad
          f = a \Bigl(\sin \tfrac{2π}{L}(x + y) + \cos \tfrac{2π}{L}(x + y)\Bigr).

The velocity v of mean zero is a nonlocal, but linear, function of the vorticity ω. So the residual of :math:`ω = ω_0 + \sum_j w_j b_j` at a
point is a function of features that are linear in the weights, which is what a hard constraint asks for:

.. math:: r = ω_t + v_x ω_x + v_y ω_y - ν\, Δω - f.

The initial vorticity :math:`ω_0` adds a constant to each of them (:meth:`NavierStokes.arguments`). A basis that vanishes at t = 0 and has
zero mean over space (:meth:`NavierStokes.corrections`) then keeps the initial condition and the conservation of :math:`\int ω` exactly,
and no row is needed for either. Derivatives in space are spectral, those in time finite differences.

**Reference solution.** Fourier modes in space, the product v·∇ω without aliasing (Orszag's rule of two thirds), ETDRK4 in time: exact in
viscosity and forcing, fourth order in the product. Steps and mesh are made finer until the solution stops changing.

References: Li et al., Fourier neural operator for parametric partial differential equations, ICLR 2021, arXiv:2010.08895 (forcing and
initial vorticity); Chalapathi, Du and Krishnapriyan, Scaling physics-informed hard constraints with mixture-of-experts, ICLR 2024,
arXiv:2402.13412; Kassam and Trefethen, Fourth-order time-stepping for stiff PDEs, SIAM Journal on Scientific Computing 26 (2005);
Orszag, On the elimination of aliasing in finite-difference schemes, Journal of the Atmospheric Sciences 28 (1971).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NotConvergedError, ShapeError
from ..finite_difference import finite_difference
from .exponential import etdrk4
from .problem import Problem

__all__ = ["NavierStokes"]

_IN_SPACE = ("velocity_x", "velocity_y", "vorticity_x", "vorticity_y", "laplacian")
_TRIES = 10  # solutions that the reference solver computes before it gives up, each with twice the steps or a finer mesh


@dataclass(frozen=True, kw_only=True)
class NavierStokes(Problem):
    """The vorticity equation on [0, duration] × [0, length)²: fields are ``(*batch, times, points, points)``.

    Args:
        points: as in :class:`Problem`.
        times: as in :class:`Problem`.
        length: L.
        duration: as in :class:`Problem`.
        viscosity: ν.
        forcing: a, the amplitude of f.
        accuracy: order of accuracy of the differences in time.

    Example:
        >>> import torch
        >>> from difflayers.pde.problems import NavierStokes
        >>> problem = NavierStokes(points=16, times=21, viscosity=1e-2)
        >>> initial = problem.initial(2, generator=torch.Generator().manual_seed(0))
        >>> vorticity = problem.solve(initial)
        >>> vorticity.shape
        torch.Size([2, 21, 16, 16])
        >>> problem.mesh_residual(vorticity)[:, 5:].abs().amax() < 1e-4
        tensor(True)
    """

    points: int = 64
    times: int = 21
    length: float = 1.0
    duration: float = 1.0
    viscosity: float = 1e-3
    forcing: float = 0.1
    accuracy: int = 4

    periodic: ClassVar[bool] = True
    space_ndim: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.viscosity > 0:
            raise ValueError(f"viscosity = {self.viscosity}: it has to be positive")

    def features(self, basis: Tensor, *args: Any) -> dict[str, Tensor]:
        """What the residual is made of, for each basis function.

        Args:
            basis: ``(*batch, times, points, points, N)``.
            *args: not used; a constraint passes its arguments here.

        Returns:
            ``"vorticity_t"``, ``"velocity_x"``, ``"velocity_y"``, ``"vorticity_x"``, ``"vorticity_y"`` and ``"laplacian"``, each
            ``(*batch, times, points, points, N)``.
        """
        in_time = finite_difference(basis, self.spacing[0], dim=-4, accuracy=self.accuracy)
        in_space = self._in_space(basis.movedim(-1, -3))
        return {"vorticity_t": in_time, **{name: part.movedim(-3, -1) for name, part in in_space.items()}}

    def arguments(self, initial: Tensor) -> tuple[Tensor, ...]:
        """The share of the initial vorticity and of f in the residual: what a constraint on ω − ω₀ gets besides its basis.

        Args:
            initial: ω₀, ``(*batch, points, points)``.

        Returns:
            The last five features of ω₀, and f, each ``(*batch, 1, points, points)``.
        """
        parts = self._in_space(initial.unsqueeze(-3))
        return (*parts.values(), self.force.to(initial).expand_as(parts["laplacian"]))

    def residual(self, products: dict[str, Tensor], *args: Any) -> Tensor:
        """The residual of the equation for ω₀ + u, pointwise.

        Args:
            products: the features of u, of any one shape.
            *args: :meth:`arguments` of ω₀ at the same points.

        Returns:
            A tensor of that shape.

        Raises:
            ShapeError: there are no such arguments.
        """
        if len(args) != len(_IN_SPACE) + 1:
            raise ShapeError(
                f"the residual takes the {len(_IN_SPACE) + 1} tensors of arguments(initial), got {len(args)}: pass them on, as *args"
            )
        velocity_x, velocity_y, vorticity_x, vorticity_y, laplacian = (
            products[name] + part for name, part in zip(_IN_SPACE, args[:-1], strict=True)
        )
        transport = velocity_x * vorticity_x + velocity_y * vorticity_y
        return products["vorticity_t"] + transport - self.viscosity * laplacian - args[-1]

    def mesh_residual(self, u: Tensor, *args: Any) -> Tensor:
        """The residual of a field on the mesh: zero up to the error of the differences in time where it solves the equation.

        Args:
            u: the vorticity, ``(*batch, times, points, points)``; with ``args`` what it is more than ω₀.
            *args: :meth:`arguments` of ω₀.

        Returns:
            ``(*batch, times, points, points)``.
        """
        return super().mesh_residual(u, *(args or self.arguments(torch.zeros_like(u[..., 0, :, :]))))

    def corrections(self, basis: Tensor) -> Tensor:
        """The basis times t/T, without its mean over space: whatever the weights, ω₀ plus their sum begins as ω₀ and keeps its mean.

        Args:
            basis: ``(*batch, times, points, points, N)``.

        Returns:
            Of the same shape.
        """
        ramp = (self.t / self.duration).to(basis)[:, None, None, None]
        return ramp * (basis - basis.mean((-3, -2), keepdim=True))

    @property
    def force(self) -> Tensor:
        """The force f on the mesh, ``(points, points)`` in float64."""
        return self._force(self.points)

    def velocity(self, vorticity: Tensor) -> Tensor:
        """The velocity v of a vorticity ``(*batch, points, points)``: its components, ``(*batch, 2, points, points)``."""
        parts = self._in_space(vorticity)
        return torch.stack([parts["velocity_x"], parts["velocity_y"]], dim=-3)

    def initial(
        self,
        batch: int,
        *,
        deviation: float | None = None,
        smoothness: float = 2.5,
        wavenumber: float = 7.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        r"""Random initial vorticities from the Gaussian field :math:`N(0, τ^{3/2} (-Δ + τ^2)^{-α})`, without its mean.

        Args:
            batch: how many.
            deviation: standard deviation at a point, in place of what :math:`τ^{3/2}` makes of it (0.04 as the rest stands).
            smoothness: α.
            wavenumber: τ.
            generator: where the numbers come from, a generator on the CPU.
            dtype: of the result; None for torch's default.
            device: of the result.

        Returns:
            ``(batch, points, points)``.
        """
        n = self.points
        _, squares, largest = self._symbols(n)
        variances = wavenumber**1.5 * (squares + wavenumber**2) ** -smoothness / self.length**2
        variances = torch.where((largest > 0) & (2 * largest < n), variances, 0.0)
        if deviation is not None:
            both_signs = torch.where(torch.arange(n // 2 + 1) == 0, 1.0, 2.0)
            variances = variances * (deviation**2 / (variances * both_signs).sum())
        noise = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
        return torch.fft.irfft2(n * variances.sqrt() * torch.fft.rfft2(noise), s=(n, n)).to(device, dtype or torch.get_default_dtype())

    def solve(self, initial: Tensor, *, tol: float = 1e-6, refine: int | None = None, steps: int | None = None) -> Tensor:
        """The reference solution, computed in float64 and differentiable by autograd.

        Args:
            initial: ``(*batch, points, points)``, read as a trigonometric polynomial with wavenumbers below points/2.
            tol: twice as many steps, then a finer mesh, change no element by more than this in the 2-norm, relative to its largest time.
                The elements of a batch share steps and mesh.
            refine: the solver's mesh has so many times the points, at least 2. None: 3 or more, as ``tol`` asks.
            steps: from one time of the mesh to the next. None: as ``tol`` asks.

        Returns:
            ``(*batch, times, points, points)``, with dtype and device of ``initial``.

        Raises:
            ShapeError: ``initial`` does not fit the mesh.
            ValueError: ``initial`` is not finite, or an option is out of range.
            NotConvergedError: ``tol`` was not reached.
        """
        self._check_initial(initial)
        if refine is not None and refine < 2:
            raise ValueError(f"refine = {refine}: products of two modes need a mesh at least 2 times as fine")
        if steps is not None and steps < 1:
            raise ValueError(f"steps = {steps}: from one time to the next there is at least one")
        start = initial.double()
        finer, each = refine or 2, steps or self._steps(start)
        time_is_open, space_is_open = steps is None, refine is None  # one after the other
        found = self._integrate(start, finer, each)
        tries = 1
        while time_is_open or space_is_open:
            if tries == _TRIES:
                raise NotConvergedError(
                    f"the reference solution does not reach tol = {tol:.0e} with refine = {finer} and steps = {each}: loosen tol, raise "
                    "the viscosity or shorten the duration, or give refine and steps and get what they make of it",
                    solution=found,
                )
            each, finer = (2 * each, finer) if time_is_open else (each, finer + 1)
            before, found, tries = found, self._integrate(start, finer, each), tries + 1
            if _change(before, found) <= tol:
                time_is_open, space_is_open = False, time_is_open and space_is_open
        return found.to(initial)

    def _steps(self, initial: Tensor) -> int:
        """To begin with, steps of one mesh width."""
        speed = self.velocity(initial.detach()).abs().max().item() + abs(self.forcing) * self.duration * self.length / (2 * math.pi)
        return max(1, math.ceil(speed * self.spacing[0] / self.spacing[1]))

    def _integrate(self, initial: Tensor, refine: int, steps: int) -> Tensor:
        """The solution by ``steps`` steps of ETDRK4 from one time of the mesh to the next."""
        n = refine * self.points
        symbols, squares, largest = (part.to(initial.device) for part in self._symbols(n))
        kept = 3 * largest < n
        force = torch.fft.rfft2(self._force(n).to(initial.device))

        def nonlinear(spectrum: Tensor) -> Tensor:
            velocity_x, velocity_y, vorticity_x, vorticity_y = torch.fft.irfft2(spectrum.unsqueeze(-3) * symbols[:4], s=(n, n)).unbind(-3)
            return kept * (force - torch.fft.rfft2(velocity_x * vorticity_x + velocity_y * vorticity_y))

        spectra = etdrk4(
            -self.viscosity * squares, nonlinear, _on_finer_mesh(torch.fft.rfft2(initial), n), self.times - 1, self.spacing[0], steps
        )
        found = [initial, *(torch.fft.irfft2(spectrum, s=(n, n))[..., ::refine, ::refine] for spectrum in spectra)]
        return torch.stack(found, dim=-3)

    def _force(self, n: int) -> Tensor:
        x = torch.arange(n, dtype=torch.float64) / n
        phase = 2 * math.pi * (x.unsqueeze(-1) + x)
        return self.forcing * (phase.sin() + phase.cos())

    def _in_space(self, vorticity: Tensor) -> dict[str, Tensor]:
        """Velocity and derivatives of ``(*batch, points, points)``."""
        if vorticity.shape[-2:] != (self.points, self.points):
            raise ShapeError(f"a vorticity has {self.points} × {self.points} points in space, got {tuple(vorticity.shape[-2:])}")
        symbols, spectrum = self._symbols(self.points)[0].to(vorticity.device), torch.fft.rfft2(vorticity)
        symbols = symbols.to(spectrum.dtype)
        return {name: torch.fft.irfft2(symbol * spectrum, s=vorticity.shape[-2:]) for name, symbol in zip(_IN_SPACE, symbols, strict=True)}

    def _symbols(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """On a mesh of n × n points, in the layout of ``rfft2``: what makes the five features of a vorticity, |2πk/L|², the larger |k|."""
        x, y = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).unsqueeze(-1), torch.fft.rfftfreq(n, 1 / n, dtype=torch.float64)
        squares, largest = (2 * math.pi / self.length) ** 2 * (x.square() + y.square()), torch.maximum(x.abs(), y)
        # The highest mode of an even mesh is a cosine whose slope is zero at every point.
        along_x, along_y = (2j * math.pi / self.length * torch.where(2 * k.abs() == n, 0.0, k).expand_as(squares) for k in (x, y))
        inverse = torch.where(squares > 0, 1 / squares, 0.0)
        return torch.stack([inverse * along_y, -inverse * along_x, along_x, along_y, -squares.to(along_x.dtype)]), squares, largest


def _on_finer_mesh(spectrum: Tensor, mesh: int) -> Tensor:
    """``rfft2`` of the same trigonometric polynomial on more points; the highest mode of an even mesh is left out."""
    n = spectrum.shape[-2]
    half = (n + 1) // 2
    upper, lower = spectrum[..., :half, :half], spectrum[..., n - half + 1 :, :half]
    rows = torch.cat([functional.pad(upper, (0, 0, 0, mesh - 2 * half + 1)), lower], dim=-2)
    return (mesh / n) ** 2 * functional.pad(rows, (0, mesh // 2 + 1 - half))


def _change(before: Tensor, after: Tensor) -> float:
    """The largest of the batch, each relative to its own largest time."""
    size, change = (torch.linalg.vector_norm(field.detach(), dim=(-2, -1)).amax(-1) for field in (after, after - before))
    return torch.where(size > 0, change / size, change).max().item()
