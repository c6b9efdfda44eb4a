r"""Skeleton recall: how much of the target's skeleton does a prediction cover?

.. math:: L = 1 - \frac{⟨P, \hat s_T⟩}{|\hat s_T|}

with :math:`\hat s_T` the target's skeleton, thickened a little within the target. Only the target is made a skeleton, which needs no
derivative and can be done once for a data set: the loss costs no more than a Dice loss. Alone it would like a prediction of ones, so it is
added to a loss that does not.

Reference: Kirchhoff, Rokuss, Roy, Kovacs, Ulrich, Wald, Zenk, Vollmuth, Kleesiek, Isensee and Maier-Hein, Skeleton recall loss for
connectivity conserving and resource efficient segmentation of thin tubular structures, ECCV 2024, arXiv:2404.03010.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .arguments import check_count
from .segmentation_loss import SegmentationLoss
from .skeletonize import skeletonize
from .soft_skeleton import erode

__all__ = ["SkeletonRecallLoss"]


class SkeletonRecallLoss(SegmentationLoss):
    """1 − recall on the target's thickened skeleton, one number an image: the mean over its channels.

    Args:
        radius: steps to the nearest faces by which the skeleton is thickened; it stays within the target.
        smooth: added to numerator and denominator of the recall. A channel with an empty target costs nothing.
        include_background: whether channel 0 counts.
        to_onehot_y: the target holds class indices ``(B, 1, ...)``.
        sigmoid: the input holds logits of independent channels.
        softmax: the input holds logits of exclusive classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is out of range.

    References:
        Kirchhoff et al., ECCV 2024.

    Example:
        >>> import torch
        >>> from difflayers.morphology import SkeletonRecallLoss
        >>> target = torch.zeros(1, 1, 9, 9)
        >>> target[..., 4, :] = 1
        >>> SkeletonRecallLoss(smooth=0.0)(0.75 * torch.ones(1, 1, 9, 9), target)
        tensor(0.2500)
    """

    def __init__(
        self,
        *,
        radius: int = 2,
        smooth: float = 1.0,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(
            include_background=include_background, to_onehot_y=to_onehot_y, sigmoid=sigmoid, softmax=softmax, reduction=reduction
        )
        check_count(radius, "radius")
        if smooth < 0:
            raise ValueError(f"smooth must not be negative, got {smooth}")
        self.radius, self.smooth = radius, smooth

    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``(B,)`` of probabilities and a target ``(B, C, ...)``."""
        mask = (target.detach() > 0.5).to(target)
        tube = skeletonize(mask, probabilistic=False, num_iter=None, gradient="mask")
        for _ in range(self.radius):
            tube = -erode(-tube) * mask
        missed, length = ((1 - prediction) * tube).flatten(2).sum(2), tube.flatten(2).sum(2)
        return (missed / (length + self.smooth).clamp(min=torch.finfo(length.dtype).tiny)).mean(1)
