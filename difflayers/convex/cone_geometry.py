r"""The cones of a conic program: projection onto their product, and the eigenvectors of its derivative.

.. math:: K = \{0\}^p × ℝ_+^m × \prod Q_{d} × \prod S_+^{k} × \prod K_{\exp} × \prod K_{α},

in this order. A second-order cone is (t, u) with ‖u‖ ≤ t; a semidefinite one is the upper triangle of a symmetric k × k matrix, column by
column, the entries off the diagonal times √2; the exponential cone is (x, y, z) with y e^{x/y} ≤ z; the power cone is (x, y, z) with
x^α y^{1−α} ≥ |z|, x, y ≥ 0.

The derivative of a projection onto a convex cone is a symmetric matrix with eigenvalues in [0, 1]. It is block diagonal, and so is the
basis Q of its eigenvectors: :func:`spectrum` returns both. A second-order cone has them in closed form, a semidefinite one by Loewner
quotients λ_i / (λ_i − λ_j) of the eigenvalues, the three-dimensional ones by the eigenvectors of a 3 × 3 matrix.

References: Moreau, Décomposition orthogonale d'un espace hilbertien selon deux cônes mutuellement polaires, C. R. Acad. Sci. 1962;
Malick and Sendov, Clarke generalized Jacobian of the projection onto the cone of positive semidefinite matrices, Set-Valued Analysis 2006;
Busseti, Moursi and Boyd, Solution refinement at regular points of conic problems, 2019, arXiv:1811.02157.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .projections import projection_exponential_cone, projection_power_cone, projection_psd_cone, projection_second_order_cone

__all__ = ["Block", "Cones", "Spectrum", "project", "project_near", "spectrum"]


class Cones(NamedTuple):
    """The product of cones that the slack of a conic program lies in, in the order of its rows.

    Attributes:
        zero: how many rows are equations.
        nonneg: how many rows are inequalities.
        soc: the dimension of each second-order cone, its first row being t.
        psd: the order k of each semidefinite cone, of k (k + 1) / 2 rows.
        exp: how many exponential cones, of three rows each.
        pow: the exponent α of each power cone, of three rows each.
    """

    zero: int = 0
    nonneg: int = 0
    soc: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exp: int = 0
    pow: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.zero + self.nonneg + sum(self.soc) + sum(k * (k + 1) // 2 for k in self.psd) + 3 * self.exp + 3 * len(self.pow)

    @property
    def polyhedral(self) -> bool:
        """Whether there are linear rows only."""
        return not (self.soc or self.psd or self.exp or self.pow)


class Block(NamedTuple):
    """Neighbouring cones of one kind and size: ``count`` cones of ``dim`` rows each, from row ``start`` on."""

    kind: str
    start: int
    count: int
    dim: int
    parameter: float

    def of(self, rows: Tensor) -> Tensor:
        """The rows of the block, ``(..., count, dim)``."""
        return rows.narrow(-1, self.start, self.count * self.dim).unflatten(-1, (self.count, self.dim))


class Spectrum(NamedTuple):
    """The derivative of the projection as Q diag(λ) Qᵀ.

    Attributes:
        eigenvalues: ``(batch, m)`` in [0, 1].
        bases: for each block that is not diagonal, Q of its cones, ``(batch, count, dim, dim)``.
    """

    eigenvalues: Tensor
    bases: list[tuple[Block, Tensor]]

    def rotate(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Qᵀ r (or Q r) of rows ``(..., batch, m)``."""
        if not self.bases:
            return rows
        rows = rows.clone()
        for block, basis in self.bases:
            part = block.of(rows).unsqueeze(-1)
            turned = ((basis if back else basis.mT) @ part).squeeze(-1)
            rows.narrow(-1, block.start, block.count * block.dim).copy_(turned.flatten(-2))
        return rows


