r"""Input convex neural networks: ψ(x), convex in x whatever the weights are.

.. math:: z_1 = σ(H_1 x + b_1), \qquad z_{k+1} = σ(W_k z_k + H_{k+1} x + b_{k+1}), \qquad ψ(x) = w^T z_K,

with :math:`W_k, w \ge 0` and σ convex and increasing, here the softplus :math:`σ(t) = \log(1 + e^{βt}) / β`. Each z is then convex in x, since
nonnegative sums and increasing convex functions keep convexity. The gradient takes one pass through the transposed layers,

.. math:: g_K = σ'(a_K) ∘ w, \qquad g_k = σ'(a_k) ∘ W_k^T g_{k+1}, \qquad ∇ψ(x) = \sum_k H_k^T g_k,

with the arguments :math:`a_k` of σ. It is written out here: an ordinary function of x and of the weights, which costs no graph where none is
wanted and is differentiated as often as one likes.

Reference: Amos, Xu and Kolter, Input convex neural networks, ICML 2017, arXiv:1609.07152.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError
from .nonnegative import NonNegativeLinear

__all__ = ["InputConvex", "InputConvexNN"]


class InputConvex(nn.Module):
    """The recursion, for layers of any kind.

    Args:
        skips: H_k with their biases, from x to each layer.
        paths: W_k, from each layer to the next, nonnegative.
        readout: w, as a nonnegative layer from the channels of the last z to one number.
        beta: of the softplus; large is sharp.
        event_ndim: how many last dimensions of x are one point.
    """

    def __init__(self, skips: Sequence[nn.Module], paths: Sequence[nn.Module], readout: nn.Module, beta: float, event_ndim: int) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.skips, self.paths, self.readout = nn.ModuleList(skips), nn.ModuleList(paths), readout
        self.beta, self.event_ndim = float(beta), event_ndim

    def forward(self, x: Tensor) -> Tensor:
        """ψ(x).

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """
        self._check(x)
        rows = x.reshape(-1, *self._event(x))
        z = self._softplus(self._arguments(rows)[-1])
        return self._sum(z, self.readout.weight[0]).reshape(x.shape[: x.dim() - self.event_ndim])

    def gradient(self, x: Tensor) -> Tensor:
        """∇ψ(x), in one pass forth and one back.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch, *event)``.
        """
        self._check(x)
        rows = x.reshape(-1, *self._event(x))
        weights = [path.weight for path in self.paths]
        arguments = self._arguments(rows, weights)
        slopes = [torch.sigmoid(self.beta * argument) for argument in arguments]
        cotangent = slopes[-1] * self._spread(self.readout.weight[0])
        gradient = self._transposed(self.skips[-1], self.skips[-1].weight, cotangent, rows)
        for k in range(len(self.paths) - 1, -1, -1):
            cotangent = slopes[k] * self._transposed(self.paths[k], weights[k], cotangent, arguments[k])
            gradient = gradient + self._transposed(self.skips[k], self.skips[k].weight, cotangent, rows)
        return gradient.reshape(x.shape)

    def _arguments(self, x: Tensor, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        weights = [path.weight for path in self.paths] if weights is None else weights
        arguments = [self.skips[0](x)]
        for skip, path, weight in zip(self.skips[1:], self.paths, weights, strict=True):
            arguments.append(self._applied(path, weight, self._softplus(arguments[-1])) + skip(x))
        return arguments

    def _softplus(self, argument: Tensor) -> Tensor:
        # Above this threshold, not above torch's own of 20, the linear branch agrees with softplus to the last digit of float64.
        return F.softplus(argument, self.beta, threshold=40.0)

    def _event(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[x.dim() - self.event_ndim :])

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def _applied(self, layer: Any, weight: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _transposed(self, layer: Any, weight: Tensor, cotangent: Tensor, like: Tensor) -> Tensor:
        raise NotImplementedError

    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _spread(self, weight: Tensor) -> Tensor:
        raise NotImplementedError


class InputConvexNN(InputConvex):
    """A fully connected network that is convex in its input.

    Args:
        in_features: n.
        hidden: the width of every layer.
        layers: how many there are.
        beta: of the softplus activations.

    Example:
        >>> import torch
        >>> from difflayers.prox import InputConvexNN
        >>> psi, x = InputConvexNN(3), torch.randn(2, 3)
        >>> left, right = psi(x).mean(), psi(x.mean(0))
        >>> bool(left >= right), psi.gradient(x).shape
        (True, torch.Size([2, 3]))
    """

    def __init__(self, in_features: int, hidden: int = 64, layers: int = 3, beta: float = 10.0) -> None:
        if min(in_features, hidden, layers) < 1:
            raise ValueError(f"in_features, hidden and layers must be positive, got {in_features}, {hidden} and {layers}")
        super().__init__(
            [nn.Linear(in_features, hidden) for _ in range(layers)],
            [NonNegativeLinear(hidden, hidden) for _ in range(layers - 1)],
            NonNegativeLinear(hidden, 1),
            beta,
            event_ndim=1,
        )
        self.in_features, self.hidden = in_features, hidden

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, hidden={self.hidden}, layers={len(self.skips)}, beta={self.beta}"

    def _check(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ShapeError(f"x must have the shape (*batch, {self.in_features}), got {tuple(x.shape)}")

    def _applied(self, layer: Any, weight: Tensor, z: Tensor) -> Tensor:
        return z @ weight.mT

    def _transposed(self, layer: Any, weight: Tensor, cotangent: Tensor, like: Tensor) -> Tensor:
        return cotangent @ weight

    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        return z @ weight

    def _spread(self, weight: Tensor) -> Tensor:
        return weight
