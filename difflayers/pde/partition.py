r"""The cut of a mesh into the domains of experts.

Every point p of the mesh belongs to one of E experts (its label). Grown by o points in every direction, diagonals included, the points
of an expert are its *domain*; domains overlap by 2o points. The experts' values are blended by a partition of unity,

.. math:: u(p) = \sum_e φ_e(p)\, u_e(p), \qquad \sum_e φ_e = 1, \qquad
   φ_e(p) ∝ \frac{1}{2o + 1} \sum_{k=-o}^{o} 1[p ∈ \text{points of } e \text{ grown by } k],

where a negative k shrinks: a linear ramp across a straight border. With o = 0 the cut is sharp, φ is zero or one. A soft cut has no
labels: it is the partition of unity itself, every domain is the whole mesh, and a row of expert e at p weighs :math:`\sqrt{φ_e(p)}`.

All cuts are one thing to the solver, a :class:`Cut`: what a row of each expert weighs at each point, and φ. Rows are assembled on
:class:`Domains`, for every expert the list of its points; lists shorter than the longest are padded by points of weight zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError

__all__ = ["Borders", "Cut", "Domains", "Partition", "block_labels", "find_borders", "hard_cut", "soft_cut"]

Partition = Sequence[int | Sequence[int]] | Tensor | Callable[..., Tensor]


class Cut(NamedTuple):
    """What every expert has to do with every point.

    Attributes:
        weight: ``(*lead, E, size)``, what a row of the expert at the point weighs; ``lead`` is the batch, or empty where all samples
            are cut alike.
        phi: ``(*lead, E, size)``, φ.
        soft: whether every domain is the whole mesh.
    """

    weight: Tensor
    phi: Tensor
    soft: bool = False

    def domains(self, region: Tensor | None = None) -> Domains:
        """The points of every expert; with ``region``, ``(P,)`` int64, those of them among these points, numbered as there."""
        weight = self.weight if region is None else self.weight.index_select(-1, region)
        if self.soft:
            return Domains(None, weight)
        lead, member = weight.shape[:-1], (weight > 0).flatten(0, -2)
        counts = member.sum(-1)
        row, point = member.nonzero(as_tuple=True)
        index = torch.zeros(len(member), int(counts.max()) if len(counts) else 0, dtype=torch.int64, device=member.device)
        index[row, torch.arange(point.numel(), device=point.device) - (counts.cumsum(0) - counts)[row]] = point
        present = torch.arange(index.shape[-1], device=member.device) < counts.unsqueeze(-1)
        # Padding repeats a point: what is computed there is as finite as elsewhere.
        index = torch.where(present, index, index[:, :1])
        return Domains(index.reshape(*lead, -1), present.to(weight.dtype).reshape(*lead, -1))

    def stitch(self, values: Tensor) -> Tensor:
        """Σ φ_e u_e, ``(*batch, size)``, of the experts' values ``(*batch, E, size)``."""
        return (self.phi * values).sum(-2)


class Domains(NamedTuple):
    """For every expert its points.

    Attributes:
        index: ``(*lead, E, P)`` int64, indices into the flattened mesh, or into the points of a region. None: all, for every expert.
        weight: ``(*lead, E, P)``, what a row at the point weighs; 0 on padding.
    """

    index: Tensor | None
    weight: Tensor

    def of(self, experts: slice) -> Domains:
        """Those of these experts."""
        return Domains(None if self.index is None else self.index[..., experts, :], self.weight[..., experts, :])

    def take(self, field: Tensor) -> Tensor:
        """``field`` ``(*batch, size, N)`` at the points of every expert, ``(*batch, E, P, N)``, or as ``(*batch, 1, size, N)``."""
        if self.index is None:
            return field.unsqueeze(-3)
        if self.index.dim() == 2:
            return field.index_select(-2, self.index.flatten()).unflatten(-2, tuple(self.index.shape))
        batch = torch.broadcast_shapes(field.shape[:-2], self.index.shape[:-2])
        where = self.index.flatten(-2).unsqueeze(-1).expand(*batch, -1, field.shape[-1])
        return field.expand(*batch, *field.shape[-2:]).gather(-2, where).unflatten(-2, tuple(self.index.shape[-2:]))

    def sample(self, batch: Sequence[int], points: int, generator: torch.Generator | None = None) -> Domains:
        """Points drawn without replacement, for every sample and expert ``points`` of them (all, where it has fewer).

        A row drawn from n weighs √(n / points) times what it weighed: the sum of squares stays the same on the average.
        """
        device = self.weight.device if generator is None else generator.device
        keys = torch.rand(*batch, *self.weight.shape[-2:], generator=generator, device=device).to(self.weight.device)
        chosen = torch.where(self.weight.detach() > 0, keys, -1).topk(min(points, keys.shape[-1])).indices
        index = chosen if self.index is None else self.index.expand(keys.shape).gather(-1, chosen)
        counts = (self.weight > 0).sum(-1, keepdim=True)
        scale = (counts / counts.clamp(1, points)).sqrt().to(self.weight)
        return Domains(index, self.weight.expand(keys.shape).gather(-1, chosen) * scale)


class Borders(NamedTuple):
    """Points beside a border, each once for every expert that it parts its own from.

    Attributes:
        point: ``(*lead, K)`` int64, indices into the flattened mesh.
        first: ``(*lead, K)`` int64, an expert on one side.
        second: ``(*lead, K)`` int64, the expert on the other; larger than ``first``.
        present: ``(*lead, K)`` bool, False on padding.
    """

    point: Tensor
    first: Tensor
    second: Tensor
    present: Tensor


