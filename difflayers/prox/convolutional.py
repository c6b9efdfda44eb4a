r"""An input convex network of convolutions, for images of any size.

The recursion of :mod:`difflayers.prox.icnn` with convolutions in place of matrices. Layer k sees the image at the resolution of
:math:`s_1 ⋯ s_k` pixels; its skip convolution jumps there at once, with a kernel that is large enough to leave no pixel out. The last layer
is summed over all positions, :math:`ψ(x) = \frac12 \sum_p w^T z_K(p)^2`, so that one network is a potential for images of every size, and
the potential of a large image is about the sum of those of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError
from .icnn import InputConvex
from .nonnegative import NonNegativeConv2d, NonNegativeLinear

__all__ = ["ConvolutionalInputConvexNN"]


class ConvolutionalInputConvexNN(InputConvex):
    """A convolutional network that is convex in its input, an image of any size.

    Args:
        channels: of the image.
        hidden: channels of every layer.
        strides: of each layer; their number is that of the layers. The published networks for faces have (1, 2, 1, 2).
        kernel_size: odd, one for all layers or one for each. One or two layers of wide kernels learn faster than many of narrow ones.
        beta: of the softplus activations.
        power: of the last layer's values in ψ; 1 for the published form.
        center: is subtracted from the image.
        padding_mode: how an image is continued beyond its border: "zeros" (by ``center``), "circular", "reflect" or "replicate".
            Only the circular one treats all places alike.

    Example:
        >>> import torch
        >>> from difflayers.prox import ConvolutionalInputConvexNN
        >>> psi = ConvolutionalInputConvexNN(channels=1, hidden=8)
        >>> psi(torch.rand(5, 1, 17, 12)).shape, psi.gradient(torch.rand(5, 1, 17, 12)).shape
        (torch.Size([5]), torch.Size([5, 1, 17, 12]))
    """

    def __init__(
        self,
        channels: int = 1,
        hidden: int = 32,
        strides: Sequence[int] = (1, 1, 1),
        kernel_size: int | Sequence[int] = 3,
        beta: float = 10.0,
        *,
        power: int = 2,
        center: float = 0.5,
        padding_mode: str = "zeros",
    ) -> None:
        if min(channels, hidden, *strides) < 1 or not strides:
            raise ValueError(f"channels, hidden and every stride must be positive, got {channels}, {hidden} and {tuple(strides)}")
        kernels = [kernel_size] * len(strides) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(strides) or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernel_size must be an odd number, or one for each of the {len(strides)} layers, got {kernel_size}")
        if padding_mode not in ("zeros", *_SOURCES):
            raise ValueError(f"padding_mode {padding_mode!r} is not known; choose zeros, {', '.join(_SOURCES)}")
        halves = [kernel // 2 for kernel in kernels]
        super().__init__(
            [
                nn.Conv2d(channels, hidden, 2 * half * step + 1, stride=step, padding=half * step)
                for half, step in zip(halves, accumulate(strides, mul), strict=True)
            ],
            [
                NonNegativeConv2d(hidden, hidden, 2 * half + 1, stride=stride, padding=half)
                for half, stride in zip(halves[1:], strides[1:], strict=True)
            ],
            NonNegativeLinear(hidden, 1),
            torch.zeros(channels, 1, 1),
            beta=beta,
            power=power,
            center=center,
        )
        self.channels, self.hidden, self.strides, self.kernel_size = channels, hidden, tuple(strides), tuple(kernels)
        self.padding_mode = padding_mode
        size = 8 * math.prod(strides)
        self._start_near_identity(torch.randn(8, channels, size, size, dtype=self.offset.dtype) / 4)

    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"channels={self.channels}, hidden={self.hidden}, strides={self.strides}, kernel_size={self.kernel_size}"
        return f"{sizes}, {super().extra_repr()}, padding_mode={self.padding_mode!r}"

    def _check(self, x: Tensor) -> None:
        if x.dim() < 3 or x.shape[-3] != self.channels:
            raise ShapeError(f"x must have the shape (*batch, {self.channels}, height, width), got {tuple(x.shape)}")

    def _applied(self, layer: Any, z: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = layer.weight if weight is None else weight
        if self.padding_mode == "zeros":
            return F.conv2d(z, weight, layer.bias, stride=layer.stride, padding=layer.padding)
        for dim in (-2, -1):
            z = z.index_select(dim, self._sources(z.shape[dim], layer, z))
        return F.conv2d(z, weight, layer.bias, stride=layer.stride)

    def _transposed(self, layer: Any, cotangent: Tensor, like: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = layer.weight if weight is None else weight
        # A stride drops the last pixels of some sizes; the transposed convolution is told how many there were.
        stride, padding, kernel = layer.stride[0], layer.padding[0], weight.shape[-1]
        rest = [(size + 2 * padding - kernel) % stride for size in like.shape[-2:]]
        inside = padding if self.padding_mode == "zeros" else 0
        image = F.conv_transpose2d(cotangent, weight, stride=stride, padding=inside, output_padding=tuple(rest))
        if inside == padding:
            return image
        for dim in (-2, -1):
            size = like.shape[dim]
            folded = image.new_zeros([size if d == dim % image.dim() else length for d, length in enumerate(image.shape)])
            image = folded.index_add(dim, self._sources(size, layer, image), image)
        return image

    def _sources(self, size: int, layer: Any, like: Tensor) -> Tensor:
        """For each place of a padded line the place in the line that its value comes from."""
        padding = layer.padding[0]
        return _SOURCES[self.padding_mode](torch.arange(-padding, size + padding, device=like.device), size)

    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.sum((-1, -2)) @ weight

    def _spread(self, weight: Tensor) -> Tensor:
        return weight[:, None, None]


_SOURCES = {
    "circular": lambda i, n: i % n,
    "reflect": lambda i, n: (n - 1) - ((n - 1) - i % max(2 * n - 2, 1)).abs(),
    "replicate": lambda i, n: i.clamp(0, n - 1),
}
