"""Exact derivatives of a root by other means than the package: Newton's method, differentiated by autograd.

The iterates are detached but for the last two steps, which make derivatives exact up to order three. Systems go through
``torch.linalg.inv``, which is right under every nest of vmap, as ``torch.linalg.solve`` is not (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import jacrev
from torch.linalg import inv

__all__ = ["newton_root", "relative_error"]


def newton_root(residual: Callable[..., Tensor], start: Tensor, *args: Tensor, steps: int = 12) -> Tensor:
    """The x ``(n,)`` near ``start`` with ``residual(x, *args) == 0``, differentiable in ``args`` up to order three."""

    def step(x: Tensor) -> Tensor:
        return x - inv(jacrev(residual)(x, *args)) @ residual(x, *args)

    x = start
    for _ in range(steps):
        x = step(x).detach()
    return step(step(x))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The largest deviation, relative to the largest entry of ``exact``; inf if the shapes differ or something is not finite."""
    if value.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    scale = float(exact.detach().abs().max())
    error = float((value.detach() - exact.detach()).abs().max())
    return (error / scale if scale else error) if error == error else float("inf")