def block_labels(grid: Sequence[int], partition: Sequence[int | Sequence[int]]) -> Tensor:
    """Labels ``(*grid)`` of blocks, numbered with the last dimension fastest.

    Args:
        grid: points along each dimension.
        partition: for each dimension the number of blocks (sizes differ by one at the most, larger ones first), or their sizes.

    Raises:
        ShapeError: the partition does not fit the grid.

    Example:
        >>> block_labels((3, 5), (1, (2, 3)))
        tensor([[0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1]])
    """
    if len(partition) != len(grid):
        raise ShapeError(f"partition={tuple(partition)} has {len(partition)} entries, the mesh {tuple(grid)} has {len(grid)} dimensions")
    labels = torch.zeros((), dtype=torch.int64)
    for points, blocks in zip(grid, partition, strict=True):
        if isinstance(blocks, int):
            sizes = [points // blocks + (i < points % blocks) for i in range(blocks)] if blocks > 0 else []
        else:
            sizes = list(blocks)
        if min(sizes, default=0) < 1 or sum(sizes) != points:
            raise ShapeError(f"partition={tuple(partition)}: {blocks!r} does not cut {points} points into blocks of one point or more")
        numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        labels = labels.unsqueeze(-1) * len(sizes) + numbers
    return labels


def hard_cut(labels: Tensor, grid_ndim: int, *, overlap: int = 0) -> Cut:
    """The cut by labels, in float64.

    Args:
        labels: ``(*lead, *grid)`` integers 0 … E − 1.
        grid_ndim: dimensions of the grid.
        overlap: o, the points by which every domain is grown.

    An expert without a point in some sample repeats the problem of the expert with the most there, with φ zero: nothing reads its
    answer, and it has one.
    """
    experts = _count(labels)
    missing = sorted(set(range(experts)) - set(labels.unique().tolist())) if labels.dim() == grid_ndim else []
    if missing:
        raise ShapeError(
            f"labels must be 0 … E − 1, each of them somewhere: the largest is {experts - 1}, and no point has label {missing[0]}"
        )
    if experts == 1:
        overlap = 0
    owned = labels.unsqueeze(-grid_ndim - 1) == torch.arange(experts, device=labels.device).reshape(-1, *[1] * grid_ndim)
    # An outer point of the mesh is not beside a border: shrinking is growing of the complement.
    grown, rest, stack = owned, ~owned, owned.to(torch.float64)
    for _ in range(overlap):
        grown, rest = _grow(grown, grid_ndim), _grow(rest, grid_ndim)
        stack = stack + grown + ~rest
    phi = (stack / stack.sum(-grid_ndim - 1, keepdim=True)).flatten(-grid_ndim)
    member = phi > 0
    counts = member.sum(-1, keepdim=True)
    fullest = counts.argmax(-2, keepdim=True).expand(*counts.shape[:-2], 1, member.shape[-1])
    member = torch.where(counts == 0, member.gather(-2, fullest), member)
    return Cut(member.to(phi), phi)


def soft_cut(logits: Tensor, grid_ndim: int) -> Cut:
    """The soft cut φ = softmax of ``logits`` ``(*lead, *grid, E)``, differentiable in them."""
    logarithm = logits.flatten(-grid_ndim - 1, -2).log_softmax(-1).mT
    # √φ by the exponential: the derivative of a square root is infinite where φ underflows.
    return Cut((logarithm / 2).exp(), logarithm.exp(), soft=True)


def find_borders(labels: Tensor, grid_ndim: int) -> Borders:
    """The points of ``labels`` ``(*lead, *grid)`` with a neighbour along a dimension of the grid that belongs to another expert."""
    lead, grid = labels.shape[: labels.dim() - grid_ndim], labels.shape[labels.dim() - grid_ndim :]
    numbers, experts = torch.arange(math.prod(grid), device=labels.device).reshape(grid), _count(labels)
    codes = []
    for sample in labels.reshape(-1, *grid):
        found = []
        for dim in range(grid_ndim):
            near, far = (sample.narrow(dim, start, grid[dim] - 1) for start in (0, 1))
            pair = torch.minimum(near, far) * experts + torch.maximum(near, far)
            for start in (0, 1):
                point = numbers.narrow(dim, start, grid[dim] - 1)
                found.append((point * experts**2 + pair)[near != far])
        codes.append(torch.cat(found).unique())
    padded = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1) if codes else labels.new_zeros(0, 0)
    padded = padded.reshape(*lead, padded.shape[-1])
    kept = padded.clamp(min=0)
    pair = kept % experts**2
    return Borders(kept // experts**2, pair // experts, pair % experts, padded >= 0)


def _count(labels: Tensor) -> int:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ShapeError(f"labels must be integers 0 … E − 1, got {labels.dtype}; a router returns labels, or logits (*batch, *grid, E)")
    if labels.numel() and int(labels.min()) < 0:
        raise ShapeError(f"labels must be integers 0 … E − 1, got {int(labels.min())}")
    return int(labels.max()) + 1 if labels.numel() else 1


def _grow(member: Tensor, grid_ndim: int) -> Tensor:
    """The points ``(..., *grid)`` and their neighbours, diagonal ones included."""
    for dim in range(-grid_ndim, 0):
        grown, inner = member.clone(), member.shape[dim] - 1
        grown.narrow(dim, 1, inner).logical_or_(member.narrow(dim, 0, inner))
        grown.narrow(dim, 0, inner).logical_or_(member.narrow(dim, 1, inner))
        member = grown
    return member
