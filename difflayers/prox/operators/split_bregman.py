r"""Total variation of images by splitting: the alternating direction method of multipliers, for many images at once.

.. math:: \min_{u, v} \; \tfrac12 \|u - x\|^2 + \sum_p w_p \|v_p\| \quad\text{subject to}\quad v = D u,

with :math:`D u` the forward differences of u, zero at the far borders. The step in u is a division in the cosine basis, the step in v
shrinks each :math:`v_p` by :math:`w_p / ρ`. What it cuts off, times ρ, is a feasible dual point z; it gives the duality gap

.. math:: \tfrac12 \|u - x + D^T z\|^2 + \sum_p \bigl( w_p \|(Du)_p\| - \langle z_p, (Du)_p \rangle \bigr) \ge
   \tfrac12 \|u - u^*\|^2 + \tfrac12 \|x - D^T z - u^*\|^2,

a sum of terms that are not negative. Each image has its own ρ and stops by itself at its gap.

References: Goldstein and Osher, The split Bregman method for L1-regularized problems, SIAM J. Imaging Sciences 2 (2009); Boyd, Parikh,
Chu, Peleato and Eckstein, Distributed optimization and statistical learning via ADMM (2011), section 3.4.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Split", "differences", "differences_adjoint", "duality_gap", "lengths", "split_bregman"]

_RELAXATION = 1.8
_EVERY = 10  # iterations between two looks at the gap
_THRESHOLDS = {True: 0.04, False: 0.1}  # what a length is shrunk by, beside those of x in the mean square: isotropic, or not


class Split(NamedTuple):
    """Where the iteration ended.

    Attributes:
        u: ``(N, H, W)``.
        z: ``(N, 2, H, W)``, feasible.
        flat: ``(N, H, W)`` bool, pixels (or with edges of their own ``(N, 2, H, W)``) whose differences are zero.
        gap: ``(N,)``, relative.
        iterations: ``(N,)``.
    """

    u: Tensor
    z: Tensor
    flat: Tensor
    gap: Tensor
    iterations: Tensor


def differences(u: Tensor) -> Tensor:
    """``(*batch, 2, H, W)``: to the right and to the lower neighbour, zero where there is none."""
    pad = torch.nn.functional.pad
    return torch.stack([pad(u.diff(dim=-1), (0, 1)), pad(u.diff(dim=-2), (0, 0, 0, 1))], -3)


def differences_adjoint(z: Tensor) -> Tensor:
    """``(*batch, H, W)``: the transpose of :func:`differences`."""
    pad = torch.nn.functional.pad
    across, down = z[..., 0, :, :-1], z[..., 1, :-1, :]
    return pad(across, (1, 0)) - pad(across, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))


def lengths(d: Tensor, isotropic: bool) -> Tensor:
    """``(*batch, 1, H, W)``, the lengths of the differences at a pixel, or ``(*batch, 2, H, W)``, of each alone."""
    # Slower by a factor of ten: torch.linalg.vector_norm over a dimension of two.
    return torch.hypot(d[..., :1, :, :], d[..., 1:, :, :]) if isotropic else d.abs()


def duality_gap(u: Tensor, z: Tensor, x: Tensor, w: Tensor, isotropic: bool) -> Tensor:
    """The relative gap of u and a feasible z, ``(*batch,)``."""
    d = differences(u)
    total = (w * lengths(d, isotropic)).flatten(-3).sum(-1)
    fit = (u - x + differences_adjoint(z)).square().flatten(-2).sum(-1) / 2
    gap = fit + total - (z * d).flatten(-3).sum(-1)
    energy = total + (u - x).square().flatten(-2).sum(-1) / 2
    # An energy of zero is nothing to be relative to; that of a constant u always counts a little.
    floor = 1e-8 * (x - x.mean((-1, -2), keepdim=True)).square().flatten(-2).sum(-1) / 2
    scale = energy + floor
    return torch.where(scale > 0, gap.clamp(min=0) / torch.where(scale > 0, scale, 1), 0)


def split_bregman(x: Tensor, w: Tensor, z: Tensor, isotropic: bool, tol: float, max_iter: int) -> Split:
    """Iterate until the relative gap is at most ``tol``.

    Args:
        x: ``(N, H, W)``, finite, centred.
        w: ``(N, 1, H, W)``, or ``(N, 2, H, W)`` if not isotropic, nonnegative.
        z: ``(N, 2, H, W)``, where the dual starts.
        isotropic: whether the two differences at a pixel have one length.
        tol: of the relative gap.
        max_iter: iterations at the most.
    """
    count = len(x)
    waves = _Waves(x)
    typical = lengths(differences(x), isotropic).square().flatten(1).mean(1).sqrt()
    rho = w.flatten(1).mean(1) / (_THRESHOLDS[isotropic] * typical).clamp(min=1e-300)
    rho = _column(rho.clamp(1e-6, 1e6))
    z = z * (w / lengths(z, isotropic).clamp(min=1e-300)).clamp(max=1)
    found = Split(
        x.clone(), z.clone(), torch.zeros_like(w, dtype=torch.bool), x.new_full((count,), math.inf), torch.zeros(count, dtype=torch.int64)
    )
    found = found._replace(iterations=found.iterations.to(x.device))
    running = torch.arange(count, device=x.device)
    d = differences(x - differences_adjoint(z))
    v, y = d - d * (w / rho / lengths(d, isotropic).clamp(min=1e-300)).clamp(max=1), z / rho
    for step in range(1, max_iter + 1):
        u = waves.divide(x + (rho * differences_adjoint(v - y).unsqueeze(1)).squeeze(1), rho.squeeze(1))
        d = differences(u)
        s = _RELAXATION * d + (1 - _RELAXATION) * v + y
        kept = (w / rho / lengths(s, isotropic).clamp(min=1e-300)).clamp(max=1)
        y = kept * s
        new = s - y
        if step % _EVERY == 0 or step == max_iter:
            z = rho * y
            gap = duality_gap(u, z, x, w, isotropic)
            for part, value in zip(found, (u, z, kept >= 1, gap, torch.full_like(running, step)), strict=True):
                part[running] = value
            left = gap > tol
            if not bool(left.any()):
                break
            if not bool(left.all()):
                running, x, w, y, new, rho = (part[left] for part in (running, x, w, y, new, rho))
        v = new
    return found


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


class _Waves:
    """The cosine basis, in which DᵀD is diagonal."""

    def __init__(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        self.bases = None if x.device.type == "cpu" else (_cosines(height, x), _cosines(width, x))
        self.values = _eigenvalues(height, x)[:, None] + _eigenvalues(width, x)

    def divide(self, b: Tensor, rho: Tensor) -> Tensor:
        """``(I + ρ DᵀD)⁻¹ b``."""
        if self.bases is None:
            from scipy.fft import dctn, idctn

            waves = torch.from_numpy(dctn(b.numpy(), axes=(-2, -1), norm="ortho"))
            waves /= 1 + rho * self.values
            return torch.from_numpy(idctn(waves.numpy(), axes=(-2, -1), norm="ortho", overwrite_x=True))
        rows, columns = self.bases
        return rows.mT @ ((rows @ b @ columns.mT) / (1 + rho * self.values)) @ columns


def _eigenvalues(n: int, like: Tensor) -> Tensor:
    return 2 - 2 * torch.cos(torch.pi * torch.arange(n, dtype=like.dtype, device=like.device) / n)


def _cosines(n: int, like: Tensor) -> Tensor:
    """Orthonormal rows."""
    k = torch.arange(n, dtype=like.dtype, device=like.device)
    basis = torch.cos(torch.pi * k[:, None] * (k + 0.5) / n) * math.sqrt(2 / n)
    basis[0] *= math.sqrt(0.5)
    return basis
