r"""Normalized discounted cumulative gain, exact as a metric and by soft ranks as a loss.

.. math:: \mathrm{NDCG}_k(s, y) = \frac{\mathrm{DCG}_k(s)}{\max_{s'} \mathrm{DCG}_k(s')}, \qquad
          \mathrm{DCG}_k(s) = \sum_i g(y_i)\, d_k(r_i), \qquad d_k(r) = \frac{[r \le k]}{\log_2(1 + r)},

with the ranks r of the scores, the largest first, the relevances y ≥ 0, and the gain g(y) = y or 2^y − 1. The metric lets tied scores
share the discounts of their places. The loss is 1 − NDCG with soft ranks in the logarithm, and with a soft mask of the k largest scores in
the place of :math:`[r \le k]`. For small regularization it is one minus the metric.

References: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, ACM TOIS 20 (2002); McSherry and Najork, Computing
information retrieval performance measures efficiently in the presence of tied scores, ECIR 2008; Qin, Liu and Li, A general
approximation framework for direct optimization of information retrieval measures, Information Retrieval 13 (2010): soft ranks in the
discount, there by sigmoids, here by :func:`~difflayers.sorting.soft_rank`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..convex.projections.arguments import check_rows as check_scores
from .arguments import Strength, check_choice
from .loss_arguments import Reduction, check_count, check_mask, check_rows, floating, reduced
from .ranks import Regularization, places, soft_rank_masked
from .soft_topk import soft_topk

__all__ = ["NDCGLoss", "ndcg", "ndcg_loss"]

Gains = Literal["linear", "exponential"]


@torch.no_grad()
def ndcg(scores: Tensor, relevance: Tensor, *, k: int | None = None, gains: Gains = "linear", mask: Tensor | None = None) -> Tensor:
    """NDCG of each row; with linear gains ``sklearn.metrics.ndcg_score`` of that row.

    Args:
        scores: ``(*batch, n)``, floating or integers; the largest comes first. Tied scores share their discounts.
        relevance: ``(*batch, n)``, floating or integers, not negative.
        k: only the first k places count; None for all.
        gains: ``"linear"``, g(y) = y, or ``"exponential"``, g(y) = 2^y − 1.
        mask: ``(*batch, n)`` bool, True where an item counts; None for all. Lists of different lengths are padded with False.

    Returns:
        ``(*batch,)``, between 0 and 1. A row without a relevant item is 0; one with a negative relevance or a NaN is NaN.

    Raises:
        ShapeError: the shapes differ.
        ValueError: k is less than 1, or the gains are not known.

    Example:
        >>> import torch
        >>> from difflayers.sorting import ndcg
        >>> relevance = torch.tensor([3.0, 0.0, 1.0])
        >>> ndcg(torch.tensor([0.9, 0.5, 0.1]), relevance)
        tensor(0.9639)
        >>> ndcg(torch.tensor([0.9, 0.5, 0.1]), relevance, k=1)
        tensor(1.)
    """
    check_rows(scores, "scores")
    check_rows(relevance, "relevance", scores, "scores")
    check_mask(mask, scores, "scores")
    scores, gain, ideal = floating(scores), *_gains(relevance, k, gains, mask)
    before, through = places(-scores, mask)
    total = torch.nn.functional.pad(_discount(_ranks(gain), k).cumsum(-1), (1, 0))
    # The mean of the discounts of the places that tied items take together.
    discount = (total[through] - total[before]) / (through - before).clamp(min=1)
    broken = scores.isnan() if mask is None else scores.isnan() & mask
    value = (gain * discount).sum(-1) / ideal
    return torch.where(broken.any(-1), torch.nan, value).to(torch.promote_types(scores.dtype, floating(relevance).dtype))


def ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    k: int | None = None,
    gains: Gains = "linear",
    regularization: Regularization = "l2",
    regularization_strength: Strength = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 − NDCG of each row, with the discounts at the soft ranks of the scores.

    A row without a relevant item has nothing to teach: its loss is 1, its gradient zero. With a small strength the ranks no longer
    move with the scores, and all gradients are zero. So are, with k, those of an item far behind the first k.

    Args:
        scores: ``(*batch, n)``, floating; the largest comes first.
        relevance: ``(*batch, n)``, floating or integers, not negative. It is taken as given: it gets no gradient.
        k: only the first k places count; None for all.
        gains: ``"linear"``, g(y) = y, or ``"exponential"``, g(y) = 2^y − 1.
        regularization: ``"l2"`` or ``"kl"``, see :func:`~difflayers.sorting.soft_rank`.
        regularization_strength: ε > 0, relative to the differences of scores; a number, or a tensor ``(*batch,)``.
        mask: ``(*batch, n)`` bool, True where an item counts; None for all.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the rows.

    Returns:
        A number, or ``(*batch,)`` with ``reduction="none"``. A row with a negative relevance or a NaN is NaN.

    Raises:
        ShapeError: the shapes differ, or the scores are integers.
        ValueError: k is less than 1, or the gains or the reduction are not known.

    Example:
        >>> import torch
        >>> from difflayers.sorting import ndcg_loss
        >>> scores = torch.tensor([0.9, 0.5, 0.1], requires_grad=True)
        >>> loss = ndcg_loss(scores, torch.tensor([3.0, 0.0, 1.0]), regularization_strength=0.5)
        >>> torch.autograd.grad(loss, scores)[0]
        tensor([-0.5395,  0.2980,  0.2416])
    """
    check_scores(scores, "scores", at_least=1)
    check_rows(relevance, "relevance", scores, "scores")
    check_mask(mask, scores, "scores")
    gain, ideal = _gains(relevance, k, gains, mask)
    x = scores.double()
    strength = regularization_strength.double() if isinstance(regularization_strength, Tensor) else regularization_strength
    ranks = soft_rank_masked(x, mask, regularization=regularization, regularization_strength=strength, descending=True)
    discount = _discount(ranks, None)
    if k is not None and k < scores.shape[-1]:
        padded = x if mask is None else torch.where(mask, x, -torch.inf)
        discount = discount * soft_topk(padded, k, regularization_strength=strength)
    value = (gain * discount).sum(-1) / ideal
    return reduced((1 - value).to(scores.dtype), reduction)


