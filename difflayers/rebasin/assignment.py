"""The linear assignment problem between the units of two networks, and the rows of the weights that it compares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .spec import Occurrence

__all__ = ["assign", "rows"]


def assign(similarity: Tensor) -> Tensor:
    """The permutation with the largest ``similarity[i, permutation[i]].sum()``, int64 ``(n,)`` on the CPU.

    Args:
        similarity: ``(n, n)``, without NaN.
    """
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)[1]).to(torch.int64)


def rows(params: Mapping[str, Tensor], at: Occurrence) -> Tensor:
    """``(n, K)``: row i holds all the entries of the weight that belong to unit i there.

    Args:
        params: name → weight.
        at: where the group touches it.
    """
    tensor = params[at.name].movedim(at.dim, 0)
    if at.positions.shape != (len(tensor), 1):  # else the dimension is the group, entry by entry
        tensor = tensor[at.positions.to(tensor.device)]
    return tensor.reshape(len(tensor), -1)
