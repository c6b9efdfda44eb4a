r"""Where to begin a matching: group by group outward from what cannot move, comparing what no open choice can change.

The inputs and outputs of a network stay where they are. The weights between the inputs and the first hidden units can be compared entry by
entry; once these units are matched, so can the weights behind them. Entries that belong to units not matched yet are compared as a
set: both networks' are sorted. Of two sets the sorted order has the largest inner product of all orders, so that a comparison is an upper
bound of what any later choice can reach, and it is exact where one network is the other one renamed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .assignment import assign, rows
from .axes import Axis, Concatenation, Fixed, Group
from .spec import Occurrence, PermutationSpec

__all__ = ["exchangeable", "outward"]


def outward(
    spec: PermutationSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    places: Mapping[str, Sequence[Occurrence]],
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Permutations that bring b near a, each group visited once.

    Args:
        spec: the symmetries.
        a: weights to be met.
        b: weights to be renamed, of the same names and shapes.
        places: group → where it touches them.
        known: permutations that are settled, of groups that are not in ``places``.
    """
    found = dict(known or {})
    permuted = dict(spec.apply(b, found))
    touches = {group: {at.name for at in places[group]} for group in places}
    score = {group: _comparable(spec, places[group], found) for group in places}
    while score:
        group = max(score, key=lambda group: score[group])
        del score[group]
        products = (_signatures(spec, a, at, found) @ _signatures(spec, permuted, at, found).mT for at in places[group])
        found[group] = assign(sum(products, torch.zeros(())))
        permuted |= spec.apply({name: permuted[name] for name in touches[group]}, {group: found[group]})
        score |= {other: _comparable(spec, places[other], found) for other in score if touches[other] & touches[group]}
    return found


def _comparable(spec: PermutationSpec, places: Sequence[Occurrence], known: Mapping[str, Tensor]) -> float:
    """How much of what a unit touches is told apart."""
    apart = total = 0
    for at in places:
        labels = _labels(spec, at, known)
        apart, total = apart + _sets(labels), total + math.prod(map(len, labels))
    return apart / total


def _signatures(spec: PermutationSpec, params: Mapping[str, Tensor], at: Occurrence, known: Mapping[str, Tensor]) -> Tensor:
    """``(n, K)``: what each unit touches there, sorted among the entries that open choices may exchange."""
    columns, labels = rows(params, at), _labels(spec, at, known)
    if _sets(labels) == columns.shape[1]:
        return columns
    label = _combined(labels)
    order, counts = label.argsort(), torch.bincount(label)
    sizes = counts[counts > 0].repeat_interleave(counts[counts > 0])  # of the set that each column in `order` is from
    parts = []
    for size in sizes.unique().tolist():
        chosen = columns[:, order[sizes == size].to(columns.device)]
        parts.append(chosen.unflatten(1, (-1, size)).sort(-1).values.flatten(1))
    return torch.cat(parts, 1)


def _labels(spec: PermutationSpec, at: Occurrence, known: Mapping[str, Tensor]) -> list[Tensor]:
    """For the entries that a unit touches there, dimension by dimension, the number of their set."""
    axes = spec.axes[at.name]
    own = exchangeable(axes[at.dim], known)[at.positions[0]].unique(return_inverse=True)[1]
    return [own, *(exchangeable(axis, known) for dim, axis in enumerate(axes) if dim != at.dim)]


def _sets(labels: Sequence[Tensor]) -> int:
    return math.prod(int(part.max()) + 1 for part in labels)


def _combined(labels: Sequence[Tensor]) -> Tensor:
    total = labels[0]
    for part in labels[1:]:
        total = (total.unsqueeze(-1) * (int(part.max()) + 1) + part).flatten()
    return total


def exchangeable(axis: Axis, known: Mapping[str, Tensor]) -> Tensor:
    """int64 ``(axis.size,)``: entries with the same number may be exchanged by groups that are not known.

    Args:
        axis: the axis.
        known: group → anything, the groups that are.
    """
    if isinstance(axis, Fixed) or (isinstance(axis, Group) and axis.name in known):
        return torch.arange(axis.size)
    if isinstance(axis, Group):
        return torch.zeros(axis.size, dtype=torch.int64)
    parts = [exchangeable(part, known) for part in axis.parts]
    if not isinstance(axis, Concatenation):
        return _combined(parts)
    shifted, offset = [], 0
    for part in parts:
        shifted.append(part + offset)
        offset += int(part.max()) + 1
    return torch.cat(shifted)
