r"""Where to begin a matching: group by group outward from what cannot move, comparing what no open choice can change.

The inputs and outputs of a network stay where they are. The weights between the inputs and the first hidden units can be compared entry by
entry; once these units are matched, so can the weights behind them. Entries that belong to units not matched yet are compared as a
set: both networks' are sorted. Of two sets the sorted order has the largest inner product of all orders, so that a comparison is an upper
bound of what any later choice can reach, and it is exact where one network is the other one renamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .assignment import assign, rows
from .axes import Axis, Concatenation, Fixed, Group
from .spec import Occurrence, PermutationSpec

__all__ = ["outward"]


def outward(
    spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor], places: Mapping[str, Sequence[Occurrence]]
) -> dict[str, Tensor]:
    """Permutations that bring b near a, each group visited once.

    Args:
        spec: the symmetries.
        a: weights to be met.
        b: weights to be renamed, of the same names and shapes.
        places: group → where it touches them.
    """
    found: dict[str, Tensor] = {}
    permuted = dict(b)
    while len(found) < len(places):
        group = max((group for group in places if group not in found), key=lambda group: _comparable(spec, places[group], found))
        products = (_signatures(spec, a, at, found) @ _signatures(spec, permuted, at, found).mT for at in places[group])
        found[group] = assign(sum(products, torch.zeros(())))
        touched = {at.name: permuted[at.name] for at in places[group]}
        permuted |= spec.apply(touched, {group: found[group]})
    return found


def _comparable(spec: PermutationSpec, places: Sequence[Occurrence], known: Mapping[str, Tensor]) -> float:
    """How much of what a unit touches is told apart."""
    apart = total = 0
    for at in places:
        labels, distinct = _labels_of_columns(spec, at, known)
        apart, total = apart + distinct, total + len(labels)
    return apart / total


def _signatures(spec: PermutationSpec, params: Mapping[str, Tensor], at: Occurrence, known: Mapping[str, Tensor]) -> Tensor:
    """``(n, K)``: what each unit touches there, sorted among the entries that open choices may exchange."""
    columns = rows(params, at)
    labels, distinct = _labels_of_columns(spec, at, known)
    if distinct == len(labels):
        return columns
    order, counts = labels.argsort(), torch.bincount(labels)
    sizes = counts[counts > 0].repeat_interleave(counts[counts > 0])  # of the set that each column in `order` is from
    parts = []
    for size in sizes.unique().tolist():
        chosen = columns[:, order[sizes == size].to(columns.device)]
        parts.append(chosen.unflatten(1, (-1, size)).sort(-1).values.flatten(1))
    return torch.cat(parts, 1)


def _labels_of_columns(spec: PermutationSpec, at: Occurrence, known: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """For each entry that a unit touches there the number of its set, and how many sets there are."""
    axes = spec.axes[at.name]
    own = _labels(axes[at.dim], known)[at.positions[0]].unique(return_inverse=True)[1]
    labels = [own, *(_labels(axis, known) for dim, axis in enumerate(axes) if dim != at.dim)]
    return _product(labels)


def _product(labels: Sequence[Tensor]) -> tuple[Tensor, int]:
    total, count = labels[0], int(labels[0].max()) + 1
    for part in labels[1:]:
        size = int(part.max()) + 1
        total, count = (total.unsqueeze(-1) * size + part).flatten(), count * size
    return total, count


def _labels(axis: Axis, known: Mapping[str, Tensor]) -> Tensor:
    """int64 ``(axis.size,)``: entries with the same number may be exchanged by groups that are not known."""
    if isinstance(axis, Fixed) or (isinstance(axis, Group) and axis.name in known):
        return torch.arange(axis.size)
    if isinstance(axis, Group):
        return torch.zeros(axis.size, dtype=torch.int64)
    parts = [_labels(part, known) for part in axis.parts]
    if not isinstance(axis, Concatenation):
        return _product(parts)[0]
    shifted, offset = [], 0
    for part in parts:
        shifted.append(part + offset)
        offset += int(part.max()) + 1
    return torch.cat(shifted)
