r"""Spearman's rank correlation, exact as a metric and by soft ranks as a loss.

.. math:: \rho(s, y) = \frac{\sum_i (r_i - \bar r)(q_i - \bar q)}{\|r - \bar r\| \, \|q - \bar q\|}, \qquad r = \text{ranks of } s,\;
          q = \text{ranks of } y.

The metric takes exact ranks, tied ones averaged. The loss is 1 − ρ with the soft ranks of s, the projection of s/ε on the permutahedron:
differentiable, and for small ε equal to the metric. A correlation does not mind how far soft ranks shrink to their mean, so for
large ε it tends to the linear correlation of s with the ranks of y. Only the order of y matters: an outlier weighs as
much as the largest value, and any increasing function of y is as good as y.

References: Blondel, Teboul, Berthet and Djolonga, Fast differentiable sorting and ranking, ICML 2020 (arXiv:2002.08871);
Spearman, The proof and measurement of association between two things, American Journal of Psychology 15 (1904).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..convex.projections.arguments import check_rows as check_scores
from .arguments import Strength
from .loss_arguments import Reduction, check_mask, check_rows, floating, reduced
from .ranks import Regularization, average_rank, soft_rank_masked

__all__ = ["SpearmanLoss", "spearman", "spearman_loss"]

# Ranks that spread less than this, relative to 1, …, n, are divided by it instead: no 0/0 where all scores are equal.
_LEAST_SPREAD = 1e-3


@torch.no_grad()
def spearman(scores: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation ρ of each row, as ``scipy.stats.spearmanr``: ties have the average of their ranks.

    Args:
        scores: ``(*batch, n)``, floating or integers.
        target: ``(*batch, n)``, the same.
        mask: ``(*batch, n)`` bool, True where an item counts; None for all.

    Returns:
        ``(*batch,)``, between −1 and 1. It is NaN where ρ is not defined: all values of one side are equal, or one of them is NaN.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> import torch
        >>> from difflayers.sorting import spearman
        >>> spearman(torch.tensor([0.1, 0.4, 0.2, 5.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.8000)
    """
    check_rows(scores, "scores")
    check_rows(target, "target", scores, "scores")
    ranks, true_ranks = (_centered(average_rank(x.double(), mask=mask), mask) for x in (scores, target))
    correlation = (ranks * true_ranks).sum(-1) / (_norm(ranks) * _norm(true_ranks))
    return correlation.clamp(-1, 1).to(torch.promote_types(floating(scores).dtype, floating(target).dtype))


def spearman_loss(
    scores: Tensor,
    target: Tensor,
    *,
    regularization: Regularization = "l2",
    regularization_strength: Strength = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 − ρ of each row, with soft ranks of the scores and exact ranks of the target.

    The strength is relative to the differences of scores: at a tenth of the least difference the loss is the metric and flat, at ten
    times the largest it is one minus a linear correlation.

    Where all scores are equal ρ is 0/0. There, and as long as the soft ranks spread less than a thousandth of 1, …, n, they are divided by
    that thousandth: the loss is finite, and its gradient pulls the scores apart. A row with a constant target, or with less than
    two items that count, has nothing to teach: its loss is 1, its gradient zero.

    Args:
        scores: ``(*batch, n)``, floating.
        target: ``(*batch, n)``, floating or integers. Only its order counts, it gets no gradient.
        regularization: ``"l2"`` or ``"kl"``, see :func:`~difflayers.sorting.soft_rank`.
        regularization_strength: ε > 0; a number, or a tensor ``(*batch,)``.
        mask: ``(*batch, n)`` bool, True where an item counts; None for all.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the rows.

    Returns:
        A number, or ``(*batch,)`` with ``reduction="none"``.

    Raises:
        ShapeError: the shapes differ, or the scores are integers.
        ValueError: the reduction is not known.

    Example:
        >>> import torch
        >>> from difflayers.sorting import spearman_loss
        >>> scores = torch.tensor([0.1, 0.4, 0.2, 5.0], requires_grad=True)
        >>> loss = spearman_loss(scores, torch.tensor([1.0, 2.0, 3.0, 400.0]), regularization_strength=0.01)
        >>> loss
        tensor(0.2000, grad_fn=<MeanBackward0>)
    """
    check_scores(scores, "scores", at_least=1)
    check_rows(target, "target", scores, "scores")
    check_mask(mask, scores, "scores")
    x = scores.double()  # the squares of ranks do not fit into half precision
    strength = regularization_strength.double() if isinstance(regularization_strength, Tensor) else regularization_strength
    ranks = soft_rank_masked(x, mask, regularization=regularization, regularization_strength=strength)
    ranks, true_ranks = _centered(ranks, mask), _centered(average_rank(target, mask=mask).to(x), mask)
    count = x.new_tensor(x.shape[-1]) if mask is None else mask.sum(-1).to(x.dtype)
    full = (count * (count.square() - 1) / 12).clamp(min=1)
    spread = ranks.square().sum(-1).clamp(min=_LEAST_SPREAD**2 * full).sqrt()
    true_spread = _norm(true_ranks)
    correlation = (ranks * true_ranks).sum(-1) / (spread * torch.where(true_spread > 0, true_spread, 1))
    return reduced((1 - correlation).to(scores.dtype), reduction)


class SpearmanLoss(nn.Module):
    """:func:`spearman_loss` as a module.

    Args:
        regularization: ``"l2"`` or ``"kl"``.
        regularization_strength: ε > 0, relative to the differences of scores.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from difflayers.sorting import SpearmanLoss
        >>> SpearmanLoss(regularization_strength=0.1)(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3, 2, 1]))
        tensor(2.)
    """

    def __init__(
        self,
        regularization: Regularization = "l2",
        regularization_strength: Strength = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.regularization: Regularization = regularization
        self.regularization_strength = regularization_strength
        self.reduction: Reduction = reduction

    def forward(self, scores: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            scores: ``(*batch, n)``.
            target: ``(*batch, n)``.
            mask: ``(*batch, n)`` bool or None.
        """
        return spearman_loss(
            scores,
            target,
            regularization=self.regularization,
            regularization_strength=self.regularization_strength,
            mask=mask,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.regularization!r}, regularization_strength={self.regularization_strength}, reduction={self.reduction!r}"


def _centered(ranks: Tensor, mask: Tensor | None) -> Tensor:
    """Ranks minus their mean; zero where an item does not count."""
    if mask is None:
        return ranks - ranks.mean(-1, keepdim=True)
    ranks = torch.where(mask, ranks, 0)
    return torch.where(mask, ranks - ranks.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1), 0)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()