class NDCGLoss(nn.Module):
    """:func:`ndcg_loss` as a module.

    Args:
        k: only the first k places count; None for all.
        gains: ``"linear"`` or ``"exponential"``.
        regularization: ``"l2"`` or ``"kl"``.
        regularization_strength: ε > 0, relative to the differences of scores.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from difflayers.sorting import NDCGLoss
        >>> NDCGLoss(regularization_strength=0.1)(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2]))
        tensor(0.)
    """

    def __init__(
        self,
        k: int | None = None,
        gains: Gains = "linear",
        regularization: Regularization = "l2",
        regularization_strength: Strength = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.k = k
        self.gains: Gains = gains
        self.regularization: Regularization = regularization
        self.regularization_strength = regularization_strength
        self.reduction: Reduction = reduction

    def forward(self, scores: Tensor, relevance: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            scores: ``(*batch, n)``.
            relevance: ``(*batch, n)``.
            mask: ``(*batch, n)`` bool or None.
        """
        return ndcg_loss(
            scores,
            relevance,
            k=self.k,
            gains=self.gains,
            regularization=self.regularization,
            regularization_strength=self.regularization_strength,
            mask=mask,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        strength = f"{self.regularization!r}, regularization_strength={self.regularization_strength}"
        return f"k={self.k}, gains={self.gains!r}, regularization={strength}, reduction={self.reduction!r}"


@torch.no_grad()
def _gains(relevance: Tensor, k: int | None, gains: Gains, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gains, zero where an item does not count, and the largest possible DCG ``(*batch,)``, ∞ where nothing is relevant."""
    if k is not None:
        check_count(k)
    check_choice(gains, "gains", ("linear", "exponential"))
    relevance = relevance.double()
    if mask is not None:
        relevance = torch.where(mask, relevance, 0)
    gain = relevance if gains == "linear" else torch.expm1(relevance * torch.log(relevance.new_tensor(2.0)))
    ideal = (gain.sort(-1, descending=True).values * _discount(_ranks(gain), k)).sum(-1)
    broken = ~(relevance >= 0).all(-1)
    return gain, torch.where(broken, torch.nan, torch.where(ideal > 0, ideal, torch.inf))


def _ranks(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)


def _discount(ranks: Tensor, k: int | None) -> Tensor:
    discount = 1 / torch.log2(1 + ranks)
    return discount if k is None else discount * (ranks <= k)
