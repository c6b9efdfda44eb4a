r"""How a dimension of a weight is made of groups of units.

The units of a layer may be renamed by a permutation if every weight that they touch is renamed alike. A dimension of a weight is, seen
so, a tree: a :class:`Group` of units, a :class:`Fixed` range that nothing may move, a :class:`Product` of parts in row-major order (the
flattened channels × height × width of an image, the heads × features of attention), or a :class:`Concatenation` of parts (the skip
connection of a U-Net; queries, keys and values in one matrix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

__all__ = ["Axis", "Concatenation", "Fixed", "Group", "Product", "index", "leaves", "positions", "transform"]


@dataclass(frozen=True)
class Fixed:
    """``size`` entries that stay where they are."""

    size: int


@dataclass(frozen=True)
class Group:
    """The units of the group ``name``, one entry each."""

    name: str
    size: int


@dataclass(frozen=True)
class Product:
    """Every combination of the entries of ``parts``, the last part running fastest."""

    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Concatenation:
    """The entries of ``parts``, one part after the other."""

    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(part.size for part in self.parts)


Axis = Fixed | Group | Product | Concatenation


def leaves(axis: Axis) -> Iterator[Fixed | Group]:
    """The groups and fixed ranges of an axis, in their order."""
    if isinstance(axis, Fixed | Group):
        yield axis
    else:
        for part in axis.parts:
            yield from leaves(part)


def index(axis: Axis, permutations: Mapping[str, Tensor]) -> Tensor:
    """Where each entry of the permuted axis comes from, int64 ``(axis.size,)``.

    Args:
        axis: the axis.
        permutations: group → int64 ``(n,)``: new unit i is old unit ``permutation[i]``. Groups that are not there stay.
    """
    if isinstance(axis, Group) and axis.name in permutations:
        return permutations[axis.name]
    if isinstance(axis, Fixed | Group):
        return torch.arange(axis.size)
    parts = [index(part, permutations) for part in axis.parts]
    if isinstance(axis, Concatenation):
        offsets = accumulate((len(part) for part in parts), initial=0)
        return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=False)])
    total = parts[0]
    for part in parts[1:]:
        total = (total.unsqueeze(-1) * len(part) + part).flatten()
    return total


def transform(tensor: Tensor, dim: int, axis: Axis, matrices: Mapping[str, Tensor]) -> Tensor:
    """The tensor with a matrix applied along each group of one of its dimensions.

    Args:
        tensor: any shape.
        dim: which dimension, nonnegative.
        axis: what that dimension is made of.
        matrices: group → ``(n, n)``, [i, j] the part of old unit j in new unit i. Groups that are not there stay.
    """
    if isinstance(axis, Fixed) or not any(isinstance(leaf, Group) and leaf.name in matrices for leaf in leaves(axis)):
        return tensor
    if isinstance(axis, Group):
        return torch.tensordot(matrices[axis.name], tensor, dims=([1], [dim])).movedim(0, dim)
    sizes = [part.size for part in axis.parts]
    if isinstance(axis, Concatenation):
        pieces = tensor.split(sizes, dim)
        return torch.cat([transform(piece, dim, part, matrices) for piece, part in zip(pieces, axis.parts, strict=True)], dim)
    split = tensor.unflatten(dim, sizes)
    for offset, part in enumerate(axis.parts):
        split = transform(split, dim + offset, part, matrices)
    return split.flatten(dim, dim + len(sizes) - 1)


def positions(axis: Axis, group: str) -> list[Tensor]:
    """For each place of the group in the axis: int64 ``(n, r)``, row i the r entries of the axis that belong to unit i.

    Args:
        axis: the axis.
        group: name of a group.
    """
    if isinstance(axis, Group):
        return [torch.arange(axis.size).unsqueeze(-1)] if axis.name == group else []
    if isinstance(axis, Fixed):
        return []
    found, offset = [], 0
    if isinstance(axis, Concatenation):
        for part in axis.parts:
            found += [place + offset for place in positions(part, group)]
            offset += part.size
        return found
    sizes = [part.size for part in axis.parts]
    for number, part in enumerate(axis.parts):
        outer, inner = math.prod(sizes[:number]), math.prod(sizes[number + 1 :])
        before, after = torch.arange(outer)[:, None, None] * (sizes[number] * inner), torch.arange(inner)
        for place in positions(part, group):
            found.append((before + place[:, None, :, None] * inner + after).flatten(1))
    return found
