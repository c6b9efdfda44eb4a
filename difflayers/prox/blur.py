r"""Blur as a linear operator: y = k ∗ x by the fast Fourier transform, with a kernel that may be learned.

On a periodic grid a convolution is diagonal in the Fourier basis, F A F⁻¹ = diag(k̂), so that

.. math:: (I + γ A^T A)^{-1} (z + γ A^T y) = F^{-1} \frac{\hat z + γ \bar{\hat k} \hat y}{1 + γ |\hat k|^2}.

A camera does not see a periodic world: it measures the pixels whose neighbourhood lies in the image ("valid"). That is the periodic
blur cropped, its adjoint is the periodic one of the measurements with zeros around them, and its proximal operator is iterative.

References: Hansen, Nagy, O'Leary, Deblurring Images, SIAM 2006, chapter 4; Almeida, Figueiredo, Deconvolving images with unknown
boundaries, IEEE Trans. Image Process. 22, 2013.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..holding import hold
from .linear_operators import Operator, spread

__all__ = ["Blur"]


class Blur(Operator):
    """Convolution with a kernel.

    Args:
        kernel: ``(*lead, k₁, …, k_d)`` with d = ``spatial_ndim``; its centre is at ``k // 2``, and leading dimensions broadcast against
            those of x (channels, images). An ``nn.Parameter`` is learned.
        boundary: ``"circular"`` (y is as large as x) or ``"valid"`` (only pixels whose neighbourhood lies in the image are measured).
        spatial_ndim: how many trailing dimensions are convolved.
        batch_ndim: how many leading dimensions of x count independent problems.

    Raises:
        ShapeError: the kernel has too few dimensions, or is larger than the image.

    Example:
        >>> import torch
        >>> from difflayers.prox import Blur
        >>> image = torch.zeros(1, 1, 3, 5)
        >>> image[..., 1, 2] = 1.0
        >>> Blur(torch.tensor([[0.25, 0.5, 0.25]])).A(image)[0, 0, 1].add(0.0).round(decimals=4)
        tensor([0.0000, 0.2500, 0.5000, 0.2500, 0.0000])
    """

    kernel: Tensor

    def __init__(
        self, kernel: Tensor, *, boundary: Literal["circular", "valid"] = "circular", spatial_ndim: int = 2, batch_ndim: int = 1
    ) -> None:
        super().__init__(batch_ndim)
        if boundary not in ("circular", "valid"):
            raise ValueError(f"boundary={boundary!r} is not known; choose 'circular' or 'valid'")
        if kernel.dim() < spatial_ndim:
            raise ShapeError(f"the kernel must have at least {spatial_ndim} dimensions, got shape {tuple(kernel.shape)}")
        hold(self, "kernel", kernel)
        self.boundary, self.spatial_ndim = boundary, spatial_ndim

    def A(self, x: Tensor) -> Tensor:
        """k ∗ x."""
        blurred = self._inverse(self._transform(x) * self._spectrum(x), x)
        if self.boundary == "valid":
            for dim, (before, after) in self._margins():
                blurred = blurred.narrow(dim, before, blurred.shape[dim] - before - after)
        return blurred

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The correlation with k."""
        if self.boundary == "valid":
            y = nn.functional.pad(y, [size for _, margin in reversed(self._margins()) for size in margin])
        return self._inverse(self._transform(y) * self._spectrum(y).conj(), y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """The proximal operator of γ/2 ‖k ∗ · − y‖² at z: a division of spectra if circular, else conjugate gradients."""
        if self.boundary == "valid":
            return super().prox_l2(z, y, gamma)
        gamma, spectrum = spread(gamma, z), self._spectrum(z)
        power = spectrum.real.square() + spectrum.imag.square()
        return self._inverse((self._transform(z) + gamma * spectrum.conj() * self._transform(y)) / (1 + gamma * power), z)

    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.spatial_ndim, 0))

    def _margins(self) -> list[tuple[int, tuple[int, int]]]:
        """For each spatial dimension what "valid" cuts off before and after."""
        return [(dim, (self.kernel.shape[dim] - 1 - self.kernel.shape[dim] // 2, self.kernel.shape[dim] // 2)) for dim in self._dims()]

    def _transform(self, x: Tensor) -> Tensor:
        if not x.numel():  # MKL refuses to transform nothing
            return x[..., : x.shape[-1] // 2 + 1].to(torch.promote_types(x.dtype, torch.complex32))
        return torch.fft.rfftn(x, dim=self._dims())

    def _inverse(self, spectrum: Tensor, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.zeros_like(like)
        return torch.fft.irfftn(spectrum, s=like.shape[like.dim() - self.spatial_ndim :], dim=self._dims())

    def _spectrum(self, x: Tensor) -> Tensor:
        """The transform of the kernel on the grid of x, its centre at the origin."""
        dims = self._dims()
        sizes, extent = [x.shape[dim] for dim in dims], [self.kernel.shape[dim] for dim in dims]
        if any(k > n for k, n in zip(extent, sizes, strict=True)):
            raise ShapeError(f"the kernel {tuple(extent)} is larger than the image {tuple(sizes)}")
        padded = nn.functional.pad(self.kernel, [size for k, n in reversed(list(zip(extent, sizes, strict=True))) for size in (0, n - k)])
        return self._transform(torch.roll(padded, [-(k // 2) for k in extent], dims))

    def extra_repr(self) -> str:
        """The shape of the kernel and the boundary."""
        return f"kernel: {tuple(self.kernel.shape)}, boundary={self.boundary!r}"
