r"""Cross-entropy between a relaxed permutation matrix and the true order, and how often that order is met.

With a relaxed P from a sorting network, from SoftSort, NeuralSort or Sinkhorn, and the matrix T of the true order, in the convention
values = x P (entry i, j is the weight of input i in output j), there are two losses:

.. math:: -\frac1{n^2} \sum_{ij} T_{ij} \log P_{ij} + (1 - T_{ij}) \log(1 - P_{ij}) \quad\text{(binary)}, \qquad
          -\frac1n \sum_{ij} T_{ij} \log P_{ij} \quad\text{(categorical)}.

The binary one, each entry on its own, is that of the papers on differentiable sorting networks. The categorical one is that of
NeuralSort and SoftSort. Column by column, "which input belongs here", or row by row, "where does this input belong": it is the same sum.

**At 0 and 1.** The logarithm is taken down to the machine epsilon of P's dtype, and goes on below along its tangent there. So exact
zeros and ones, and entries outside of [0, 1] by rounding, have a finite loss and a gradient of at most 1/epsilon that points the
right way.

References: Petersen, Borgelt, Kuehne and Deussen, Differentiable sorting networks for scalable sorting and ranking supervision, ICML 2021
(arXiv:2105.04019); Grover, Wang, Zweig and Ermon, Stochastic optimization of sorting networks via continuous relaxations, ICLR 2019
(arXiv:1903.08850); Prillo and Eisenschlos, SoftSort, ICML 2020 (arXiv:2006.16038).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .arguments import check_choice
from .loss_arguments import Reduction, check_rows, floating, reduced
from .ranks import places

__all__ = [
    "PermutationAccuracy",
    "PermutationCrossEntropyLoss",
    "permutation_accuracy",
    "permutation_cross_entropy",
    "permutation_matrix",
]

Form = Literal["binary", "categorical"]


class PermutationAccuracy(NamedTuple):
    """What :func:`permutation_accuracy` returns, each ``(*batch,)``."""

    exact_match: Tensor
    element_wise: Tensor


@torch.no_grad()
def permutation_matrix(x: Tensor, *, descending: bool = False) -> Tensor:
    """The matrix P that sorts x: x @ P is sorted. Relaxed permutations tend to it.

    Tied entries share their places in equal parts, so the matrix does not depend on the order of the input. It is then doubly stochastic,
    and no permutation.

    Args:
        x: ``(*batch, n)``, floating or integers.
        descending: from the largest to the smallest.

    Returns:
        ``(*batch, n, n)``, of x's dtype; float64 for integers. It is NaN where the row has a NaN.

    Raises:
        ShapeError: x is not a tensor of rows.

    Example:
        >>> import torch
        >>> from difflayers.sorting import permutation_matrix
        >>> permutation_matrix(torch.tensor([0.3, 0.1, 0.3]))
        tensor([[0.0000, 0.5000, 0.5000],
                [1.0000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    check_rows(x, "x")
    x = floating(x)
    before, through = (place.unsqueeze(-1) for place in places(-x if descending else x))
    place = torch.arange(x.shape[-1], device=x.device)
    share = ((before <= place) & (place < through)) / (through - before).to(x.dtype)
    return torch.where(x.isnan().any(-1)[..., None, None], torch.nan, share)


def permutation_cross_entropy(
    permutation: Tensor,
    target: Tensor,
    *,
    form: Form = "binary",
    descending: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of a relaxed permutation matrix, relative to the true order.

    Args:
        permutation: P, ``(*batch, n, n)``, floating, with ``values == x @ permutation``.
        target: the true values or ranks ``(*batch, n)``, whose :func:`permutation_matrix` is T (equal values share their places), or T
            itself ``(*batch, n, n)``, a permutation or doubly stochastic. Floating or integers.
        form: ``"binary"``, the mean over n² entries, or ``"categorical"``, the mean over n places.
        descending: P sorts from the largest to the smallest. It concerns only a target of values or ranks.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the batch.

    Returns:
        A number, or ``(*batch,)`` with ``reduction="none"``.

    Raises:
        ShapeError: the shapes do not fit each other, or P holds integers.
        ValueError: the form or the reduction is not known.

    Example:
        >>> import torch
        >>> from difflayers.sorting import permutation_cross_entropy
        >>> P = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        >>> permutation_cross_entropy(P, torch.tensor([3, 5]))
        tensor(0.2231)
        >>> permutation_cross_entropy(P, torch.tensor([5, 3]), form="categorical")
        tensor(1.6094)
    """
    _check_matrix(permutation)
    check_choice(form, "form", ("binary", "categorical"))
    if isinstance(target, Tensor) and target.shape == permutation.shape[:-1]:
        target = permutation_matrix(target, descending=descending)
    elif not isinstance(target, Tensor) or target.shape != permutation.shape:
        came = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        shape = tuple(permutation.shape)
        raise ShapeError(f"target must have the shape {shape[:-1]} of values or {shape} of a permutation, got {came}")
    target = target.to(permutation.dtype)
    loss = -target * _log(permutation)
    if form == "binary":
        loss = loss - (1 - target) * _log(1 - permutation)
    size = permutation.shape[-1]
    return reduced(loss.sum((-2, -1)) / (size**2 if form == "binary" else size), reduction)


class PermutationCrossEntropyLoss(nn.Module):
    """:func:`permutation_cross_entropy` as a module.

    Args:
        form: ``"binary"`` or ``"categorical"``.
        descending: P sorts from the largest to the smallest.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from difflayers.sorting import PermutationCrossEntropyLoss
        >>> PermutationCrossEntropyLoss("categorical")(torch.full((2, 2), 0.5), torch.tensor([1.0, 2.0]))
        tensor(0.6931)
    """

    def __init__(self, form: Form = "binary", descending: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.form: Form = form
        self.descending = descending
        self.reduction: Reduction = reduction

    def forward(self, permutation: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            permutation: ``(*batch, n, n)``.
            target: ``(*batch, n)`` or ``(*batch, n, n)``.
        """
        return permutation_cross_entropy(permutation, target, form=self.form, descending=self.descending, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.form!r}, descending={self.descending}, reduction={self.reduction!r}"


@torch.no_grad()
def permutation_accuracy(prediction: Tensor, target: Tensor, *, descending: bool = False) -> PermutationAccuracy:
    """Is the order right: as a whole, and at how many positions.

    A prediction puts one input at each position: the order of the scores, or the largest entry of each column of a relaxed permutation
    matrix. A position is right if the value of that input is the one that belongs there, so tied values are interchangeable.
    Equal scores are taken in the order of the input.

    Args:
        prediction: scores ``(*batch, n)``, or a matrix ``(*batch, n, n)`` with ``values == x @ permutation``.
        target: ``(*batch, n)``, the true values or ranks, floating or integers.
        descending: the matrix sorts from the largest to the smallest. It makes no difference to scores.

    Returns:
        ``exact_match``, 1 where all positions are right, else 0, and ``element_wise``, the share of right positions; NaN where the
        prediction or the target has a NaN.

    Raises:
        ShapeError: the shapes do not fit each other.

    Example:
        >>> import torch
        >>> from difflayers.sorting import permutation_accuracy
        >>> permutation_accuracy(torch.tensor([0.1, 0.8, 0.9, 0.5]), torch.tensor([3, 41, 40, 8]))
        PermutationAccuracy(exact_match=tensor(0.), element_wise=tensor(0.5000))
    """
    check_rows(target, "target")
    check_rows(prediction, "prediction")
    matrix = prediction.shape == (*target.shape, target.shape[-1])
    if not matrix and prediction.shape != target.shape:
        shape = tuple(target.shape)
        wanted = f"{shape} of scores or {(*shape, shape[-1])} of a permutation"
        raise ShapeError(f"prediction must have the shape {wanted}, got {tuple(prediction.shape)}")
    prediction = floating(prediction)
    order = prediction.argmax(-2) if matrix else prediction.argsort(dim=-1, stable=True)
    right = target.gather(-1, order) == target.sort(dim=-1, descending=descending and matrix).values
    broken = prediction.isnan().flatten(-2 if matrix else -1).any(-1) | target.isnan().any(-1)
    exact, share = right.all(-1).to(prediction.dtype), right.to(prediction.dtype).mean(-1)
    return PermutationAccuracy(torch.where(broken, torch.nan, exact), torch.where(broken, torch.nan, share))


def _check_matrix(permutation: Any) -> None:
    if not isinstance(permutation, Tensor) or not permutation.is_floating_point():
        came = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise ShapeError(f"permutation must be a floating tensor, got {came}")
    shape = permutation.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ShapeError(f"permutation must have the shape (*batch, n, n) with n of at least 1, got {tuple(shape)}")


def _log(p: Tensor) -> Tensor:
    """log p, below the machine epsilon along the tangent there."""
    least = torch.finfo(p.dtype).eps
    return torch.where(p < least, math.log(least) + p / least - 1, p.clamp(min=least).log())
