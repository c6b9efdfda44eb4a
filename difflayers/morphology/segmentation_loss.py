"""What losses on segmentations share: activation, classes and reduction, under the names that MONAI gives them."""

from __future__ import annotations

import abc
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from .arguments import check_choice, check_images, probabilities

__all__ = ["SegmentationLoss"]


class SegmentationLoss(nn.Module, abc.ABC):
    """A loss between a prediction and a target, one number an image.

    Args:
        include_background: whether channel 0 counts; without it there must be another.
        to_onehot_y: the target holds class indices ``(B, 1, ...)``.
        sigmoid: the input holds logits of independent channels.
        softmax: the input holds logits of exclusive classes.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``: ``(B,)``.
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if sigmoid and softmax:
            raise ValueError("sigmoid and softmax exclude each other: choose sigmoid for channels, softmax for classes")
        check_choice(reduction, "reduction", ("mean", "sum", "none"))
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.sigmoid, self.softmax = sigmoid, softmax
        self.reduction = reduction

    @abc.abstractmethod
    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``(B,)`` of probabilities ``(B, C, ...)`` and a target of the same shape."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: ``(B, C, H, W)`` or ``(B, C, D, H, W)``: probabilities, or logits if ``sigmoid`` or ``softmax``.
            target: of the same shape, in [0, 1]; with ``to_onehot_y`` class indices in one channel.

        Raises:
            ShapeError: the shapes do not fit.
            ValueError: the input has values outside [0, 1] and no activation was asked for, or the target has.
        """
        check_images(input, "input")
        classes = input.shape[1]
        if self.sigmoid:
            prediction = torch.sigmoid(input)
        elif self.softmax:
            if classes < 2:
                raise ShapeError(
                    f"softmax needs two channels or more, got the shape {tuple(input.shape)}; of one channel take sigmoid=True"
                )
            prediction = torch.softmax(input, 1)
        else:
            prediction = probabilities(input, "input", "of logits, set sigmoid=True or softmax=True")
        if self.to_onehot_y:
            if target.dim() != input.dim() or target.shape[1] != 1:
                raise ShapeError(f"target must hold class indices in one channel, got the shape {tuple(target.shape)}")
            target = functional.one_hot(target[:, 0].long(), classes).movedim(-1, 1)
        if target.shape != input.shape:
            raise ShapeError(
                f"target must have the shape {tuple(input.shape)} of the input, got {tuple(target.shape)}; of indices, set to_onehot_y=True"
            )
        target = probabilities(target.to(prediction), "target", "of class indices, set to_onehot_y=True")
        if not self.include_background:
            if classes < 2:
                raise ShapeError("include_background=False leaves nothing of one channel")
            prediction, target = prediction[:, 1:], target[:, 1:]
        losses = self.each(prediction, target)
        return losses.mean() if self.reduction == "mean" else losses.sum() if self.reduction == "sum" else losses

    def extra_repr(self) -> str:
        """The options that are not the usual ones."""
        names = ["to_onehot_y", "sigmoid", "softmax"]
        shown = [f"{name}=True" for name in names if getattr(self, name)]
        shown += [] if self.include_background else ["include_background=False"]
        return ", ".join([*shown, f"reduction={self.reduction!r}"])
