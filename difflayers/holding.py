"""What a module is given, kept where PyTorch expects it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["hold"]


def hold(module: nn.Module, name: str, value: Any) -> None:
    """Make ``value`` an attribute of ``module``: a parameter stays one and is learned, any other tensor is a buffer, the rest is as it is.

    Args:
        module: whose attribute it becomes.
        name: of the attribute.
        value: anything.
    """
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
