r"""Layers whose weights cannot become negative, whatever an optimizer does to their parameters.

The weight is :math:`W = V ∘ V`, a parametrization of :mod:`torch.nn.utils.parametrize`: V is the parameter, W what the layer
computes with. So no step has to be followed by a projection, and a state dict that was tampered with still is a convex network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["NonNegative", "NonNegativeConv2d", "NonNegativeLinear"]


class NonNegative(nn.Module):
    """The parametrization V ↦ V²."""

    def forward(self, raw: Tensor) -> Tensor:
        """The weight.

        Args:
            raw: V.
        """
        return raw.square()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """V from a weight that is to be set.

        Args:
            weight: not negative.

        Raises:
            ValueError: an entry is negative.
        """
        if bool((weight < 0).any()):
            raise ValueError(f"the weight must not be negative, got an entry {float(weight.min()):.3g}: the network would not be convex")
        return weight.sqrt()


class _NonNegative(nn.Module):
    """What the layers share: the parametrization, a scale of the initial weights, and pickling.

    The initial weights are uniform with the mean 1 / fan-in, so that a layer passes averages on.
    """

    weight: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, bias=False, **options)
        self._made_by = (args, options)
        parametrize.register_parametrization(self, "weight", NonNegative())

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        fan_in = self.weight[0].numel()
        with torch.no_grad():
            self.weight.uniform_(0, 2 / fan_in)

    def __reduce__(self) -> Any:
        # A parametrized module has a class of its own, made on the fly, which pickle cannot find again.
        kind = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        args, options = self._made_by
        return _remake, (kind, args, options, self.state_dict(), self.training)


def _remake(kind: Any, args: tuple[Any, ...], options: dict[str, Any], state: dict[str, Tensor], training: bool) -> Any:
    made = kind(*args, **options)
    made.load_state_dict(state, assign=True)
    return made.train(training)


class NonNegativeLinear(_NonNegative, nn.Linear):
    """A linear layer without bias whose weight is not negative.

    Args:
        in_features, out_features: as of :class:`torch.nn.Linear`.
        dtype, device: likewise.
    """


class NonNegativeConv2d(_NonNegative, nn.Conv2d):
    """A convolution without bias whose kernel is not negative.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as of :class:`torch.nn.Conv2d`.
        dtype, device: likewise.
    """
