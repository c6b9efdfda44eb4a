r"""Peeling: simple points go, end points stay, until a skeleton is left.

Each round first marks the end points, voxels with at most one neighbour in the foreground. Then one subfield after the other loses its
simple points that are not end points. Voxels of one subfield do not touch, so a deletion leaves the others of its subfield simple: what
is deleted at once could have been deleted one by one, and the topology is kept.

As the published module writes it, a round is :math:`x ← \min(x, 1 - c)`, with c the candidates (0 or 1), which have no derivative. The
derivative of a minimum is 1 for the smaller one and ½ for both at a tie. A kept voxel (x = 1, c = 0) ties in every round, a background
voxel (x = 0) in those where it is a candidate itself, and a deleted one gets 0. So after k ties a voxel that was not deleted has the
derivative :math:`2^{-k}`; ties are counted in binary, one plane of words a digit.

Reference: Menten, Paetzold, Zimmer, Shit, Ezhov, Holland, Probst, Schnabel and Rueckert, A skeletonization algorithm for gradient-based
optimization, ICCV 2023, arXiv:2309.02527.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .simple_points import Detection, add_bit, at_least_two, directions, simple_points
from .words import Words

__all__ = ["Peeled", "peel"]

_MANY = 2000  # words of a subfield, below which it costs more to pick some than to treat all


class Peeled(NamedTuple):
    """What is left of binary images.

    Attributes:
        skeleton: uint8 ``(batch, *spatial)``.
        ties: int64 ``(batch, *spatial)``: how often a voxel tied; None if nobody asked.
        rounds: ``(batch,)``, the rounds that deleted something.
    """

    skeleton: Tensor
    ties: Tensor | None
    rounds: Tensor


def peel(images: Tensor, num_iter: int | None, detection: Detection, *, count_ties: bool) -> Peeled:
    """Peel binary images.

    Args:
        images: bool ``(batch, *spatial)``, two or three spatial dimensions.
        num_iter: how many rounds; None: until nothing changes, and each image counts its ties up to its own last change.
        detection: of simple points.
        count_ties: whether to count them.
    """
    words = Words(images)
    ties, lost = torch.zeros_like(words.fields), torch.zeros_like(words.fields[0])
    subfields = [_Subfield(words, index, ties[index], lost) for index in range(len(words.fields))]
    digits: list[Tensor] = []
    rounds = torch.zeros(words.batch, dtype=torch.int64, device=images.device)
    left = 0
    for done in itertools.count(1) if num_iter is None else range(1, num_iter + 1):
        lost.zero_()
        for subfield in subfields:
            subfield.mark(background=count_ties)
        for subfield in subfields:
            subfield.delete(detection)
        changed = (lost.flatten(1) != 0).any(1)
        rounds += changed
        if not bool(changed.any()):
            # The rounds that are left, from this one on, would all be the same.
            left = 0 if num_iter is None else num_iter - done + 1
            break
        if count_ties:
            if num_iter is None:
                ties *= changed.view(-1, *[1] * words.ndim)
            if done.bit_length() > len(digits):
                digits.append(torch.zeros_like(words.fields))
            add_bit(digits, ties)
    number = None
    if count_ties:
        number = left * words.images(ties).to(torch.int64)
        for place, digit in enumerate(digits):
            number += words.images(digit).to(torch.int64) << place
    return Peeled(words.images(), number, rounds)


class _Subfield:
    """One subfield at work: all its words, or, if there are few, those that have foreground in them or next to them."""

    def __init__(self, words: Words, index: int, ties: Tensor, lost: Tensor) -> None:
        self.words, self.field = words, words.fields[index]
        self.here, self.ties, self.lost = words.window(self.field), words.window(ties), words.window(lost)
        self.near = words.neighbours(index, directions(words.ndim))
        self.active: Tensor | None = None
        if words.inside.numel() > _MANY:
            touched = functools.reduce(torch.bitwise_or, self.near.values(), self.here) & words.inside
            active = touched.nonzero().squeeze(1)
            self.active = active if 2 * len(active) < len(touched) else None
        self.inside = self._read(words.inside)

    def mark(self, background: bool) -> None:
        """Note who may be a candidate in this round: no end points, and background voxels only if their ties are counted."""
        self.asked = at_least_two([self._read(word) for word in self.near.values()]) & self.inside
        if not background:
            self.asked = self.asked & self._read(self.here)

    def delete(self, detection: Detection) -> None:
        """Delete the simple points among them, and say who tied and who was lost."""
        here = self._read(self.here)
        candidates = simple_points({direction: self._read(word) for direction, word in self.near.items()}, detection) & self.asked
        deleted = candidates & here
        self._write(self.ties, candidates ^ here)
        self._write(self.lost, self._read(self.lost) | deleted)
        self._write(self.here, here & ~deleted)
        self.words.close_seams(self.field)

    def _read(self, window: Tensor) -> Tensor:
        return window if self.active is None else window[self.active]

    def _write(self, window: Tensor, values: Tensor) -> None:
        if self.active is None:
            window.copy_(values)
        else:
            window[self.active] = values
