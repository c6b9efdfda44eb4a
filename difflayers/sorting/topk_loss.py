r"""Cross-entropy of the top k: a loss that asks for the right class among the first k, not for the first place only.

With :func:`~difflayers.sorting.soft_topk`, a relaxed mask :math:`m_k(x)` of the k largest logits that sums to k, the entry of the right
class y is the degree to which it is among them. For a distribution p over k the loss is

.. math:: -\log \sum_k p_k \, m_k(x)_y .

:math:`m_1` is the softmax here, so k = 1 is the ordinary cross-entropy. For k > 1 the mask is the entropic one, of which no entry is
exactly zero: a class far below the first k still has a gradient. Such a loss forgives: once y is among the first k, it does not
push further. That helps where a single label is not the whole truth: ambiguous images, classes that contain each other, wrong labels.

References: Petersen, Kuehne, Borgelt and Deussen, Differentiable top-k classification learning, ICML 2022 (arXiv:2206.07290): the
mixture over k; Amos, Koltun and Kolter, The limited multi-label projection layer, 2019 (arXiv:1906.08707): the mask; Lapin, Hein and
Schiele, Loss functions for top-k error: analysis and insights, CVPR 2016 (arXiv:1512.00486); Berrada, Zisserman and Kumar, Smooth loss
functions for deep top-k classification, ICLR 2018 (arXiv:1802.07595).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..convex.projections.arguments import check_rows as check_scores
from ..errors import ShapeError
from .arguments import Strength
from .loss_arguments import Reduction, check_count, check_rows, floating, reduced
from .soft_topk import soft_topk

__all__ = ["TopKCrossEntropyLoss", "topk_accuracy", "topk_cross_entropy"]


@torch.no_grad()
def topk_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Is the right class among the k with the largest logits.

    Args:
        logits: ``(*batch, classes)``, floating or integers.
        target: ``(*batch,)``, the index of the right class.
        k: how many classes may be named.

    Returns:
        ``(*batch,)``: 1 or 0 or, where the class is tied with others for the last places, its chance to get one: constant logits
        score k / classes. The mean is the accuracy. A row with a NaN is NaN.

    Raises:
        ShapeError: the shapes do not fit, or target does not hold integers.
        ValueError: k is not within 1 and classes.

    Example:
        >>> import torch
        >>> from difflayers.sorting import topk_accuracy
        >>> topk_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([2, 2]), k=2)
        tensor([1., 0.])
    """
    check_rows(logits, "logits")
    _check_classes(target, logits)
    check_count(k, logits.shape[-1])
    logits = floating(logits)
    right = logits.gather(-1, target.long().unsqueeze(-1))
    above, tied = (logits > right).sum(-1), (logits == right).sum(-1)
    chance = ((k - above) / tied.clamp(min=1)).clamp(0, 1).to(logits.dtype)
    return torch.where(logits.isnan().any(-1), torch.nan, chance)


def topk_cross_entropy(
    logits: Tensor,
    target: Tensor,
    k: int | Mapping[int, float] = 1,
    *,
    regularization_strength: Strength = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Minus the logarithm of the degree to which the right class is among the k largest.

    Args:
        logits: ``(*batch, classes)``, floating.
        target: ``(*batch,)``, the index of the right class.
        k: an integer, or a distribution over them: ``{1: 0.5, 5: 0.5}`` asks in equal parts for the first place and for the first five.
        regularization_strength: ε > 0, relative to the differences of logits; a number, or a tensor ``(*batch,)``. With 1, k = 1 is
            ``torch.nn.functional.cross_entropy``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A number, or ``(*batch,)`` with ``reduction="none"``.

    Raises:
        ShapeError: the shapes do not fit, logits are integers or target is not.
        ValueError: a k is not within 1 and classes, the weights are no distribution, or the reduction is not known.

    Example:
        >>> import torch
        >>> from difflayers.sorting import topk_cross_entropy
        >>> logits, target = torch.tensor([[4.0, 3.0, 0.0, 0.0]]), torch.tensor([1])
        >>> topk_cross_entropy(logits, target)
        tensor(1.3397)
        >>> topk_cross_entropy(logits, target, k=2)
        tensor(0.2425)
        >>> topk_cross_entropy(logits, target, k={1: 0.5, 2: 0.5})
        tensor(0.6476)
    """
    check_scores(logits, "logits", at_least=1)
    _check_classes(target, logits)
    x, right = logits.double(), target.long().unsqueeze(-1)
    strength, scale = regularization_strength, regularization_strength
    if isinstance(strength, Tensor):
        strength = strength.double()
        scale = strength.unsqueeze(-1)
        batch = torch.broadcast_shapes(strength.shape, target.shape)
        x, right = x.expand(*batch, x.shape[-1]), right.expand(*batch, 1)
    terms = []
    for count, weight in _distribution(k, logits.shape[-1]).items():
        if count == 1:
            log_mask = torch.log_softmax(x / scale, -1).gather(-1, right)
        else:
            mask = soft_topk(x, count, regularization="entropic", regularization_strength=strength).gather(-1, right)
            log_mask = mask.clamp(min=torch.finfo(mask.dtype).tiny).log()
        terms.append(math.log(weight) + log_mask)
    return reduced(-torch.logsumexp(torch.cat(terms, -1), -1).to(logits.dtype), reduction)


class TopKCrossEntropyLoss(nn.Module):
    """:func:`topk_cross_entropy` as a module.

    Args:
        k: an integer, or a distribution over them.
        regularization_strength: ε > 0, relative to the differences of logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from difflayers.sorting import TopKCrossEntropyLoss
        >>> TopKCrossEntropyLoss({1: 0.5, 3: 0.5})(torch.zeros(2, 6), torch.tensor([0, 5]))
        tensor(1.0986)
    """

    def __init__(self, k: int | Mapping[int, float] = 1, regularization_strength: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.k = k
        self.regularization_strength = regularization_strength
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: ``(*batch, classes)``.
            target: ``(*batch,)``.
        """
        return topk_cross_entropy(logits, target, self.k, regularization_strength=self.regularization_strength, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"k={self.k}, regularization_strength={self.regularization_strength}, reduction={self.reduction!r}"


def _check_classes(target: Any, logits: Tensor) -> None:
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        came = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise ShapeError(f"target must be a tensor of class indices, got {came}")
    if target.shape != logits.shape[:-1]:
        raise ShapeError(f"target must have the shape {tuple(logits.shape[:-1])} of logits without the classes, got {tuple(target.shape)}")


def _distribution(k: Any, classes: int) -> dict[int, float]:
    """The weights, without those that are zero."""
    if not isinstance(k, Mapping):
        check_count(k, classes)
        return {k: 1.0}
    for count in k:
        check_count(count, classes)
    if any(weight < 0 for weight in k.values()) or not math.isclose(sum(k.values()), 1, abs_tol=1e-6):
        raise ValueError(f"k must be a distribution: weights that are not negative and sum to 1, got {dict(k)}")
    return {count: float(weight) for count, weight in k.items() if weight}
