"""What the functions on images ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ShapeError
from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction

__all__ = ["check_choice", "check_count", "check_images", "check_probabilities", "probabilities"]


def check_images(images: Tensor, name: str = "image", *, floating: bool = True) -> int:
    """The number of spatial dimensions, two or three.

    Args:
        images: ``(B, C, H, W)`` or ``(B, C, D, H, W)``.
        name: what the message calls them.
        floating: refuse integers and booleans.

    Raises:
        ShapeError: they are something else.
    """
    if not isinstance(images, Tensor) or images.dim() not in (4, 5):
        came = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(
            f"{name} must be a tensor of images (B, C, H, W) or of volumes (B, C, D, H, W), got {came}; add dimensions of size 1"
        )
    if images.is_complex() or (floating and not images.is_floating_point()):
        raise ShapeError(f"{name} must be of a floating dtype, got {images.dtype}; convert it, e.g. {name}.float()")
    return images.dim() - 2


def check_probabilities(images: Tensor, name: str = "image", advice: str = "of logits, take torch.sigmoid first") -> None:
    """Refuse values outside [0, 1], and NaN.

    Args:
        images: plain, of any shape.
        name: what the message calls them.
        advice: what the message says last.

    Raises:
        ValueError: with the range that came.
    """
    if images.numel() == 0:
        return
    low, high = (float(end) for end in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must have values in [0, 1], got {low:.4g} to {high:.4g}; {advice}")


@eager
def probabilities(images: Tensor, name: str, advice: str) -> Tensor:
    """The images themselves, after :func:`check_probabilities`, in any transform.

    Args:
        images: ``(B, C, ...)``.
        name: what the message calls them.
        advice: what the message says last.
    """
    # On plain tensors, below all transforms: whether to raise depends on the data.
    ImplicitFunction.apply(_Range(images.dim(), name, advice), images.new_zeros(0), *visible_to_modes([images.detach()]))
    return images


class _Range(BroadcastingProblem):
    """Nothing but a check."""

    def __init__(self, core_ndim: int, name: str, advice: str, batch_ndim: int = 0) -> None:
        super().__init__(batch_ndim)
        self.core_ndims = (core_ndim,)
        self.said = (name, advice)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        check_probabilities(theta[0], *self.said)
        return (x0.clone(),)

    def deeper(self, size: int) -> _Range:
        return _Range(self.core_ndims[0], *self.said, self.batch_ndim + 1)


def check_count(value: int, name: str, least: int = 0) -> None:
    """Refuse what is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(value: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; choose one of {', '.join(known)}")
