"""Derivatives of a residual where solvers need them: Jacobian products, the dense Jacobian, gradients of an objective.

Solver loops run inside an autograd.Function, on plain tensors, yet a caller may have switched on what torch.func
refuses to nest in: a ``forward_ad.dual_level`` (then forward mode is taken as the transpose of the transpose) or the
saved-tensor hooks of a checkpoint (then they are lifted while the solver looks at its own derivative).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["block_jacobian", "jvp", "value_and_grad", "vjp", "without_saved_tensor_hooks"]


@contextmanager
def without_saved_tensor_hooks() -> Generator[None]:
    """Lift the saved-tensor hooks (of checkpoint, of offloading) inside the block: torch.func transforms refuse to run under them."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """``function(*primals)`` and its pullback, as torch.func.vjp, but usable under saved-tensor hooks."""
    with without_saved_tensor_hooks():
        value, pullback = torch.func.vjp(function, *primals)[:2]

    def apply(cotangent: Any) -> tuple[Any, ...]:
        with without_saved_tensor_hooks():
            return pullback(cotangent)

    return value, apply


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """``function(*primals)`` and its derivative along ``tangents``, as torch.func.jvp, but usable under any dual level."""
    # A dual tensor shares its strides with its tangent, and nothing can be written to the overlapping entries of an expanded one.
    primals = tuple(primal.contiguous() for primal in primals)
    if _forward_mode_nests():
        with without_saved_tensor_hooks():
            value, tangent = torch.func.jvp(function, primals, tangents)[:2]
        # Under vmap, torch 2.13 promotes the tangent of "0.2 * x" to float64 if x is a float32 scalar.
        return value, tangent.to(value.dtype)
    value, pullback = vjp(function, *primals)
    # The pullback is linear in its cotangent, so its own pullback is the pushforward.
    _, pushforward = vjp(pullback, torch.zeros_like(value))
    return value, pushforward(tangents)[0]


def block_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of each independent problem: ``(*batch, m, n)`` for a row-wise ``function``: ``(*batch, n) -> (*batch, m)``.

    Args:
        function: maps the whole batch, each row on its own.
        x: ``(*batch, n)``, where to differentiate.
    """
    x = x.contiguous()
    value, pullback = vjp(function, x)
    m, n = value.shape[-1], x.shape[-1]
    with without_saved_tensor_hooks():
        if m <= 2 * n:
            return torch.func.vmap(lambda u: pullback(u)[0])(_basis(value)).movedim(0, -2)
        columns = torch.func.vmap(lambda v: jvp(function, (x,), (v,))[1])(_basis(x))
    return columns.movedim(0, -1).to(x.dtype)


def _basis(like: Tensor) -> Tensor:
    """The unit vectors of the last dimension, each for the whole batch: ``(n, *batch, n)``."""
    n = like.shape[-1]
    return torch.eye(n, dtype=like.dtype, device=like.device).reshape(n, *[1] * (like.dim() - 1), n).expand(n, *like.shape)


def value_and_grad(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``objective(x)`` of shape ``(*batch,)`` and the gradient of each element in its own row of ``x`` ``(*batch, n)``."""
    value, pullback = vjp(objective, x)
    return value, pullback(torch.ones_like(value))[0]


def _forward_mode_nests() -> bool:
    # Plain forward_ad.dual_level forbids nesting, torch.func.jvp's own levels do not.
    return forward_ad._current_level < 0 or torch._functorch.eager_transforms.JVP_NESTING > 0
