r"""clDice: do the skeletons of two segmentations lie in each other?

With the skeletons :math:`s_P, s_T` of a prediction P and a target T,

.. math::
    \text{precision} = \frac{⟨s_P, T⟩}{|s_P|}, \qquad \text{sensitivity} = \frac{⟨s_T, P⟩}{|s_T|}, \qquad
    \text{clDice} = 2\, \frac{\text{precision} · \text{sensitivity}}{\text{precision} + \text{sensitivity}}.

A broken vessel costs as many voxels of a skeleton as the gap is long, however thin the vessel is. The loss, 1 − clDice of probabilities,
takes the skeletons from any function of images that gradients pass through; the score takes exact ones.

Reference: Shit, Paetzold, Sekuboyina, Ezhov, Unger, Zhylka, Pluim, Bauer and Menze, clDice: a novel topology-preserving loss function for
tubular structure segmentation, CVPR 2021, arXiv:2003.07311.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..errors import ShapeError
from .arguments import check_count, check_images
from .segmentation_loss import SegmentationLoss
from .skeletonize import skeletonize
from .soft_skeleton import soft_skeletonize

__all__ = ["SoftCLDiceLoss", "cldice_score"]


class SoftCLDiceLoss(SegmentationLoss):
    """1 − clDice of probabilities, one number an image, over all its channels.

    The names and defaults, and with them the values, are those of MONAI's ``SoftclDiceLoss``.

    Args:
        skeletonizer: ``images -> skeletons``, applied to the prediction and to the target, such as ``Skeletonize(num_iter=10)``. None:
            :func:`soft_skeletonize`.
        iter_: rounds of the soft skeleton; not with a ``skeletonizer``, which has its own.
        smooth_nr: added to both numerators.
        smooth_dr: added to both denominators.
        smooth: added to the denominator of the harmonic mean.
        include_background: whether channel 0 counts.
        to_onehot_y: the target holds class indices ``(B, 1, ...)``.
        sigmoid: the input holds logits of independent channels.
        softmax: the input holds logits of exclusive classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is out of range.

    References:
        Shit et al., CVPR 2021.

    Example:
        >>> import torch
        >>> from difflayers.morphology import Skeletonize, SoftCLDiceLoss
        >>> target = torch.zeros(1, 1, 9, 9)
        >>> target[..., 3:6, :] = 1
        >>> broken = target.clone()
        >>> broken[..., 4:6] = 0
        >>> skeleton = Skeletonize(probabilistic=False)
        >>> float(SoftCLDiceLoss(skeleton)(target, target)) < 1e-4 < float(SoftCLDiceLoss(skeleton)(broken, target))
        True
    """

    def __init__(
        self,
        skeletonizer: Callable[[Tensor], Tensor] | None = None,
        *,
        iter_: int = 3,
        smooth_nr: float = 1.0,
        smooth_dr: float = 1.0,
        smooth: float = 1e-4,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(
            include_background=include_background, to_onehot_y=to_onehot_y, sigmoid=sigmoid, softmax=softmax, reduction=reduction
        )
        check_count(iter_, "iter_")
        if not (smooth_nr >= 0 and smooth_dr > 0 and smooth > 0):
            raise ValueError(f"smooth_nr must not be negative, smooth_dr and smooth positive, got {smooth_nr}, {smooth_dr} and {smooth}")
        self.skeletonizer = functools.partial(soft_skeletonize, num_iter=iter_) if skeletonizer is None else skeletonizer
        self.smooth_nr, self.smooth_dr, self.smooth = smooth_nr, smooth_dr, smooth

    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``(B,)`` of probabilities and a target ``(B, C, ...)``."""
        precision = self._share(self.skeletonizer(prediction), target)
        sensitivity = self._share(self.skeletonizer(target), prediction)
        return 1 - 2 * precision * sensitivity / (precision + sensitivity + self.smooth)

    def _share(self, skeleton: Tensor, mask: Tensor) -> Tensor:
        return ((skeleton * mask).flatten(1).sum(1) + self.smooth_nr) / (skeleton.flatten(1).sum(1) + self.smooth_dr)


def cldice_score(prediction: Tensor, target: Tensor) -> Tensor:
    """clDice of binary images, with exact skeletons. It has no derivative.

    Args:
        prediction: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, of any dtype; what exceeds ½ is foreground.
        target: of the same shape.

    Returns:
        ``(B, C)``, float32, in [0, 1]: 1 where both are empty, 0 where one is.

    Raises:
        ShapeError: the shapes differ, or are not those of images.

    References:
        Shit et al., CVPR 2021.

    Example:
        >>> import torch
        >>> from difflayers.morphology import cldice_score
        >>> line, half = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8)
        >>> line[..., 2, :], half[..., 2, :4] = 1, 1
        >>> cldice_score(half, line)
        tensor([[0.6667]])
    """
    check_images(prediction, "prediction", floating=False)
    if prediction.shape != target.shape:
        raise ShapeError(f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    masks = [(image.detach() > 0.5).float() for image in (prediction, target)]
    skeletons = [skeletonize(mask, probabilistic=False, num_iter=None, gradient="mask") for mask in masks]
    shares = []
    for skeleton, mask in zip(skeletons, reversed(masks), strict=True):
        length = skeleton.flatten(2).sum(2)
        shares.append(torch.where(length > 0, (skeleton * mask).flatten(2).sum(2) / length.clamp(min=1), 1.0))
    precision, sensitivity = shares
    return 2 * precision * sensitivity / (precision + sensitivity).clamp(min=torch.finfo(torch.float32).tiny)
