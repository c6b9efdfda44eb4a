r"""A mixture of experts that are hard constraints: the mesh is cut into domains, and each has weights of its own.

.. math:: u(p) = \sum_e φ_e(p) \sum_j w^{e*}_j b_j(p), \qquad w^{e*} = \operatorname{argmin}_w \tfrac12 \|r_e(w)\|^2,

where r_e holds the pointwise rows at the points of domain e, and all linear rows (initial and boundary values), which every expert
gets a copy of. The features are computed on the whole mesh and cut afterwards: a derivative at a border is that of the basis functions, not
a one-sided difference. N basis functions with E experts can do what E·N could in the least-squares problems of N unknowns, and those
are solved in one batch, or spread over processes (:mod:`~difflayers.pde.sharding`).

Nothing makes the experts agree where they meet. An **overlap** blends them. **Interface rows** :math:`λ\,(u_e - u_{e'})(p)` at the
points on both sides of each border, two in a row, pull value and slope together; then the experts of one sample are one
problem with E·N unknowns, whose matrix is assembled from the blocks of the experts.

Reference: Chalapathi, Du, Krishnapriyan, Scaling physics-informed hard constraints with mixture-of-experts, ICLR 2024, arXiv:2402.13412.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..errors import ShapeError
from ..solution import Status, report_failures
from .hard_constraint import Assembled, ConstraintSolution, HardConstraint, is_at_points
from .least_squares import Fit
from .partition import Borders, Cut, Domains, Partition, block_labels, find_borders, hard_cut, soft_cut
from .rows import InteriorRows
from .sharding import Slots, process_group
from .solve_rows import solve_rows
from .structured import LinearRows, PointRows

__all__ = ["MixtureOfConstraints"]


class MixtureOfConstraints(nn.Module):
    """A :class:`HardConstraint` for each domain of a mesh, all solved in one batch.

    Args:
        constraint: what every expert solves; with ``features``, or with rows only. Its ``points`` are the total, of which each expert gets
            its equal part.
        partition: how the mesh is cut. For each dimension of the grid the number of blocks, ``(1, 4)``, or their sizes,
            ``(1, (30, 30, 41))``; or a tensor of labels 0 … E − 1, ``(*grid)`` or ``(*batch, *grid)``; or a router, a module or function
            ``(basis, *args) ->`` labels, or logits ``(*batch, *grid, E)``. Logits make a soft mixture: φ is their softmax, every
            expert solves on the whole mesh with its rows weighted by √φ, and the router is trained by the gradient.
        overlap: points by which every domain is grown over its borders. The solutions are blended where domains overlap.
        interface_weight: λ of the rows between neighbours; 0 leaves them out.
        group: the ``torch.distributed`` process group (or DeviceMesh of one dimension) to spread the experts over; None is this process
            alone. Every process calls the layer with the same basis and arguments.

    Example:
        >>> import torch
        >>> from difflayers.pde import HardConstraint, MixtureOfConstraints, dirichlet, finite_difference
        >>> x = torch.linspace(0, 1, 41, dtype=torch.float64)
        >>> features = lambda basis: {"u": basis, "u_x": finite_difference(basis, x[1], dim=-2, accuracy=4)}
        >>> decay = HardConstraint(lambda z: z["u_x"] + 5 * z["u"], features=features, rows=[dirichlet(1.0, dim=0, weight=10.0)])
        >>> basis = torch.stack([x**k for k in range(4)], -1)              # cubic polynomials are too few for exp(−5x) on [0, 1]
        >>> experts = MixtureOfConstraints(decay, (4,), interface_weight=10.0)
        >>> [f"{float((layer(basis) - torch.exp(-5 * x)).abs().max()):.4f}" for layer in (decay, experts)]
        ['0.0359', '0.0018']
    """

    labels: Tensor | None

    def __init__(
        self,
        constraint: HardConstraint,
        partition: Partition = (1, 4),
        *,
        overlap: int = 0,
        interface_weight: float = 0.0,
        group: Any = None,
    ) -> None:
        super().__init__()
        if constraint.residual_fn is not None and constraint.features is None:
            raise ValueError("experts need a residual that can be cut: give the constraint features=, with a pointwise residual")
        if overlap < 0 or not interface_weight >= 0:
            raise ValueError(f"overlap and interface_weight must not be negative, got {overlap} and {interface_weight}")
        self.constraint, self.overlap, self.interface_weight = constraint, overlap, interface_weight
        self.group = process_group(group)
        self.register_buffer("labels", partition if isinstance(partition, Tensor) else None)
        self.router = partition if callable(partition) and not isinstance(partition, Tensor) else None
        self.partition = () if isinstance(partition, Tensor) or callable(partition) else tuple(partition)
        self.options = dataclasses.replace(constraint.options, what="MixtureOfConstraints")
        self._known: tuple[Any, _Geometry] | None = None

    def forward(self, basis: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
        """The stitched solution.

        Args:
            basis: ``(*batch, *grid, N)``, floating.
            args: as in :meth:`HardConstraint.forward <difflayers.pde.HardConstraint.forward>`: those with the shape of the grid are cut
                like it; the residual gets other tensors ``(*batch, ...)`` as ``(*batch, 1, ...)``, with a dimension for the experts.
            generator: of the sampled points; with a group, one with the same state in every process.

        Returns:
            u ``(*batch, *grid)`` with dtype and device of ``basis``.
        """
        return self.solve(basis, *args, generator=generator).u

    def solve(self, basis: Tensor, *args: Any, generator: torch.Generator | None = None) -> ConstraintSolution:
        """The solution with weights ``(*batch, E, N)``, and status and norms ``(*batch, E)``, or ``(*batch,)`` with interface rows.

        Args:
            basis: as in :meth:`forward`.
            args: as in :meth:`forward`.
            generator: as in :meth:`forward`.
        """
        rows = self.constraint.assemble(basis, *args)
        geometry = self._geometry(rows, args)
        slots = Slots(geometry.cut.weight.shape[-2], self.group)
        batch = torch.broadcast_shapes(rows.batch, geometry.cut.weight.shape[:-2])
        points = [
            _cut_block(block, self._domains(geometry, block, row, batch, slots, generator).of(slots.own), batch)
            for block, row in zip(rows.points, self._interior(), strict=True)
        ]
        linear = [LinearRows(line.matrix.unsqueeze(-3), line.target.unsqueeze(-2)) for line in rows.linear]
        x0 = self.constraint.start(rows.basis, batch).unsqueeze(-2).expand(*batch, slots.count, -1)
        flat = rows.basis.flatten(-1 - self.constraint.grid_ndim, -2)
        if geometry.borders is not None:
            coupling = self._interface(geometry.borders, flat, slots.count)
            fit = solve_rows(x0, points, linear, options=self.options, coupling=coupling, slots=slots)
        else:
            fit = self._solve_apart(x0, points, linear, slots)
        u = self._stitch(geometry.cut, flat, fit).reshape(*batch, *basis.shape[-1 - self.constraint.grid_ndim : -1])
        return ConstraintSolution(u.to(basis.dtype), fit.x.to(basis.dtype), fit.status, fit.residual_norm, fit.residual, fit.iterations)

    def _solve_apart(self, x0: Tensor, points: list[PointRows], linear: list[LinearRows], slots: Slots) -> Fit:
        if slots.group is None:
            return solve_rows(x0, points, linear, options=self.options)
        # A process that raised alone would leave the others waiting. All of them hear of a failure, and then all raise.
        quiet = dataclasses.replace(self.options, on_failure="nan") if self.options.on_failure == "raise" else self.options
        fit = solve_rows(x0[..., slots.own, :], points, linear, options=quiet)
        reports = [part.detach().to(fit.x) for part in fit[1:]]
        gathered = slots.gather(torch.cat([fit.x, torch.stack(reports, -1)], -1))
        x, *found = gathered.split([fit.x.shape[-1], *[1] * len(reports)], -1)
        fit = Fit(x, *(part.detach().squeeze(-1).to(old.dtype) for part, old in zip(found, fit[1:], strict=True)))
        if self.options.on_failure == "raise":
            report_failures(fit, self.options.what, "raise")
        return fit

    def _stitch(self, cut: Cut, flat: Tensor, fit: Fit) -> Tensor:
        if self.options.on_failure != "nan":
            return cut.stitch(fit.x @ flat.to(fit.x.dtype).mT)
        failed = (fit.status != Status.SOLVED).reshape(*fit.status.shape, *[1] * (fit.x.dim() - fit.status.dim()))
        # Not multiplied by NaN: the basis would get NaN for a gradient, at the points of the neighbours, too.
        u = cut.stitch(torch.where(failed, 0, fit.x) @ flat.to(fit.x.dtype).mT)
        return torch.where((failed & (cut.phi > 0)).any(-2), torch.nan, u)

    def _interface(self, borders: Borders, flat: Tensor, experts: int) -> LinearRows:
        """The rows λ (u_e − u_e') in the weights of all experts."""
        index = borders.point.unsqueeze(-1).expand(*torch.broadcast_shapes(borders.point.shape[:-1], flat.shape[:-2]), -1, flat.shape[-1])
        values = self.interface_weight * flat.expand(*index.shape[:-2], *flat.shape[-2:]).gather(-2, index)
        sides = (nn.functional.one_hot(side, experts) for side in (borders.first, borders.second))
        signs = (next(sides) - next(sides)) * borders.present.unsqueeze(-1)
        matrix = (signs.to(flat.dtype).unsqueeze(-1) * values.unsqueeze(-2)).flatten(-2)
        return LinearRows(matrix, matrix.new_zeros(matrix.shape[-2]))

    def _interior(self) -> list[InteriorRows]:
        return [row for row in self.constraint.rows if isinstance(row, InteriorRows)]

    def _geometry(self, rows: Assembled, args: tuple[Any, ...]) -> _Geometry:
        """How this basis is cut; blocks and labels that have not changed since the last call are not cut again."""
        grid = tuple(rows.basis.shape[-1 - self.constraint.grid_ndim : -1])
        if self.router is not None:
            routed = self.router(rows.basis, *args)
            shape = getattr(routed, "shape", ())
            if isinstance(routed, Tensor) and routed.is_floating_point():
                if len(shape) <= len(grid) or tuple(shape[-1 - len(grid) : -1]) != grid:
                    raise ShapeError(f"a router returns labels (*batch, *grid), or logits (*batch, *grid, E) on {grid}; got {tuple(shape)}")
                if self.overlap or self.interface_weight:
                    raise ValueError("a soft mixture has no borders: overlap and interface_weight are for labels")
                return _Geometry(soft_cut(routed.to(rows.basis.dtype), len(grid)), None, grid, {})
            return self._by_labels(routed, rows.basis, grid)
        given = self.labels
        key = (grid, rows.basis.device, rows.basis.dtype, None if given is None else (id(given), given._version))
        if self._known is None or self._known[0] != key:
            # Kept for calls to come, which may want a gradient though this one does not.
            with torch.inference_mode(False):
                labels = block_labels(grid, self.partition) if given is None else given
                self._known = key, self._by_labels(labels, rows.basis, grid)
        return self._known[1]

    def _by_labels(self, labels: Any, like: Tensor, grid: tuple[int, ...]) -> _Geometry:
        if not isinstance(labels, Tensor) or tuple(labels.shape[max(labels.dim() - len(grid), 0) :]) != grid:
            came = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ShapeError(f"labels must be a tensor (*batch, *grid) with the grid {grid}, got {came}")
        labels = labels.to(like.device)
        borders = find_borders(labels, len(grid)) if self.interface_weight else None
        cut = hard_cut(labels, len(grid), overlap=self.overlap)
        return _Geometry(cut._replace(weight=cut.weight.to(like.dtype), phi=cut.phi.to(like.dtype)), borders, grid, {})

    def _domains(
        self, geometry: _Geometry, block: PointRows, row: InteriorRows, batch: torch.Size, slots: Slots, generator: torch.Generator | None
    ) -> Domains:
        """The points of a block of rows that each expert gets."""
        key = repr(row.region)
        if key not in geometry.domains:
            numbers = torch.arange(math.prod(geometry.grid), device=geometry.cut.phi.device).reshape(geometry.grid)
            with torch.inference_mode(torch.is_inference_mode_enabled() and geometry.cut.soft):
                region = None if row.region is None else numbers[tuple(row.region)].flatten()
                geometry.domains[key] = geometry.cut.domains(region)
        domains, points = geometry.domains[key], self.constraint.points
        if points is None or points >= next(iter(block.features.values())).shape[-2]:
            return domains
        # Drawn for all experts: however many processes share them, they get the same points.
        return domains.sample(batch, max(points // slots.count, 1), generator)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}

    def extra_repr(self) -> str:
        """How the mesh is cut, and the options."""
        cut = f"labels={tuple(self.labels.shape)}" if self.labels is not None else f"partition={self.partition}"
        shown = [cut if self.router is None else "router"]
        shown += [f"{name}={value}" for name in ("overlap", "interface_weight") if (value := getattr(self, name))]
        shown += [f"processes={self.group.size()}"] if self.group is not None else []
        return ", ".join(shown)


class _Geometry(NamedTuple):
    """A cut, its borders where they matter, and the domains of each region that rows are for."""

    cut: Cut
    borders: Borders | None
    grid: tuple[int, ...]
    domains: dict[str, Domains]


def _cut_block(block: PointRows, domains: Domains, batch: torch.Size) -> PointRows:
    """A block of rows ``(*batch, P)`` as those of the experts, ``(*batch, E, p)``."""
    total = next(iter(block.features.values())).shape[-2]

    def take(values: Tensor) -> Tensor:
        return domains.take(values.unsqueeze(-1)).squeeze(-1)

    def for_experts(arg: Any) -> Any:
        if is_at_points(arg, total):
            return take(arg)
        lead = len(batch)
        if lead and isinstance(arg, Tensor) and arg.dim() >= lead and all(a in (1, b) for a, b in zip(arg.shape, batch, strict=False)):
            return arg.unsqueeze(lead)
        return arg

    weight = domains.weight
    if block.weight is not None:
        weight = weight * (take(block.weight) if block.weight.dim() else block.weight)
    features = {name: domains.take(T) for name, T in block.features.items()}
    return PointRows(block.function, features, _pytree.tree_map(for_experts, block.args), weight)
