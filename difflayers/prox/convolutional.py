r"""An input convex network of convolutions, for images of any size.

The recursion of :mod:`difflayers.prox.icnn` with convolutions in place of matrices. Layer k sees the image at the resolution of
:math:`s_1 ⋯ s_k` pixels; its skip convolution jumps there at once, with a kernel that is large enough to leave no pixel out. The last layer is
summed over all positions, :math:`ψ(x) = \sum_p w^T z_K(p)`, so that one network is a potential for images of every size, and the potential of a
large image is about the sum of those of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

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
        kernel_size: odd.
        beta: of the softplus activations.

    Example:
        >>> import torch
        >>> from difflayers.prox import ConvolutionalInputConvexNN
        >>> psi = ConvolutionalInputConvexNN(channels=1, hidden=8)
        >>> psi(torch.rand(5, 1, 17, 12)).shape, psi.gradient(torch.rand(5, 1, 17, 12)).shape
        (torch.Size([5]), torch.Size([5, 1, 17, 12]))
    """

    def __init__(
        self, channels: int = 1, hidden: int = 32, strides: Sequence[int] = (1, 1, 1), kernel_size: int = 3, beta: float = 10.0
    ) -> None:
        if min(channels, hidden, *strides) < 1 or not strides:
            raise ValueError(f"channels, hidden and every stride must be positive, got {channels}, {hidden} and {tuple(strides)}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a kernel has a middle, got {kernel_size}")
        half = kernel_size // 2
        super().__init__(
            [nn.Conv2d(channels, hidden, 2 * half * s + 1, stride=s, padding=half * s) for s in accumulate(strides, mul)],
            [NonNegativeConv2d(hidden, hidden, kernel_size, stride=s, padding=half) for s in strides[1:]],
            NonNegativeLinear(hidden, 1),
            beta,
            event_ndim=3,
        )
        self.channels, self.hidden, self.strides, self.kernel_size = channels, hidden, tuple(strides), kernel_size

    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"channels={self.channels}, hidden={self.hidden}, strides={self.strides}, kernel_size={self.kernel_size}"
        return f"{sizes}, beta={self.beta}"

    def _check(self, x: Tensor) -> None:
        if x.dim() < 3 or x.shape[-3] != self.channels:
            raise ShapeError(f"x must have the shape (*batch, {self.channels}, height, width), got {tuple(x.shape)}")

    def _applied(self, layer: Any, weight: Tensor, z: Tensor) -> Tensor:
        return F.conv2d(z, weight, stride=layer.stride, padding=layer.padding)

    def _transposed(self, layer: Any, weight: Tensor, cotangent: Tensor, like: Tensor) -> Tensor:
        # A stride drops the last pixels of some sizes; the transposed convolution is told how many there were.
        (stride, _), (padding, _), kernel = layer.stride, layer.padding, weight.shape[-1]
        rest = [(size + 2 * padding - kernel) % stride for size in like.shape[-2:]]
        return F.conv_transpose2d(cotangent, weight, stride=stride, padding=padding, output_padding=tuple(rest))

    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.sum((-1, -2)) @ weight

    def _spread(self, weight: Tensor) -> Tensor:
        return weight[:, None, None]
