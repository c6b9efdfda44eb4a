r"""Merging more than two networks: each is matched to the mean of the others, in turn, until nothing changes.

.. math::  \min_{π_1, …, π_N} \sum_{i < j} \|π_i(θ_i) - π_j(θ_j)\|^2

While all the others are held, the best :math:`π_i` is a weight matching of :math:`θ_i` to their mean, since the norm of a network does not
depend on the names of its units. Each step can only lower the sum, so it ends. At first the mean is that of the networks already placed:
of networks that are not, it is near zero and says little. The result is the mean, and the first network keeps its names.

Reference: Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836, algorithm 2 (MergeMany).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, ShapeError
from .matching import weight_matching
from .spec import PermutationSpec

__all__ = ["MergedModels", "merge_models"]


class MergedModels(NamedTuple):
    """Networks merged into one.

    Attributes:
        params: name → weight or buffer of the mean; what is not floating point is the first network's.
        permutations: one dict a network, group → int64 ``(n,)``, that brings it there. The first one's change nothing.
    """

    params: dict[str, Tensor]
    permutations: list[dict[str, Tensor]]


def merge_models(
    spec: PermutationSpec,
    params_list: Sequence[Mapping[str, Tensor]],
    *,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> MergedModels:
    """The mean of several networks, their units renamed so that they lie near one another.

    With BatchNorm, :func:`repair_batchnorm` is wanted afterwards: the mean of the running statistics is not that of the mean.

    Args:
        spec: the symmetries of the networks.
        params_list: of each network name → weight or buffer (``state_dict()``), one or more networks.
        max_iter: how often each network may be visited.
        generator: source of randomness, on the CPU; the networks are visited in random order then, else in theirs.

    Raises:
        ShapeError: no network, or names or shapes differ.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import PermutationSpec, merge_models
        >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(5, 2)
        >>> spec = PermutationSpec.from_module(model, x)
        >>> same = [spec.apply(model.state_dict(), spec.random()) for _ in range(3)]  # three networks, one function
        >>> torch.allclose(torch.func.functional_call(model, merge_models(spec, same).params, x), model(x), atol=1e-6)
        True
    """
    if not params_list:
        raise ShapeError("params_list is empty: one network or more are needed")
    count = len(params_list)
    found = [spec.identity()]
    for number in range(1, count):
        placed = [spec.apply(params, each) for params, each in zip(params_list, found, strict=False)]
        found.append(weight_matching(spec, _mean(placed), params_list[number], generator=generator))
    placed = [spec.apply(params, each) for params, each in zip(params_list, found, strict=True)]
    stale = set(range(count)) if count > 2 else set()
    for _ in range(max_iter):
        order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
        for i in (i for i in order if i in stale):
            stale.discard(i)
            others = _mean([params for j, params in enumerate(placed) if j != i])
            new = weight_matching(spec, others, params_list[i], init=found[i], generator=generator)
            if any(not torch.equal(new[group], found[i][group]) for group in new):
                found[i], placed[i] = new, spec.apply(params_list[i], new)
                stale = set(range(count)) - {i}
        if not stale:
            break
    else:
        warnings.warn(
            f"merge_models: networks could still change after {max_iter} visits; raise max_iter", ConvergenceWarning, stacklevel=2
        )
    home = spec.inverse(found[0])
    return MergedModels(spec.apply(_mean(placed), home), [spec.compose(each, home) for each in found])


def _mean(networks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    first = networks[0]
    for network in networks[1:]:
        if network.keys() != first.keys():
            raise ShapeError(f"the networks must have the same names; not all have {', '.join(sorted(network.keys() ^ first.keys()))}")
    return {
        name: torch.stack([network[name].to(tensor) for network in networks]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
