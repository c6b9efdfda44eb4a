r"""Sorting networks as layers of comparators: which pairs of wires meet, and in what order.

**Odd-even**: n layers that compare neighbours, from the first wire on and from the second one on in turn. **Bitonic** (Batcher 1968):
blocks b = 1, 2, … that merge sorted runs of :math:`2^{b-1}` into runs of :math:`2^b`. The first layer of a block compares wire i of a run
with wire :math:`2^b - 1 - i`, the others compare wires at the distances :math:`2^{b-2}, …, 2, 1`; the smaller value always goes up. This is
the usual network of runs in alternating directions with every other run renumbered from its end.

Every comparator puts the smaller value on the wire of smaller number, so for a size n that is no power of two the wires from n on may be
thought to hold +∞: no comparator that reaches one of them ever swaps, and a run without a second half stays as it is.

Reference: Batcher, Sorting networks and their applications, AFIPS 1968.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layer", "Wiring", "bitonic", "odd_even"]


@dataclass(frozen=True)
class Layer:
    """Comparators that act at once: ``groups`` groups of 2 · ``length`` neighbouring wires, the first half of a group against the second.

    Args:
        offset: the first wire that is compared.
        groups: how many groups.
        length: comparators in a group.
        mirrored: wire i of the first half meets the second half from its end.
    """

    offset: int
    groups: int
    length: int
    mirrored: bool = False

    @property
    def count(self) -> int:
        """The number of comparators."""
        return self.groups * self.length

    def halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The two wires of each comparator, as views ``(groups, length, *rest)``; see :meth:`facing` for the second.

        Args:
            y: ``(wires, *rest)``.
        """
        compared = self.grouped(y.narrow(0, self.offset, 2 * self.count), 2)
        return compared.select(1, 0), compared.select(1, 1)

    def facing(self, half: Tensor) -> Tensor:
        """The second half in the order in which it meets the first, or back.

        Args:
            half: ``(groups, length, *rest)``.
        """
        return half.flip(1) if self.mirrored else half

    def grouped(self, part: Tensor, *between: int) -> Tensor:
        """``(comparators, *rest)`` as ``(groups, length, *rest)``, or wires with the halves in ``between``."""
        return part.unflatten(0, (self.groups, *between, self.length))

    def difference(self, y: Tensor) -> Tensor:
        """The second wire of each comparator minus the first, ``(groups, length, *rest)``.

        Args:
            y: ``(wires, *rest)``.
        """
        lower, upper = self.halves(y)
        return self.facing(upper) - lower

    def moved(self, y: Tensor, amount: Tensor) -> Tensor:
        """The wires once an amount has gone from the second wire of each comparator to the first, as a new tensor.

        Args:
            y: ``(wires, *rest)``.
            amount: ``(groups, length, *rest)``.
        """
        lower, upper = self.halves(y)
        compared = torch.stack((lower + amount, upper - self.facing(amount)), 1).flatten(0, 2)
        end = self.offset + 2 * self.count
        if self.offset == 0 and end == y.shape[0]:
            return compared
        return torch.cat((y[: self.offset], compared, y[end:]))

    def move_(self, y: Tensor, amount: Tensor) -> None:
        """As :meth:`moved`, in place.

        Args:
            y: ``(wires, *rest)``.
            amount: ``(groups, length, *rest)``.
        """
        lower, upper = self.halves(y)
        lower += amount
        upper -= self.facing(amount)

    def below(self, limit: int) -> Tensor:
        """Which comparators have both wires below ``limit``: ``(comparators,)`` bool."""
        upper = self.facing(self.halves(torch.arange(self.offset + 2 * self.count))[1])
        return (upper < limit).flatten()


@dataclass(frozen=True, eq=False)
class Wiring:
    """A sorting network of some size.

    Attributes:
        size: how many values are sorted.
        blocks: the layers, in the blocks that merge runs; the odd-even network is one block.
    """

    size: int
    blocks: tuple[tuple[Layer, ...], ...]

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All of them, in order."""
        return tuple(layer for block in self.blocks for layer in block)

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Comparators of each layer."""
        return tuple(layer.count for layer in self.layers)

    @functools.cached_property
    def wires(self) -> int:
        """Wires that any layer reaches: ``size`` of them hold values."""
        return max([self.size, *(layer.offset + 2 * layer.count for layer in self.layers)])

    @functools.cached_property
    def _active(self) -> Tensor | None:
        if self.wires == self.size:
            return None
        active = []
        for block in self.blocks:
            run = 2 * block[0].length
            # A last run without values in its second half is in order already.
            limit = self.size if (self.size - 1) % run >= run // 2 else self.size - self.size % run
            active += [layer.below(limit) for layer in block]
        return torch.cat(active)

    def only_active(self, weights: Tensor) -> Tensor:
        """``(comparators, *rest)`` with zeros for comparators that never swap."""
        if self._active is None:
            return weights
        return torch.where(self._active.to(weights.device).reshape(-1, *[1] * (weights.dim() - 1)), weights, 0)

    @property
    def comparators(self) -> int:
        """How many there are in all."""
        return sum(self.counts)

    def on_wires(self, y: Tensor) -> Tensor:
        """Values ``(size, *rest)`` on all the wires; a new tensor if there are more."""
        return y if self.wires == self.size else torch.cat((y, y.new_zeros(self.wires - self.size, *y.shape[1:])))

    def steps(self, *per_comparator: Tensor) -> list[tuple[Any, ...]]:
        """(layer, its part ``(groups, length, *rest)`` of each argument), in order.

        Args:
            per_comparator: ``(comparators, *rest)``.
        """
        parts = zip(*(part.split(self.counts) for part in per_comparator), strict=True)
        return [(layer, *map(layer.grouped, mine)) for layer, mine in zip(self.layers, parts, strict=True)]


def odd_even(size: int) -> Wiring:
    """The odd-even network.

    Args:
        size: n.
    """
    layers = [Layer(i % 2, (size - i % 2) // 2, 1) for i in range(size)]
    return Wiring(size, (tuple(layer for layer in layers if layer.count),))


def bitonic(size: int) -> Wiring:
    """The bitonic network; the last block reaches over the next power of two of wires.

    Args:
        size: n.
    """
    blocks = []
    for level in range(1, (size - 1).bit_length() + 1):
        run = 1 << level
        wires = -(-size // run) * run
        distances = [run >> (j + 1) for j in range(1, level)]
        blocks.append((Layer(0, wires // run, run // 2, mirrored=True), *(Layer(0, wires // (2 * m), m) for m in distances)))
    return Wiring(size, tuple(blocks))
