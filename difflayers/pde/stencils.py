r"""The weights of finite differences.

.. math:: u^{(m)}(x) \approx \sum_j w_j\, u(x + d_j), \qquad w_j = m!\,[t^m] \prod_{i \ne j} \frac{t - d_i}{d_j - d_i},

where :math:`[t^m]` takes a coefficient: the derivative of the polynomial through the s points. It is exact for degrees below s. Offsets
that are numbers are treated in rational arithmetic, and their weights rounded once and kept; offsets in a tensor by ordinary operations,
so that the weights can be differentiated.

Reference: Fornberg, Generation of finite difference formulas on arbitrarily spaced grids, Mathematics of Computation 51 (1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ShapeError

__all__ = ["finite_difference_weights", "rounded_weights"]


def finite_difference_weights(offsets: Tensor | Sequence[float], order: int) -> Tensor:
    """The weights of values at x + offsets in the derivative at x: exact on polynomials of lower degree than there are offsets.

    Args:
        offsets: numbers, for weights correct to the last digit; or a floating tensor ``(*batch, s)``, for weights that can be
            differentiated. All of them different.
        order: of the derivative, from 0 (interpolation) to s − 1.

    Returns:
        ``(*batch, s)``; float64 if the offsets are numbers.

    Raises:
        ShapeError: too few offsets, or not floating.
        ValueError: two offsets (given as numbers) are the same.

    Example:
        >>> from difflayers.pde import finite_difference_weights
        >>> finite_difference_weights([0, 1, 2], 1)
        tensor([-1.5000,  2.0000, -0.5000], dtype=torch.float64)
    """
    if isinstance(offsets, Tensor) and not offsets.is_floating_point():
        raise ShapeError(f"offsets must be numbers or a floating tensor, got {offsets.dtype}")
    count = offsets.shape[-1] if isinstance(offsets, Tensor) else len(offsets)
    if not 0 <= order < count:
        raise ShapeError(f"the derivative of order {order} takes at least {order + 1} offsets, got {count}")
    if not isinstance(offsets, Tensor):
        return torch.tensor(rounded_weights(tuple(offsets), order), dtype=torch.float64)
    # For each j the coefficients of the product over i ≠ j, one factor after the other; those beyond t^m are not needed.
    own = torch.eye(count, dtype=torch.bool, device=offsets.device)
    distance = torch.where(own, 1, offsets.unsqueeze(-1) - offsets.unsqueeze(-2)).prod(-1)
    slopes, roots = (~own).to(offsets.dtype), torch.where(own, -1, offsets.unsqueeze(-2))
    product = torch.nn.functional.pad(torch.ones_like(offsets).unsqueeze(-1), (0, order))
    for slope, root in zip(slopes.unbind(-1), roots.unbind(-1), strict=True):
        product = slope.unsqueeze(-1) * torch.nn.functional.pad(product[..., :-1], (1, 0)) - root.unsqueeze(-1) * product
    return math.factorial(order) * product[..., order] / distance


def rounded_weights(offsets: Sequence[float], order: int) -> tuple[float, ...]:
    """The weights of :func:`finite_difference_weights` in rational arithmetic, rounded once.

    Args:
        offsets: hashable; numbers.
        order: of the derivative.

    Raises:
        ValueError: two offsets are the same.
    """
    return _rational_weights(offsets, order)


# To torch.compile a constant. This is all that torch.compiler.assume_constant_result does, but for importing the compiler.
vars(rounded_weights)["_dynamo_marked_constant"] = True


@lru_cache(maxsize=1024)
def _rational_weights(offsets: Sequence[float], order: int) -> tuple[float, ...]:
    d = [Fraction(offset) for offset in offsets]
    if len(set(d)) < len(d):
        raise ValueError(f"the offsets must differ from each other, got {list(offsets)}")
    weights = []
    for j, own in enumerate(d):
        coefficients = [Fraction(1)]
        for other in d[:j] + d[j + 1 :]:
            coefficients = [
                (before - other * here) / (own - other)
                for before, here in zip([Fraction(0), *coefficients], [*coefficients, Fraction(0)], strict=True)
            ]
        weights.append(float(math.factorial(order) * coefficients[order]))
    return tuple(weights)
