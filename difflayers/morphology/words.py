r"""Binary images as machine words: up to 62 voxels side by side in one integer, so that a bitwise operation treats them all.

The voxels fall into 2ⁿ subfields by the parity of their coordinates; no two of one subfield touch. A subfield is an image of half the size.
Its rows along the first axis are dealt to the words in strips: bit b of the words in row r belongs to row bR + r, where R is the number of
word rows. The next row is then the next row of words, for all bits but those at the seams, which two halo rows bring by a shift. The other
axes have a halo of zeros. So every neighbour of every voxel of a subfield is found at one offset in the words of another subfield.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Words"]

_BITS = 62  # the sign and the bit before it stay free, so that shifts by one neither overflow nor drag the sign along


class Words:
    """The words of binary images.

    Args:
        images: bool, ``(batch, *spatial)`` with two or three spatial dimensions.

    Attributes:
        subfields: the parities of the coordinates, in the order of peeling: the first axis changes fastest, odd coordinates come first.
        fields: int64 ``(2ⁿ, batch, *rows)`` with halos, in the order of ``subfields``.
        inside: a window (see :meth:`window`) that is 0 on halos and has all bits set elsewhere.
    """

    def __init__(self, images: Tensor) -> None:
        batch, *self.spatial = images.shape
        self.batch, self.ndim, self.device = batch, len(self.spatial), images.device
        # A voxel of background before each axis turns odd coordinates into even ones, as in the published order.
        self.subfields = [parity[::-1] for parity in itertools.product((0, 1), repeat=self.ndim)]
        halves = [size // 2 + 1 for size in self.spatial]
        self.rows = max(-(-halves[0] // _BITS), 1)
        self.bits = -(-halves[0] // self.rows)
        self.inner = [self.rows, *halves[1:]]
        self.fields = torch.zeros(2**self.ndim, batch, *(size + 2 for size in self.inner), dtype=torch.int64, device=images.device)
        self._within(self.fields).copy_(self._pack(images))
        for field in self.fields:
            self.close_seams(field)
        self._strides = self.fields.stride()[2:]
        self._margin = sum(self._strides)
        self._length = max(self.fields[0].numel() - 2 * self._margin, 0)
        inside = torch.zeros_like(self.fields[0])
        self._within(inside).fill_(-1)
        self.inside = self.window(inside)

    def window(self, field: Tensor) -> Tensor:
        """The words of one subfield as a vector, from the first that is not a halo to the last; halos in between stay."""
        return field.view(-1)[self._margin : self._margin + self._length]

    def neighbours(self, subfield: int, directions: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """For each direction the window of the neighbours there: views, which stay up to date."""
        parity = self.subfields[subfield]
        found = {}
        for direction in directions:
            position = [p + d for p, d in zip(parity, direction, strict=True)]
            field = self.fields[self.subfields.index(tuple(p % 2 for p in position))]
            start = self._margin + sum((p // 2) * stride for p, stride in zip(position, self._strides, strict=True))
            found[direction] = field.view(-1)[start : start + self._length]
        return found

    def images(self, fields: Tensor | None = None) -> Tensor:
        """``(batch, *spatial)`` of zeros and ones in uint8, of these words or of others laid out like them."""
        words = self._within(self.fields if fields is None else fields).unsqueeze(2)
        shifts = torch.arange(self.bits, device=self.device).view(-1, *[1] * self.ndim)
        bits = ((words >> shifts) & 1).to(torch.uint8)
        halves = [self.bits * self.rows, *self.inner[1:]]
        # The subfields' digits come last axis first.
        bits = bits.reshape(*[2] * self.ndim, self.batch, *halves)
        order = [self.ndim, *itertools.chain(*((self.ndim + 1 + axis, self.ndim - 1 - axis) for axis in range(self.ndim)))]
        padded = bits.permute(order).reshape(self.batch, *(2 * half for half in halves))
        return padded[(slice(None), *(slice(1, 1 + size) for size in self.spatial))]

    def _pack(self, images: Tensor) -> Tensor:
        """Words without halos."""
        halves = [self.bits * self.rows, *self.inner[1:]]
        padded = images.new_zeros(self.batch, *(2 * half for half in halves))
        padded[(slice(None), *(slice(1, 1 + size) for size in self.spatial))] = images
        split = padded.reshape(self.batch, *itertools.chain(*((half, 2) for half in halves)))
        parities, places = range(2, 2 * self.ndim + 1, 2), range(1, 2 * self.ndim, 2)
        split = split.permute(*reversed(parities), 0, *places).reshape(2**self.ndim, self.batch, self.bits, *self.inner)
        weights = 1 << torch.arange(self.bits, device=images.device).view(-1, *[1] * self.ndim)
        return (split * weights).sum(2)

    def _within(self, fields: Tensor) -> Tensor:
        """A view without halos."""
        return fields[(..., *(slice(1, 1 + size) for size in self.inner))]

    def close_seams(self, field: Tensor) -> None:
        """Bring the halo rows of the first axis up to date."""
        torch.bitwise_left_shift(field[:, self.rows], 1, out=field[:, 0])
        torch.bitwise_right_shift(field[:, 1], 1, out=field[:, self.rows + 1])
