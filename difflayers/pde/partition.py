r"""The cut of a mesh into the domains of experts.

Every point p of the mesh belongs to one of E experts (its label). Grown by o points in every direction, diagonals included, the points
of an expert are its *domain*; domains overlap by 2o points. The experts' values are blended by a partition of unity,

.. math:: u(p) = \sum_e φ_e(p)\, u_e(p), \qquad \sum_e φ_e = 1, \qquad
   φ_e(p) ∝ \frac{1}{2o + 1} \sum_{k=-o}^{o} 1[p ∈ \text{points of } e \text{ grown by } k],

where a negative k shrinks: a linear ramp across a straight border. With o = 0 the cut is sharp, φ is zero or one. A soft cut has no
labels: it is the partition of unity itself, every domain is the whole mesh, and a row of expert e at p weighs :math:`\sqrt{φ_e(p)}`.

All cuts are one thing to the solver, a :class:`Cut`: for every expert the list of its points, the weights of its rows and its φ.
Lists shorter than the longest are padded by a point of the same expert with weight and φ zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError

__all__ = ["Borders", "Cut", "Partition", "block_labels", "find_borders", "hard_cut", "soft_cut"]

Partition = Sequence[int | Sequence[int]] | Tensor | Callable[..., Tensor]


class Cut(NamedTuple):
    """For every expert its points.

    Attributes:
        index: ``(*lead, E, P)`` int64, the points of each expert's domain as indices into the flattened mesh; ``lead`` is the batch, or
            empty where all samples are cut alike. None: the whole mesh, for every expert.
        weight: ``(*lead, E, P)``, what a row of the expert at the point weighs; 0 on padding.
        blend: ``(*lead, E, P)``, φ; 0 on padding.
        size: points of the mesh.
    """

    index: Tensor | None
    weight: Tensor
    blend: Tensor
    size: int

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.weight.shape[-2]

    def to(self, device: torch.device, dtype: torch.dtype) -> Cut:
        """The same on another device, with weights of another dtype."""
        index = None if self.index is None else self.index.to(device)
        return self._replace(index=index, weight=self.weight.to(device, dtype), blend=self.blend.to(device, dtype))

    def of(self, experts: slice) -> Cut:
        """The cut as only these experts see it."""
        index = None if self.index is None else self.index[..., experts, :]
        return self._replace(index=index, weight=self.weight[..., experts, :], blend=self.blend[..., experts, :])

    def take(self, field: Tensor) -> Tensor:
        """The values ``(*batch, E, P, N)`` of ``field`` ``(*batch, size, N)`` at the points of every expert."""
        if self.index is None:
            return field.unsqueeze(-3).expand(*field.shape[:-2], self.experts, *field.shape[-2:])
        if self.index.dim() == 2:
            return field.index_select(-2, self.index.flatten()).unflatten(-2, tuple(self.index.shape))
        batch = torch.broadcast_shapes(field.shape[:-2], self.index.shape[:-2])
        where = self.index.flatten(-2).unsqueeze(-1).expand(*batch, -1, field.shape[-1])
        return field.expand(*batch, *field.shape[-2:]).gather(-2, where).unflatten(-2, tuple(self.index.shape[-2:]))

    def stitch(self, values: Tensor) -> Tensor:
        """The blend ``(*batch, size)`` of the experts' values ``(*batch, E, P)``."""
        # A value that is not finite stays with the points where its expert counts.
        parts = torch.where(self.blend > 0, self.blend * values, 0)
        if self.index is None:
            return parts.sum(-2)
        where = self.index.flatten(-2).expand(*parts.shape[:-2], -1)
        return parts.new_zeros(*parts.shape[:-2], self.size).scatter_add(-1, where, parts.flatten(-2))

    def sample(self, batch: Sequence[int], points: int, generator: torch.Generator | None = None) -> Cut:
        """Points drawn without replacement, for every sample and expert ``points`` of them (all, where it has fewer).

        The φ that go with them are no partition of unity: this is a cut to solve on.
        """
        device = self.weight.device if generator is None else generator.device
        keys = torch.rand(*batch, *self.weight.shape[-2:], generator=generator, device=device).to(self.weight.device)
        chosen = torch.where(self.weight.detach() > 0, keys, -1).topk(min(points, keys.shape[-1])).indices
        weight, blend = (part.expand(keys.shape).gather(-1, chosen) for part in (self.weight, self.blend))
        index = chosen if self.index is None else self.index.expand(keys.shape).gather(-1, chosen)
        return Cut(index, weight, blend, self.size)


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
    if experts == 1:
        overlap = 0
    owned = labels.unsqueeze(-grid_ndim - 1) == torch.arange(experts, device=labels.device).reshape(-1, *[1] * grid_ndim)
    # An outer point of the mesh is not beside a border: shrinking is growing of the complement.
    grown, rest, stack = owned, ~owned, owned.to(torch.float64)
    for _ in range(overlap):
        grown, rest = _grow(grown, grid_ndim), _grow(rest, grid_ndim)
        stack = stack + grown + ~rest
    lead, size = labels.shape[: labels.dim() - grid_ndim], math.prod(labels.shape[labels.dim() - grid_ndim :])
    phi = (stack / stack.sum(-grid_ndim - 1, keepdim=True)).reshape(-1, experts, size)
    member = phi > 0
    counts = member.sum(-1)
    index = torch.zeros(*counts.shape, int(counts.max()) if counts.numel() else 0, dtype=torch.int64, device=labels.device)
    sample, expert, point = member.nonzero(as_tuple=True)
    starts = counts.flatten().cumsum(0).reshape(counts.shape) - counts
    position = torch.arange(point.numel(), device=labels.device) - starts[sample, expert]
    index[sample, expert, position] = point
    present = torch.arange(index.shape[-1], device=labels.device) < counts.unsqueeze(-1)
    index = torch.where(present, index, index[..., :1])
    weight, blend = present.to(torch.float64), torch.where(present, phi.gather(-1, index), 0)
    empty, fullest = (counts == 0).unsqueeze(-1), counts.argmax(-1)
    rows = torch.arange(len(counts), device=labels.device)
    index = torch.where(empty, index[rows, fullest].unsqueeze(-2), index)
    weight = torch.where(empty, weight[rows, fullest].unsqueeze(-2), weight)
    return Cut(*(part.reshape(*lead, *part.shape[1:]) for part in (index, weight, blend)), size)


def soft_cut(logits: Tensor, grid_ndim: int) -> Cut:
    """The soft cut φ = softmax of ``logits`` ``(*lead, *grid, E)``, differentiable in them."""
    logarithm = logits.flatten(-grid_ndim - 1, -2).log_softmax(-1).mT
    # √φ by the exponential: the derivative of a square root is infinite where φ underflows.
    return Cut(None, (logarithm / 2).exp(), logarithm.exp(), logarithm.shape[-1])


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
