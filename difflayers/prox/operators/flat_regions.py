r"""The regions on which a denoised image is flat, and the smooth problem that is left between them.

Let the differences at some pixels be zero. The pixels that they connect are regions, P averages over regions, and the free pixels p, whose
differences :math:`g_p = (D u)_p` cross a border, have a smooth length. The solution is the root :math:`u = P u` of

.. math:: u - P \Bigl( x - D^T \frac{w g}{\|g\|} \Bigr) = 0, \qquad A = I + P H P, \quad
   H = D^T \frac{w}{\|g\|} \Bigl( I - \frac{g g^T}{\|g\|^2} \Bigr) D.

A is the identity plus a positive semidefinite matrix, sparse in the values of the regions, and factorized there for all images at once. If
every difference has a length of its own (the anisotropic norm), H is zero.

Newton's method sharpens what a first-order method has found until the equation holds to rounding; a pixel whose differences
turn round on the way is flat.

Reference: Vaiter, Deledalle, Fadili, Peyré and Dossal, The degrees of freedom of partly smooth regularizers, Annals of the Institute of
Statistical Mathematics 69 (2017), arXiv:1404.5557.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Curvature", "regions", "sharpen"]

_STEPS = 40
_HALVINGS = 12
_FLAT = 1e-9  # beside the range of the image: differences this small are zero
_EXACT = 1e-13  # beside the norm of the image: a residual this small is rounding


def regions(flat: np.ndarray) -> np.ndarray:
    """For each pixel the first one of its region.

    Args:
        flat: ``(N, 2, H, W)`` bool, the differences that are zero.

    Returns:
        ``(N, H * W)`` indices of pixels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, _, height, width = flat.shape
    pixel = np.arange(count * height * width).reshape(count, height, width)
    across, down = flat[:, 0, :, :-1], flat[:, 1, :-1]
    heads = np.concatenate([pixel[:, :, :-1][across], pixel[:, :-1][down]])
    tails = np.concatenate([pixel[:, :, 1:][across], pixel[:, 1:][down]])
    graph = coo_array((np.ones(len(heads), dtype=bool), (heads, tails)), shape=(pixel.size, pixel.size))
    number, label = connected_components(graph, directed=False)
    first = np.empty(number, dtype=np.int64)
    first[label[::-1]] = pixel.ravel()[::-1]
    return (first[label] % max(height * width, 1)).reshape(count, height * width)


