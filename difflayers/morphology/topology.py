r"""Betti numbers of binary images: how many components, tunnels and cavities the foreground has.

In the plane b₀ counts components and b₁ holes; in space b₁ counts tunnels and b₂ cavities. Components are labelled, of the foreground for
b₀ and of the background, connected the other way, for holes and cavities; the outside is background. In space b₁ follows from the Euler
characteristic,

.. math:: χ = b_0 - b_1 + b_2 = \sum_i (-1)^i n_i,

where :math:`n_i` counts the cells of dimension i: of the union of closed unit cubes when voxels that share a corner touch (8, 26), and of
the complex with a vertex for each voxel when only those that share a face do (4, 6).

Reference: Kong and Rosenfeld, Digital topology: introduction and survey, Computer Vision, Graphics, and Image Processing 48 (1989).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError
from .arguments import check_images

__all__ = ["betti_error", "betti_numbers"]


def betti_numbers(image: Tensor, *, adjacency: int | None = None) -> Tensor:
    """The Betti numbers of each image, of each channel by itself. They have no derivative.

    Args:
        image: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, of any dtype; what exceeds ½ is foreground.
        adjacency: how the foreground is connected: 8 or 4 in the plane, 26 or 6 in space, the background being connected the other way.
            None: 8 and 26, as :func:`skeletonize` does.

    Returns:
        ``(B, C, 2)`` of components and holes, or ``(B, C, 3)`` of components, tunnels and cavities; int64.

    Raises:
        ShapeError: the image has another rank.
        ValueError: the adjacency is not one of its space.

    Example:
        >>> import torch
        >>> from difflayers.morphology import betti_numbers
        >>> ring = torch.ones(1, 1, 3, 3)
        >>> ring[..., 1, 1] = 0
        >>> betti_numbers(ring)
        tensor([[[1, 1]]])
    """
    ndim = check_images(image, floating=False)
    full, face = 3**ndim - 1, 2 * ndim
    if adjacency not in (None, full, face):
        raise ValueError(f"adjacency must be {full} or {face} in {ndim} dimensions, got {adjacency!r}")
    binary = (image.detach() if image.is_floating_point() else image) > 0.5
    batch = binary.cpu().numpy().reshape(-1, *image.shape[2:])
    numbers = [_betti_numbers(each, adjacency == face) for each in batch]
    return torch.tensor(numbers, dtype=torch.int64, device=image.device).reshape(*image.shape[:2], ndim)


def betti_error(prediction: Tensor, target: Tensor, *, adjacency: int | None = None) -> Tensor:
    """By how much the Betti numbers of two images differ, summed over the dimensions.

    Args:
        prediction: ``(B, C, H, W)`` or ``(B, C, D, H, W)``; what exceeds ½ is foreground.
        target: of the same shape.
        adjacency: see :func:`betti_numbers`.

    Returns:
        ``(B, C)``, int64. Its ``.float().mean()`` is the Betti error of a data set; cut into patches, images tell where the errors are.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> import torch
        >>> from difflayers.morphology import betti_error
        >>> ring = torch.ones(1, 1, 3, 3)
        >>> ring[..., 1, 1] = 0
        >>> betti_error(torch.ones(1, 1, 3, 3), ring)
        tensor([[1]])
    """
    if prediction.shape != target.shape:
        raise ShapeError(f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    difference = betti_numbers(prediction, adjacency=adjacency) - betti_numbers(target, adjacency=adjacency).to(prediction.device)
    return difference.abs().sum(-1)


def _betti_numbers(image: Any, by_faces: bool) -> list[int]:
    from scipy import ndimage

    faces, full = (ndimage.generate_binary_structure(image.ndim, order) for order in (1, image.ndim))
    image = np.pad(image, 1)
    components = ndimage.label(image, faces if by_faces else full)[1]
    enclosed = ndimage.label(~image, full if by_faces else faces)[1] - 1
    if image.ndim == 2:
        return [components, enclosed]
    return [components, components + enclosed - _euler_characteristic(image, by_faces), enclosed]


def _euler_characteristic(image: Any, by_faces: bool) -> int:
    # Along each axis a cell is either in one layer or between two. Between two there is a vertex of cubes (one of them is there), or an
    # edge between voxels (both are).
    total, meet = 0, np.logical_and if by_faces else np.logical_or
    for between in itertools.product((False, True), repeat=image.ndim):
        cells = image
        for axis, yes in enumerate(between):
            if yes:
                cells = meet(cells.take(range(1, cells.shape[axis]), axis), cells.take(range(cells.shape[axis] - 1), axis))
        dimension = sum(between) if by_faces else image.ndim - sum(between)
        total += (-1) ** dimension * int(cells.sum())
    return total
