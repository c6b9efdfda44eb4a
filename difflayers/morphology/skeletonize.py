r"""Skeletons of grey images, with a gradient that passes straight through.

A grey image is read as probabilities p and made binary at random, as a logistic (Gumbel) relaxation of a coin,

.. math:: y = σ\bigl((\log α + β\, ℓ) / τ\bigr), \qquad α = \frac{p + 10^{-8}}{1 - p + 10^{-8}}, \qquad ℓ \sim \text{Logistic}(0, 1),

of which the voxels with :math:`y > ½` are peeled to a skeleton s (:mod:`difflayers.morphology.peeling`).

The map from the image to the skeleton takes finitely many values: its derivative is zero almost everywhere. What is returned in its place
is a choice, a straight-through estimator :math:`∂s/∂y := w` with weights that a voxel's fate decides,

.. math:: s + w \odot (y - \bar y), \qquad \bar y = y \text{ held constant},

computed with ordinary operations, so that every transform of torch agrees about it. ``"reference"`` has the weights that automatic
differentiation gives in the published module, ½ for each tie of a minimum; ``"mask"`` has w = 0 where a voxel was deleted and 1 elsewhere.

Reference: Menten, Paetzold, Zimmer, Shit, Ezhov, Holland, Probst, Schnabel and Rueckert, A skeletonization algorithm for gradient-based
optimization, ICCV 2023, arXiv:2309.02527.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from .arguments import check_choice, check_count, check_images, check_probabilities
from .peeling import peel
from .simple_points import Detection

__all__ = ["Skeletonize", "skeletonize"]

Gradient = Literal["reference", "mask"]


@eager
def skeletonize(
    image: Tensor,
    *,
    probabilistic: bool = True,
    beta: float = 0.33,
    tau: float = 1.0,
    simple_point_detection: Detection = "Boolean",
    num_iter: int | None = 5,
    gradient: Gradient = "reference",
    generator: Generator | None = None,
) -> Tensor:
    """The skeleton of each image, of each channel by itself.

    The foreground is 8-connected (26-connected in space), and the outside of the image is background. Every component, hole and cavity
    is kept. End points stay, so that branches do not shrink. With ``num_iter=None`` what is left is thin: no voxel can be
    deleted any more, but end points. A 2 × 2 block remains only where each of its pixels carries a branch of its own.

    Args:
        image: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, probabilities in [0, 1].
        probabilistic: make it binary at random; else at ½, with the derivative passed straight through.
        beta: scale of the logistic noise; 0: none.
        tau: temperature; the smaller, the larger the derivative near ½.
        simple_point_detection: ``"Boolean"`` is exact. ``"EulerCharacteristic"`` is the published alternative: the same in
            the plane, but wrong for one in 75 neighbourhoods of dense noise in space, where it opens tunnels or closes cavities.
        num_iter: rounds of peeling, each of which takes about one voxel off every side; None: until nothing changes.
        gradient: ``"reference"``: the derivative of the published module, 2^−num_iter on kept voxels, 0 on deleted ones and 1 on the
            background, there halved for each round in which a voxel could itself be deleted. With ``num_iter=None`` the rounds that
            changed the image count. ``"mask"``: 1, 0 and 1, however many rounds there were. Neither is the derivative of the
            skeleton, which is zero.
        generator: of the noise.

    Returns:
        As the image: 1 on the skeleton, 0 elsewhere.

    Raises:
        ShapeError: the image has another rank, or is not floating.
        ValueError: its values are not in [0, 1], or an option is not known.

    References:
        Menten et al., ICCV 2023.

    Example:
        >>> import torch
        >>> from difflayers.morphology import skeletonize
        >>> ring = torch.ones(1, 1, 5, 7)
        >>> ring[..., 2, 2:5] = 0
        >>> skeletonize(ring, probabilistic=False)[0, 0].int()
        tensor([[0, 0, 1, 1, 1, 0, 0],
                [0, 1, 0, 0, 0, 1, 0],
                [1, 0, 0, 0, 0, 0, 1],
                [0, 1, 0, 0, 0, 1, 0],
                [0, 0, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """
    _check_options(beta, tau, simple_point_detection, num_iter, gradient)
    ndim = check_images(image)
    level = _relaxed_coin(image, beta, tau, generator) if probabilistic else image
    problem = _Peeling(ndim, simple_point_detection, num_iter, gradient)
    operands = visible_to_modes([image.detach(), level.detach()])
    _, skeleton, weight = ImplicitFunction.apply(problem, image.new_zeros(0), *operands)
    return skeleton + weight * (level - level.detach())


class Skeletonize(nn.Module):
    """Skeletons of images: :func:`skeletonize` as a module, with the arguments of the published one.

    Args:
        probabilistic: make a grey image binary at random; else at ½.
        beta: scale of the logistic noise.
        tau: temperature.
        simple_point_detection: ``"Boolean"`` or ``"EulerCharacteristic"``.
        num_iter: rounds of peeling; None: until nothing changes.
        gradient: ``"reference"`` or ``"mask"``.

    Example:
        >>> import torch
        >>> from difflayers import Skeletonize
        >>> image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> skeleton = Skeletonize(num_iter=3)(image, torch.Generator().manual_seed(1))
        >>> skeleton.sum().backward()
        >>> bool(image.grad.any())
        True
    """

    def __init__(
        self,
        probabilistic: bool = True,
        beta: float = 0.33,
        tau: float = 1.0,
        simple_point_detection: Detection = "Boolean",
        num_iter: int | None = 5,
        gradient: Gradient = "reference",
    ) -> None:
        super().__init__()
        _check_options(beta, tau, simple_point_detection, num_iter, gradient)
        self.probabilistic, self.beta, self.tau = probabilistic, beta, tau
        self.simple_point_detection: Detection = simple_point_detection
        self.num_iter = num_iter
        self.gradient: Gradient = gradient

    def forward(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """The skeleton, of the shape of the image."""
        return skeletonize(
            image,
            probabilistic=self.probabilistic,
            beta=self.beta,
            tau=self.tau,
            simple_point_detection=self.simple_point_detection,
            num_iter=self.num_iter,
            gradient=self.gradient,
            generator=generator,
        )

    def extra_repr(self) -> str:
        """The options."""
        noise = f"beta={self.beta}, tau={self.tau}" if self.probabilistic else "probabilistic=False"
        return f"{noise}, num_iter={self.num_iter}, gradient={self.gradient!r}, simple_point_detection={self.simple_point_detection!r}"


def _relaxed_coin(image: Tensor, beta: float, tau: float, generator: Generator | None) -> Tensor:
    # Half precision has no 1e-8.
    p = image.to(torch.promote_types(image.dtype, torch.float32))
    log_odds = torch.log((p + 1e-8) / (1 - p + 1e-8))
    if beta:
        uniform = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator).clamp(min=1e-8)
        log_odds = log_odds + beta * (uniform.log() - torch.log1p(-uniform))
    return torch.sigmoid(log_odds / tau).to(image.dtype)


class _Peeling(BroadcastingProblem):
    """The skeleton and the weights of its derivative, on plain tensors, for all elements of all vmaps at once."""

    def __init__(self, ndim: int, detection: Detection, num_iter: int | None, gradient: Gradient, batch_ndim: int = 0) -> None:
        super().__init__(batch_ndim)
        self.core_ndims = (ndim + 2, ndim + 2)
        self.options = (ndim, detection, num_iter, gradient)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        ndim, detection, num_iter, gradient = self.options
        check_probabilities(theta[0])
        image, level = torch.broadcast_tensors(*theta)
        binary = (level > 0.5).flatten(0, level.dim() - ndim - 1)
        found = peel(binary, num_iter, detection, count_ties=gradient == "reference")
        kept = found.skeleton.bool()
        if found.ties is None:
            weight = torch.ones_like(kept, dtype=image.dtype)
        else:
            # A table, since not every device's power of two is exact; no dtype goes below 2⁻¹⁰⁷⁴.
            ties = found.ties.clamp(max=1075)
            most = int(ties.max()) if ties.numel() else 0
            weight = torch.tensor([0.5**k for k in range(most + 1)], dtype=image.dtype, device=image.device)[ties]
        weight = weight.masked_fill(binary & ~kept, 0)
        return x0.clone(), kept.to(image.dtype).reshape(image.shape), weight.reshape(image.shape)

    def deeper(self, size: int) -> _Peeling:
        return _Peeling(*self.options, self.batch_ndim + 1)


def _check_options(beta: float, tau: float, detection: str, num_iter: int | None, gradient: str) -> None:
    if not (0 <= beta < float("inf") and 0 < tau < float("inf")):
        raise ValueError(f"beta must be at least 0 and tau positive, got beta {beta} and tau {tau}")
    if num_iter is not None:
        check_count(num_iter, "num_iter")
    check_choice(detection, "simple_point_detection", get_args(Detection))
    check_choice(gradient, "gradient", get_args(Gradient))
