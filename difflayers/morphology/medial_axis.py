r"""The radius along a skeleton: how far it is from each of its voxels to the background.

A skeleton with its radii is a medial axis: the union of the balls is the shape again, but for its finest detail. With the distance
d(x) to the nearest background voxel,

.. math:: r = s \odot d(x).

d is constant almost everywhere and has no derivative; what flows back goes through the skeleton s.

Reference: Blum, A transformation for extracting new descriptors of shape, 1967; Maurer, Qi and Raghavan, A linear time algorithm for
computing exact Euclidean distance transforms of binary images in arbitrary dimensions, IEEE TPAMI 25 (2003).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError
from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from .arguments import check_images

__all__ = ["skeleton_radius"]


@eager
def skeleton_radius(skeleton: Tensor, image: Tensor, *, spacing: Sequence[float] | None = None) -> Tensor:
    """The distance from each voxel of a skeleton to the background of the image, zero elsewhere.

    Differentiable in the skeleton; the distances have no derivative. Computed by SciPy, on the CPU.

    Args:
        skeleton: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, of :func:`skeletonize` or any other.
        image: of the same shape; what exceeds ½ is foreground, and what is outside is background.
        spacing: the side lengths of a voxel along the last two or three dimensions; None: 1.

    Returns:
        As the skeleton.

    Raises:
        ShapeError: the shapes differ, or are not those of images.
        ValueError: the spacing has another length, or is not positive.

    References:
        Blum, 1967.

    Example:
        >>> import torch
        >>> from difflayers.morphology import skeleton_radius, skeletonize
        >>> bar = torch.ones(1, 1, 3, 9)
        >>> skeleton = skeletonize(bar, probabilistic=False)
        >>> skeleton_radius(skeleton, bar)[0, 0, 1].max()
        tensor(2.)
    """
    ndim = check_images(skeleton, "skeleton")
    if skeleton.shape != image.shape:
        raise ShapeError(f"skeleton and image must have one shape, got {tuple(skeleton.shape)} and {tuple(image.shape)}")
    sides = (1.0,) * ndim if spacing is None else tuple(float(side) for side in spacing)
    if len(sides) != ndim or not all(side > 0 for side in sides):
        raise ValueError(f"spacing must have {ndim} positive numbers, got {spacing}")
    operands = visible_to_modes([image.detach().to(skeleton.dtype)])
    distance = ImplicitFunction.apply(_Distance(ndim, sides), skeleton.new_zeros(0), *operands)[1]
    return skeleton * distance


class _Distance(BroadcastingProblem):
    """Euclidean distances to the background, on plain tensors."""

    def __init__(self, ndim: int, sides: tuple[float, ...], batch_ndim: int = 0) -> None:
        super().__init__(batch_ndim)
        self.core_ndims = (ndim + 2,)
        self.options = (ndim, sides)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        from scipy import ndimage

        (image,), (ndim, sides) = theta, self.options
        masks = (image > 0.5).flatten(0, image.dim() - ndim - 1).cpu().numpy()
        inner = (slice(1, -1),) * ndim
        found = [ndimage.distance_transform_edt(np.pad(mask, 1), sampling=sides)[inner] for mask in masks]
        distance = torch.from_numpy(np.array(found)).to(image).reshape(image.shape)
        return x0.clone(), distance

    def deeper(self, size: int) -> _Distance:
        return _Distance(*self.options, self.batch_ndim + 1)
