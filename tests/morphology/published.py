"""The published definition of the skeleton, restated slowly: convolutions, component counting, a minimum that autograd differentiates."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

__all__ = ["component_numbers", "euler_characteristic", "published_skeleton"]


def published_skeleton(image: Tensor, num_iter: int, detection: str = "Boolean") -> Tensor:
    """Of binary images ``(B, C, H, W)`` or ``(B, C, D, H, W)``."""
    flat = image.flatten(0, 1)[:, None]
    x = functional.pad(flat[:, :, None] if image.dim() == 4 else flat, (1,) * 6)
    kernel = torch.ones(1, 1, 3, 3, 3, dtype=image.dtype)
    kernel[..., 1, 1, 1] = 0
    for _ in range(num_iter):
        end_point = (functional.conv3d(x, kernel, padding=1) <= 1).to(x)
        for last, middle, first in itertools.product((0, 1), repeat=3):
            subfield = (..., slice(first, None, 2), slice(middle, None, 2), slice(last, None, 2))
            candidates = _simple(x, detection) * (1 - end_point)
            new = x.clone()
            new[subfield] = torch.min(x[subfield], (1 - candidates)[subfield])
            x = new
    return x[..., 1:-1, 1:-1, 1:-1].reshape(image.shape)


def component_numbers(neighbourhoods: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For neighbourhoods ``(N, 3, 3, 3)``: the 26-components of the foreground around the voxel in the middle, and the 6-components of
    the background among its 18 neighbours that share a face with it."""
    foreground = neighbourhoods.copy()
    foreground[:, 1, 1, 1] = False
    background = ~neighbourhoods & ndimage.generate_binary_structure(3, 2)
    background[:, 1, 1, 1] = False
    faces = ndimage.generate_binary_structure(3, 1)
    found = []
    for part, structure, of in ((foreground, np.ones((3, 3, 3)), np.ones((3, 3, 3), bool)), (background, faces, faces)):
        labels = ndimage.label(part, np.stack([0 * structure, structure, 0 * structure]))[0][:, of]
        labels.sort(1)
        found.append(((np.diff(labels, axis=1, prepend=0) > 0) & (labels > 0)).sum(1))
    return found[0], found[1]


def euler_characteristic(image: np.ndarray) -> int:
    """Of the union of closed unit cubes: a cell is the tuple of its doubled coordinates, odd along the axes in which it extends."""
    cells = {cell for voxel in np.argwhere(image) for cell in itertools.product(*((2 * i, 2 * i + 1, 2 * i + 2) for i in voxel.tolist()))}
    return sum((-1) ** sum(i % 2 for i in cell) for cell in cells)


def _simple(x: Tensor, detection: str) -> Tensor:
    images = functional.pad(x.detach(), (1,) * 6).numpy() > 0.5
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3, 3), axis=(2, 3, 4)).reshape(-1, 3, 3, 3)
    if detection == "Boolean":
        foreground, background = component_numbers(windows)
        simple = (foreground == 1) & (background == 1)
    else:
        simple = np.array([_keeps_the_characteristic(window.tobytes()) for window in windows])
    return torch.from_numpy(simple).reshape(x.shape).to(x)


@functools.cache
def _keeps_the_characteristic(neighbourhood: bytes) -> bool:
    with_it, without = (np.frombuffer(neighbourhood, dtype=bool).reshape(3, 3, 3).copy() for _ in range(2))
    with_it[1, 1, 1], without[1, 1, 1] = True, False
    return euler_characteristic(with_it) == euler_characteristic(without)
