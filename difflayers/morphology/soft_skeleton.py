r"""The soft skeleton of clDice: what openings of ever thinner images remove.

With the erosion ε (the minimum over a cross) and the dilation δ (the maximum over a box of side 3), each the pooling of an image,

.. math:: s_0 = \max(x - δε x, 0), \qquad s_{k+1} = s_k + \max(d - s_k d, 0), \quad d = \max(ε^{k+1} x - δ ε^{k+2} x, 0).

It is made of poolings alone, and autograd differentiates them. But it is no skeleton in the sense of topology: it breaks where a structure
gets wider, and disappears where the rounds are too few. :func:`difflayers.morphology.skeletonize` does not.

Reference: Shit, Paetzold, Sekuboyina, Ezhov, Unger, Zhylka, Pluim, Bauer and Menze, clDice: a novel topology-preserving loss function for
tubular structure segmentation, CVPR 2021, arXiv:2003.07311.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from .arguments import check_count, check_images

__all__ = ["erode", "soft_skeletonize"]


def soft_skeletonize(image: Tensor, *, num_iter: int = 3) -> Tensor:
    """The soft skeleton of each image, of each channel by itself.

    Differentiable almost everywhere. Among voxels that attain a maximum together, the derivative goes to the first.

    Args:
        image: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, in [0, 1].
        num_iter: erosions, at least the largest radius in voxels of the structures.

    Returns:
        As the image.

    Raises:
        ShapeError: the image has another rank, or is not floating.
        ValueError: ``num_iter`` is not an integer of at least 0.

    References:
        Shit et al., CVPR 2021.

    Example:
        >>> import torch
        >>> from difflayers.morphology import soft_skeletonize
        >>> bar = torch.zeros(1, 1, 5, 7)
        >>> bar[..., 1:4, 1:6] = 1
        >>> soft_skeletonize(bar)[0, 0].int()
        tensor([[0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0],
                [0, 0, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    check_images(image)
    check_count(num_iter, "num_iter")
    eroded = erode(image)
    skeleton = torch.relu(image - _dilate(eroded))
    for _ in range(num_iter):
        image, eroded = eroded, erode(eroded)
        lost = torch.relu(image - _dilate(eroded))
        skeleton = skeleton + torch.relu(lost - skeleton * lost)
    return skeleton


def erode(image: Tensor) -> Tensor:
    """The minimum over each voxel and the neighbours that share a face with it."""
    ndim = image.dim() - 2
    lines = [tuple(3 if i == axis else 1 for i in range(ndim)) for axis in range(ndim)]
    return functools.reduce(torch.minimum, (-_pool(-image, line) for line in lines))


def _dilate(image: Tensor) -> Tensor:
    return _pool(image, (3,) * (image.dim() - 2))


def _pool(image: Tensor, size: tuple[int, ...]) -> Tensor:
    pool = functional.max_pool2d if len(size) == 2 else functional.max_pool3d
    return pool(image, size, stride=1, padding=tuple(side // 2 for side in size))
