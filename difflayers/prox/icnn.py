r"""Input convex neural networks: ψ(x), convex in x whatever the weights are.

.. math:: z_1 = σ(H_1 x + b_1), \qquad z_{k+1} = σ(W_k z_k + H_{k+1} x + b_{k+1}), \qquad ψ(x) = \tfrac12 w^T z_K^2 + c^T x,

with :math:`W_k, w \ge 0` and σ convex, increasing and positive, here the softplus :math:`σ(t) = \log(1 + e^{βt}) / β`. Each z is then
convex in x, since nonnegative sums and increasing convex functions keep convexity, and so is its square. The published networks end with
:math:`w^T z_K`. Their gradient is bounded, a smooth staircase; that of the square grows as x does, and denoisers are learned faster. But
far from the data its slope is what training left there. Where it is more than one, the prior of a
:class:`~difflayers.LearnedProximalNetwork` is not bounded below, and plug-and-play iterations that get there run away; with
:math:`w^T z_K` the slope far out is μ.

The gradient takes one pass through the transposed layers,

.. math:: g_K = σ'(a_K) ∘ z_K ∘ w, \qquad g_k = σ'(a_k) ∘ W_k^T g_{k+1}, \qquad ∇ψ(x) = \sum_k H_k^T g_k + c,

with the arguments :math:`a_k` of σ. It is written out here: an ordinary function of x and of the weights, which costs no graph where none
is wanted and is differentiated as often as one likes.

A network starts near the identity, ∇ψ(x) ≈ x: the rows of each H come in pairs ±h, and w is scaled on random points.

Reference: Amos, Xu and Kolter, Input convex neural networks, ICML 2017, arXiv:1609.07152.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError
from .nonnegative import NonNegativeLinear

__all__ = ["InputConvex", "InputConvexNN"]


class InputConvex(nn.Module, abc.ABC):
    """The recursion, for layers of any kind.

    Args:
        skips: H_k with their biases, from x to each layer.
        paths: W_k, from each layer to the next, nonnegative.
        readout: w, as a nonnegative layer from the channels of the last z to one number.
        offset: c, of the shape of x or one that broadcasts to it.
        beta: of the softplus; large is sharp.
        power: of the last z.
        center: is subtracted from x.
    """

    def __init__(
        self,
        skips: Sequence[nn.Module],
        paths: Sequence[nn.Module],
        readout: nn.Module,
        offset: Tensor,
        *,
        beta: float,
        power: int,
        center: float,
    ) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        self.skips, self.paths, self.readout, self.offset = nn.ModuleList(skips), nn.ModuleList(paths), readout, nn.Parameter(offset)
        self.beta, self.power, self.center, self.event_ndim = float(beta), power, float(center), offset.dim()

    def forward(self, x: Tensor) -> Tensor:
        """ψ(x).

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """
        self._check(x)
        rows = x.reshape(-1, *self._event(x))
        z = self._softplus(self._arguments(rows - self.center)[-1])
        value = self._sum(z if self.power == 1 else z * z / 2, self._readout())
        value = value + (self.offset * rows).sum(tuple(range(-self.event_ndim, 0)))
        return value.reshape(x.shape[: x.dim() - self.event_ndim])

    def gradient(self, x: Tensor) -> Tensor:
        """∇ψ(x), in one pass forth and one back.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch, *event)``.
        """
        self._check(x)
        rows = x.reshape(-1, *self._event(x)) - self.center
        weights: list[Any] = [path.weight for path in self.paths]
        arguments = self._arguments(rows, weights)
        slopes = [torch.sigmoid(self.beta * argument) for argument in arguments]
        cotangent = slopes[-1] * self._spread(self._readout())
        if self.power == 2:
            cotangent = cotangent * self._softplus(arguments[-1])
        gradient = self.offset + self._transposed(self.skips[-1], cotangent, rows)
        for k in range(len(self.paths) - 1, -1, -1):
            cotangent = slopes[k] * self._transposed(self.paths[k], cotangent, arguments[k], weights[k])
            gradient = gradient + self._transposed(self.skips[k], cotangent, rows)
        return gradient.reshape(x.shape)

    @torch.no_grad()
    def _start_near_identity(self, probe: Tensor) -> None:
        """Scale what was drawn so that ∇ψ(x) ≈ x on the points ``probe`` around the center."""
        skips: Any = self.skips
        for skip in skips:
            half = skip.weight.shape[0] // 2
            skip.weight[half : 2 * half] = -skip.weight[:half]
        slope = self.gradient(self.center + probe)
        readout: Any = self.readout
        readout.weight = readout.weight * (probe.square().sum() / (probe * slope).sum())
        slope = self.gradient(self.center + probe)
        aside = [d for d in range(probe.dim()) if d == 0 or self.offset.shape[d - 1] == 1]
        self.offset += (self.center + probe - slope).mean(aside, keepdim=True)[0]

    def _arguments(self, x: Tensor, weights: Sequence[Any] | None = None) -> list[Tensor]:
        """a_k, for weights W_k that need not be computed again."""
        given: Sequence[Any] = [None] * len(self.paths) if weights is None else weights
        arguments = [self._applied(self.skips[0], x)]
        for skip, path, weight in zip(self.skips[1:], self.paths, given, strict=True):
            arguments.append(self._applied(path, self._softplus(arguments[-1]), weight) + self._applied(skip, x))
        return arguments

    def _readout(self) -> Tensor:
        readout: Any = self.readout
        return readout.weight[0]

    def _softplus(self, argument: Tensor) -> Tensor:
        # Above this threshold, not above torch's own of 20, the linear branch agrees with softplus to the last digit of float64.
        return F.softplus(argument, self.beta, threshold=40.0)

    def _event(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[x.dim() - self.event_ndim :])

    def extra_repr(self) -> str:
        """What all of them have."""
        return f"beta={self.beta}, power={self.power}, center={self.center}"

    @abc.abstractmethod
    def _check(self, x: Tensor) -> None:
        """Refuse an x of the wrong shape."""

    @abc.abstractmethod
    def _applied(self, layer: Any, z: Tensor, weight: Tensor | None = None) -> Tensor:
        """The layer, with its own weight or the one that is given."""

    @abc.abstractmethod
    def _transposed(self, layer: Any, cotangent: Tensor, like: Tensor, weight: Tensor | None = None) -> Tensor:
        """The layer's transpose; ``like`` has the shape of what the layer takes."""

    @abc.abstractmethod
    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        """The readout of z, weighted by channel."""

    @abc.abstractmethod
    def _spread(self, weight: Tensor) -> Tensor:
        """The weight of the channels with dimensions behind it so that it broadcasts against z."""


