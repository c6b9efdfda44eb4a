r"""The published form of the differentiable skeleton, restated: convolutions find the simple points, autograd goes through minima.

A voxel with :math:`n_{26}` neighbours in the foreground, :math:`n_{18}` of them at a face or an edge, and :math:`\bar n_6` faces in the
background is simple if one of these holds:

.. math:: \bar n_6 = 1, \qquad n_{26} = 1, \qquad n_{18} = 1 ∧ b_{26} = 0, \qquad
    a_6 = b_{18} = b_{26} = 0 ∧ \bar n_6 - a_{18} + a_{26} = 1.

The counts on the right are of patterns, a convolution each. Background together: :math:`a_{18}` two faces and the edge between them,
:math:`a_{26}` the seven voxels of an octant. Alone among those it touches: :math:`a_6` a face in the background, :math:`b_{18}` an edge and
:math:`b_{26}` a corner in the foreground. They make 49 convolutions for each of eight subfields and each round, and one for the end points.

It is slow by its form, not by this restatement, which spares what it can: convolutions are strided to the subfield and not recorded by
autograd.

References: Menten et al., A skeletonization algorithm for gradient-based optimization, ICCV 2023, arXiv:2309.02527; Bertrand, A Boolean
characterization of three-dimensional simple points, Pattern Recognition Letters 17 (1996).
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["published_skeleton", "simple_points"]

Direction = tuple[int, ...]
_AROUND = [d for d in itertools.product((-1, 0, 1), repeat=3) if any(d)]
_FACES, _EDGES, _CORNERS = ([d for d in _AROUND if sum(map(abs, d)) == order] for order in (1, 2, 3))


def published_skeleton(image: Tensor, num_iter: int) -> Tensor:
    """Of binary images ``(B, C, H, W)``, as volumes of one slice, or ``(B, C, D, H, W)``."""
    flat = image.flatten(0, 1)[:, None]
    x = functional.pad(flat[:, :, None] if image.dim() == 4 else flat, (1,) * 6)
    for _ in range(num_iter):
        with torch.no_grad():
            end_point = functional.conv3d(x, _kernel(dict.fromkeys(_AROUND, 1.0), x.dtype), padding=1) <= 1
        for last, middle, first in itertools.product((0, 1), repeat=3):
            subfield = (..., slice(first, None, 2), slice(middle, None, 2), slice(last, None, 2))
            with torch.no_grad():
                around = functional.pad(x, (1,) * 6)[..., first:, middle:, last:]
                candidates = (simple_points(around) & ~end_point[subfield]).to(x)
            new = x.clone()
            new[subfield] = torch.min(x[subfield], 1 - candidates)
            x = new
    return x[..., 1:-1, 1:-1, 1:-1].reshape(image.shape)


def simple_points(x: Tensor) -> Tensor:
    """Of every second voxel along each axis, beginning with the second and without the last, of volumes ``(B, 1, D, H, W)``."""

    def count(patterns: list[dict[Direction, float]], reached: float) -> Tensor:
        """How many patterns have their sum of weights at ``reached``, which is the most there can be."""
        return torch.stack([functional.conv3d(x, _kernel(p, x.dtype), stride=2) == reached for p in patterns]).sum(0)

    def total(directions: list[Direction]) -> Tensor:
        return functional.conv3d(x, _kernel(dict.fromkeys(directions, 1.0), x.dtype), stride=2)

    background_faces = 6 - total(_FACES)
    n18, n26 = total(_FACES + _EDGES), total(_AROUND)
    a18 = count([dict.fromkeys([edge, *_below(edge)], -1.0) for edge in _EDGES], 0)
    a26 = count([dict.fromkeys([corner, *_below(corner)], -1.0) for corner in _CORNERS], 0)
    a6 = count([{face: -1.0} | dict.fromkeys([e for e in _EDGES if face in _below(e)], 1.0) for face in _FACES], 4)
    b26 = count([{corner: 1.0} | dict.fromkeys(_below(corner), -1.0) for corner in _CORNERS], 1)
    b18 = count([{edge: 1.0} | dict.fromkeys(_touched(edge), -1.0) for edge in _EDGES], 1)
    alone = (a6 == 0) & (b18 == 0) & (b26 == 0)
    return (background_faces == 1) | (n26 == 1) | ((n18 == 1) & (b26 == 0)) | (alone & (background_faces - a18 + a26 == 1))


def _below(voxel: Direction) -> list[Direction]:
    """The faces and edges between a neighbour and the middle: those of its coordinates, some set to zero."""
    return [d for d in _FACES + _EDGES if d != voxel and all(a in (0, b) for a, b in zip(d, voxel, strict=True))]


def _touched(edge: Direction) -> list[Direction]:
    """The faces and edges that an edge touches."""
    return [d for d in _FACES + _EDGES if d != edge and max(abs(a - b) for a, b in zip(d, edge, strict=True)) == 1]


def _kernel(pattern: dict[Direction, float], dtype: torch.dtype) -> Tensor:
    return _cached_kernel(tuple(pattern.items()), dtype)


@functools.cache
def _cached_kernel(pattern: tuple[tuple[Direction, float], ...], dtype: torch.dtype) -> Tensor:
    kernel = torch.zeros(1, 1, 3, 3, 3, dtype=dtype)
    for direction, weight in pattern:
        kernel[(0, 0, *(1 + d for d in direction))] = weight
    return kernel
