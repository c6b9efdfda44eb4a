"""What multiplies the differences in a total variation: λ for a sequence or image, and a weight for each difference or pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...convex.projections.arguments import Number, check_parameter
from ...errors import ShapeError
from .arguments import row_weight

__all__ = ["difference_weights"]


def difference_weights(x: Tensor, lam: Number, weights: Tensor | None, core: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
    """The batch, and λ times the weights in float64, NaN where one of them is negative.

    Args:
        x: ``(*batch, *point)``, with as many dimensions in a point as in ``core``.
        lam: a number or ``(*batch,)``.
        weights: ``(*batch, *core)`` or None.
        core: the sizes of the weights.

    Returns:
        The batch that all of them broadcast to, and ``(*batch, *core)``.

    Raises:
        ShapeError: shapes or dtypes do not fit.
        ValueError: λ is a negative number.
    """
    w = row_weight(lam, "lam", x, core_ndim=len(core))
    lead = torch.broadcast_shapes(x.shape[: x.dim() - len(core)], w.shape[: w.dim() - len(core)])
    refused = w.detach() < 0
    if weights is not None:
        each = check_parameter(weights, "weights", x, core)
        try:
            lead = torch.broadcast_shapes(lead, each.shape[: each.dim() - len(core)])
        except RuntimeError as error:
            raise ShapeError(f"batch dimensions of x and weights do not broadcast: {tuple(x.shape)}, {tuple(each.shape)}") from error
        w, refused = w * each, refused | (each.detach() < 0)
    return tuple(lead), torch.where(refused, torch.nan, w).to(torch.float64).expand(*lead, *core)