def sharpen(x: np.ndarray, w: np.ndarray, u: np.ndarray, flat: np.ndarray, isotropic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The solution whose flat differences are those in ``flat``, or more, from a u that is near.

    Args:
        x: ``(N, H, W)``.
        w: ``(N, 1, H, W)``, or ``(N, 2, H, W)`` if not isotropic.
        u: ``(N, H, W)``.
        flat: like w, bool.
        isotropic: whether the two differences at a pixel have one length.

    Returns:
        u, the regions ``(N, H * W)``, and what is free, bool like w.
    """
    flat, scale = flat.copy(), np.ptp(x, axis=(1, 2))[:, None, None, None]
    goal = _EXACT * np.sqrt(np.square(x).sum((1, 2)))
    labels = regions(np.broadcast_to(flat, (len(x), 2, *x.shape[1:])))
    for _ in range(_STEPS):
        u = _averaged(u, labels)
        d = _differences(u)
        size = _lengths(d, isotropic)
        free = size > _FLAT * scale
        slope = w * d / np.where(free, size, 1) * free
        miss = u - _averaged(x - _adjoint(slope), labels)
        open_ = np.sqrt(np.square(miss).sum((1, 2))) > goal
        if not open_.any():
            break
        step = -(Curvature(u, w, labels, free).solve(miss.reshape(-1, 1)).reshape(x.shape) if isotropic else miss) * open_[:, None, None]
        if isotropic:
            step *= _step_length(x, w, u, step, (step * miss).sum((1, 2)))[:, None, None]
        moved = _differences(u + step)
        turned = (d * moved).sum(1, keepdims=True) <= 0 if isotropic else d * moved <= 0
        turned &= free
        turned |= ~flat & (_lengths(moved, isotropic) <= _FLAT * scale)
        turned &= ~flat
        if not isotropic:
            # Between two turns the energy is quadratic: the step is exact, and taken once nothing turns on it.
            step *= np.logical_not(turned.any(axis=(1, 2, 3))).reshape(-1, 1, 1)
        u = u + step
        if turned.any():
            flat |= turned
            labels = regions(np.broadcast_to(flat, (len(x), 2, *x.shape[1:])))
    u = _averaged(u, labels)
    return u, labels, _lengths(_differences(u), isotropic) > _FLAT * scale


class Curvature:
    """A = I + P H P of the isotropic problem at u, factorized for all images together.

    Args:
        u: ``(N, H, W)``, flat on its regions.
        w: ``(N, 1, H, W)``.
        labels: ``(N, H * W)``, the regions.
        free: ``(N, 1, H, W)`` bool, pixels whose differences are not zero.
    """

    def __init__(self, u: np.ndarray, w: np.ndarray, labels: np.ndarray, free: np.ndarray) -> None:
        from scipy.sparse import csc_array, diags_array
        from scipy.sparse.linalg import splu

        count, height, width = u.shape
        offset = np.arange(count)[:, None] * (height * width)
        _, self.region, self.sizes = np.unique((labels + offset).ravel(), return_inverse=True, return_counts=True)
        number = len(self.sizes)
        d = _differences(u)
        size = _lengths(d, True)
        weight = np.where(free, w / np.where(free, size, 1), 0).ravel()
        direction = (d / np.where(free, size, 1)).transpose(1, 0, 2, 3).reshape(2, -1)
        # With n the direction of g, I − n nᵀ = m mᵀ for the m across it: one row for each free pixel.
        rows = np.flatnonzero(weight)
        here = self.region.reshape(count, height, width)
        right, below = here.copy(), here.copy()
        right[:, :, :-1], below[:, :-1] = here[:, :, 1:], here[:, 1:]
        m = np.sqrt(weight[rows]) * np.stack([-direction[1, rows], direction[0, rows]])
        columns = np.stack([part.ravel()[rows] for part in (right, here, below, here)])
        values = np.stack([m[0], -m[0], m[1], -m[1]])
        place = np.broadcast_to(np.arange(len(rows)), columns.shape)
        across = csc_array((values.ravel(), (place.ravel(), columns.ravel())), shape=(len(rows), number))
        matrix = (diags_array(self.sizes.astype(float)) + across.T @ across).tocsc()
        self.factor: Any = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})

    def solve(self, b: np.ndarray) -> np.ndarray:
        """``A⁻¹ b`` for b ``(N * H * W, columns)``."""
        sums = np.stack([np.bincount(self.region, weights=column, minlength=len(self.sizes)) for column in b.T], axis=1)
        flat = b - (sums / self.sizes[:, None])[self.region]
        return flat + self.factor.solve(sums)[self.region]


def _step_length(x: np.ndarray, w: np.ndarray, u: np.ndarray, step: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Halved until the energy of each image falls enough."""

    def energy(v: np.ndarray) -> np.ndarray:
        return np.square(v - x).sum((1, 2)) / 2 + (w * _lengths(_differences(v), True)).sum((1, 2, 3))

    start, length = energy(u), np.ones(len(x))
    for _ in range(_HALVINGS):
        high = energy(u + length[:, None, None] * step) > start + 1e-4 * length * slope + 1e-14 * start
        if not high.any():
            break
        length[high] /= 2
    return length


def _averaged(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    count, pixels = labels.shape
    index = (labels + np.arange(count)[:, None] * pixels).ravel()
    values = u.ravel()
    base = values[index]
    number = np.maximum(np.bincount(index, minlength=values.size), 1)
    mean = np.bincount(index, weights=values - base, minlength=values.size) / number
    return (base + mean[index]).reshape(u.shape)


def _differences(u: np.ndarray) -> np.ndarray:
    d = np.zeros((u.shape[0], 2, *u.shape[1:]))
    d[:, 0, :, :-1] = np.diff(u, axis=2)
    d[:, 1, :-1] = np.diff(u, axis=1)
    return d


def _adjoint(z: np.ndarray) -> np.ndarray:
    u = np.zeros((z.shape[0], *z.shape[2:]))
    u[:, :, 1:] += z[:, 0, :, :-1]
    u[:, :, :-1] -= z[:, 0, :, :-1]
    u[:, 1:] += z[:, 1, :-1]
    u[:, :-1] -= z[:, 1, :-1]
    return u


def _lengths(d: np.ndarray, isotropic: bool) -> np.ndarray:
    return np.hypot(d[:, :1], d[:, 1:]) if isotropic else np.abs(d)