def blocks(cones: Cones) -> Iterator[Block]:
    """The cones, neighbours of one kind and size together, in the order of the rows."""
    sizes = [("zero", 1, 0.0)] * cones.zero + [("nonneg", 1, 0.0)] * cones.nonneg
    sizes += [("soc", dim, 0.0) for dim in cones.soc]
    sizes += [("psd", k * (k + 1) // 2, k) for k in cones.psd]
    sizes += [("exp", 3, 0.0)] * cones.exp + [("pow", 3, alpha) for alpha in cones.pow]
    start = 0
    for (kind, dim, parameter), run in itertools.groupby(sizes):
        count = len(list(run))
        if dim:
            yield Block(kind, start, count, dim, parameter)
        start += count * dim


def project(cones: Cones, v: Tensor) -> Tensor:
    """The projection of rows ``(..., m)`` onto the cones, in differentiable operations."""
    parts = [_PROJECTIONS[block.kind](block.of(v), block.parameter).flatten(-2) for block in blocks(cones)]
    return torch.cat(parts, -1) if parts else v


def project_near(cones: Cones, v: Tensor, s: Tensor) -> Tensor:
    """The same for plain rows, of which something near the projection is known."""
    parts = [
        _exponential_near(block.of(v), block.of(s)).flatten(-2)
        if block.kind == "exp"
        else _PROJECTIONS[block.kind](block.of(v), block.parameter).flatten(-2)
        for block in blocks(cones)
    ]
    return torch.cat(parts, -1) if parts else v


def spectrum(cones: Cones, v: Tensor, s: Tensor) -> Spectrum:
    """Eigenvalues and eigenvectors of the derivative of :func:`project` at plain rows v ``(batch, m)`` with the projections s."""
    eigenvalues = torch.zeros_like(v)
    bases = []
    for block in blocks(cones):
        if block.kind == "zero":
            continue
        part = block.of(v)
        if block.kind == "nonneg":
            values = (part >= 0).to(v.dtype)
        else:
            values, basis = _SPECTRA[block.kind](part, block.of(s), block.parameter)
            bases.append((block, basis))
        eigenvalues.narrow(-1, block.start, block.count * block.dim).copy_(values.flatten(-2))
    return Spectrum(eigenvalues, bases)


def triangle(order: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the upper triangle, column by column, and the factors that make its inner product that of the matrices."""
    columns, rows = torch.tril_indices(order, order, device=device)
    return rows, columns, 1 + (math.sqrt(2.0) - 1) * (rows != columns).to(torch.float64)


def unpack_triangle(v: Tensor, order: int) -> Tensor:
    """The symmetric matrices ``(..., k, k)`` of scaled triangles ``(..., k (k + 1) / 2)``."""
    rows, columns, scale = triangle(order, v.device)
    where = torch.empty(order, order, dtype=torch.int64, device=v.device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=v.device)
    return (v / scale.to(v.dtype))[..., where.flatten()].unflatten(-1, (order, order))


def _project_psd(v: Tensor, order: float) -> Tensor:
    rows, columns, scale = triangle(int(order), v.device)
    matrix = projection_psd_cone(unpack_triangle(v, int(order)))
    return matrix[..., rows, columns] * scale


_PROJECTIONS = {
    "zero": lambda v, _: torch.zeros_like(v),
    "nonneg": lambda v, _: torch.relu(v),
    "soc": lambda v, _: projection_second_order_cone(v),
    "psd": _project_psd,
    "exp": lambda v, _: projection_exponential_cone(v),
    "pow": lambda v, alpha: projection_power_cone(v, alpha),
}


def _second_order(v: Tensor, s: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """(1, û)/√2 and (1, −û)/√2, and a basis of the complement of û from a Householder reflection."""
    t, u = v[..., 0], v[..., 1:]
    dim = v.shape[-1]
    radius = u.norm(dim=-1)
    inside, polar = t >= radius, t <= -radius
    across = torch.where(inside, 1.0, torch.where(polar, 0.0, (t + radius) / (2 * torch.where(radius > 0, radius, 1.0))))
    values = across.unsqueeze(-1).repeat_interleave(dim, -1)
    basis = torch.eye(dim, dtype=v.dtype, device=v.device).expand(*v.shape, dim).clone()
    if dim == 1:
        return (t >= 0).to(v.dtype).unsqueeze(-1), basis
    values[..., 0] = (~polar).to(v.dtype)
    values[..., 1] = inside.to(v.dtype)
    first = torch.zeros_like(u)
    first[..., 0] = 1.0
    unit = torch.where((radius > 0).unsqueeze(-1), u / torch.where(radius > 0, radius, 1.0).unsqueeze(-1), first)
    # The reflection that maps e₁ to −sign(û₁) û has no cancellation; its first column is û but for the sign.
    sign = torch.where(unit[..., :1] >= 0, 1.0, -1.0)
    mirror = unit + sign * first
    mirror = mirror / mirror.norm(dim=-1, keepdim=True)
    basis[..., 1:, 1:] -= 2 * mirror.unsqueeze(-1) * mirror.unsqueeze(-2)
    half = math.sqrt(0.5)
    basis[..., 0, :2] = half
    basis[..., 1:, 0] = half * unit
    basis[..., 1:, 1] = -half * unit
    return values, basis


def _semidefinite(v: Tensor, s: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """The matrices u_i u_jᵀ + u_j u_iᵀ of pairs of eigenvectors, and Loewner quotients of the eigenvalues."""
    k = int(order)
    rows, columns, scale = triangle(k, v.device)
    values, vectors = torch.linalg.eigh(unpack_triangle(v, k))
    positive = values.clamp(min=0)
    low, high = values[..., rows], values[..., columns]
    difference = high - low
    quotients = (positive[..., columns] - positive[..., rows]) / torch.where(difference > 0, difference, 1.0)
    mixed = (low < 0) & (high > 0)
    quotients = torch.where(mixed, quotients, (low >= 0).to(v.dtype))
    left, right = vectors[..., rows, :][..., rows], vectors[..., columns, :][..., columns]
    cross = vectors[..., rows, :][..., columns] * vectors[..., columns, :][..., rows]
    return quotients, (left * right + cross) * (scale.unsqueeze(-1) * scale / 2)


def _curved(v: Tensor, s: Tensor, weight: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A cone in three dimensions: the ray s and the normal y of its boundary, and λ = 1 / (1 + weight (direction · τ)²) along τ = s × y.

    The boundary is curved in the direction τ only: weight · direction directionᵀ is the multiplier times the second derivative of the
    function whose zeros it is.
    """
    y = s - v
    long_s, long_y = s.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    regular = (long_s > 0) & (long_y > 0)
    ray, normal = s / torch.where(regular, long_s, 1.0), y / torch.where(regular, long_y, 1.0)
    across = torch.linalg.cross(ray, normal)
    bend = 1 / (1 + weight * (direction * across).sum(-1) ** 2)
    inside = (long_y.squeeze(-1) == 0).to(v.dtype)
    values = torch.stack(
        [torch.where(regular[..., 0], value, inside) for value in (torch.ones_like(bend), torch.zeros_like(bend), bend)], -1
    )
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    basis = torch.where(regular.unsqueeze(-1), torch.stack([ray, normal, across], -1), eye)
    return values, basis


def _exponential(v: Tensor, s: Tensor, _: float) -> tuple[Tensor, Tensor]:
    y = s - v
    middle = torch.where(s[..., 1] > 0, s[..., 1], 1.0)
    direction = torch.stack([torch.ones_like(middle), -s[..., 0] / middle, torch.zeros_like(middle)], -1)
    return _or_by_autograd(v, s, s[..., 1], "exp", 0.0, *_curved(v, s, y[..., 2].abs() * s[..., 2] / middle**2, direction))


def _power(v: Tensor, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    y = s - v
    least = s[..., :2].amin(-1)
    first, second = (torch.where(least > 0, s[..., k], 1.0) for k in range(2))
    direction = torch.stack([1 / first, -1 / second, torch.zeros_like(first)], -1)
    weight = (y[..., 2] * s[..., 2]).abs() * alpha * (1 - alpha)
    return _or_by_autograd(v, s, least, "pow", alpha, *_curved(v, s, weight, direction))


def _or_by_autograd(
    v: Tensor, s: Tensor, least: Tensor, kind: str, parameter: float, values: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, but where the projection is on a flat face (a coordinate is zero), by the derivative of the projection itself."""
    flat = (least <= 1e-14 * (1 + v.norm(dim=-1))) & (s != 0).any(-1) & (s != v).any(-1)
    if bool(flat.any()):
        # Three copies of the points, each pulled back along its own axis: the rows of the derivative.
        with torch.enable_grad():
            points = v[flat].expand(3, -1, 3).clone().requires_grad_()
            projected = _PROJECTIONS[kind](points, parameter)
            axes = torch.eye(3, dtype=v.dtype, device=v.device).unsqueeze(1).expand_as(projected)
            (rows,) = torch.autograd.grad(projected, points, axes)
        derivative = rows.movedim(0, -2)
        found, vectors = torch.linalg.eigh((derivative + derivative.mT) / 2)
        values[flat], basis[flat] = found.clamp(0.0, 1.0), vectors
    return values, basis


def _exponential_near(v: Tensor, s: Tensor) -> Tensor:
    """The projection of plain points onto the exponential cone, by Newton's method from a guess; the public one where that fails.

    A point of the boundary is a (ρ, 1, e^ρ), and the rest of v is −b (1, 1 − ρ, −e^{−ρ}) with a, b ≥ 0 linear in v for a given ρ
    (Friberg 2023): e^ρ a − e^{−ρ} b = v₃ remains.
    """
    r, t, z = v.unbind(-1)
    rho = s[..., 0] / s[..., 1]
    for _ in range(6):
        up, weight, slope = torch.exp(rho), rho * rho - rho + 1, 2 * rho - 1
        a, b = ((rho - 1) * r + t) / weight, (r - rho * t) / weight
        a_slope, b_slope = (r - a * slope) / weight, (-t - b * slope) / weight
        value = up * a - b / up - z
        rho = rho - value / (up * (a + a_slope) + (b - b_slope) / up)
    up, weight = torch.exp(rho), rho * rho - rho + 1
    a, b = ((rho - 1) * r + t) / weight, (r - rho * t) / weight
    miss = (up * a - b / up - z).abs() / (1 + v.norm(dim=-1))
    point = torch.stack([rho * a, a, up * a], -1)
    good = (miss < 1e-13) & (a > 0) & (b > 0) & torch.isfinite(point).all(-1) & (rho.abs() < 20)
    return torch.where(good.unsqueeze(-1), point, torch.nan if bool(good.all()) else _only(~good, v))


def _only(chosen: Tensor, v: Tensor) -> Tensor:
    """The projections of the chosen points, NaN elsewhere."""
    found = torch.full_like(v, torch.nan)
    found[chosen] = projection_exponential_cone(v[chosen])
    return found


_SPECTRA = {"soc": _second_order, "psd": _semidefinite, "exp": _exponential, "pow": _power}