class InputConvexNN(InputConvex):
    """A fully connected network that is convex in its input.

    Args:
        in_features: n.
        hidden: the width of every layer.
        layers: how many there are.
        beta: of the softplus activations.
        power: of the last layer's values in ψ; 1 for the published form.
        center: is subtracted from the input: the middle of the data.

    Example:
        >>> import torch
        >>> from difflayers.prox import InputConvexNN
        >>> psi, x = InputConvexNN(3), torch.randn(2, 3)
        >>> left, right = psi(x).mean(), psi(x.mean(0))
        >>> bool(left >= right), psi.gradient(x).shape
        (True, torch.Size([2, 3]))
    """

    def __init__(
        self, in_features: int, hidden: int = 64, layers: int = 3, beta: float = 10.0, *, power: int = 2, center: float = 0.0
    ) -> None:
        if min(in_features, hidden, layers) < 1:
            raise ValueError(f"in_features, hidden and layers must be positive, got {in_features}, {hidden} and {layers}")
        super().__init__(
            [nn.Linear(in_features, hidden) for _ in range(layers)],
            [NonNegativeLinear(hidden, hidden) for _ in range(layers - 1)],
            NonNegativeLinear(hidden, 1),
            torch.zeros(in_features),
            beta=beta,
            power=power,
            center=center,
        )
        self.in_features, self.hidden = in_features, hidden
        self._start_near_identity(torch.randn(256, in_features, dtype=self.offset.dtype) / 2)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, hidden={self.hidden}, layers={len(self.skips)}, {super().extra_repr()}"

    def _check(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ShapeError(f"x must have the shape (*batch, {self.in_features}), got {tuple(x.shape)}")

    def _applied(self, layer: Any, z: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.linear(z, layer.weight if weight is None else weight, layer.bias)

    def _transposed(self, layer: Any, cotangent: Tensor, like: Tensor, weight: Tensor | None = None) -> Tensor:
        return cotangent @ (layer.weight if weight is None else weight)

    def _sum(self, z: Tensor, weight: Tensor) -> Tensor:
        return z @ weight

    def _spread(self, weight: Tensor) -> Tensor:
        return weight
