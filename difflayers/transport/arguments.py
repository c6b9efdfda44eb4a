"""What the layers share before and after they solve: arguments that fit together, and marginals that admit a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..solution import OnFailure, Status

__all__ = ["BALANCED", "cleaned", "filled_where_lost", "flattened", "infeasibility", "validate", "what_failed"]

# Relative differences of the masses of a and b that count as rounding.
BALANCED = {torch.float64: 1e-9, torch.float32: 1e-5}


def validate(
    cost: Tensor, a: Tensor | None, b: Tensor | None, strength: float | Tensor, name: str = "epsilon"
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The batch shape, and all the arguments as tensors.

    Args:
        cost: ``(*batch, n, m)``.
        a: ``(*batch, n)`` or None.
        b: ``(*batch, m)`` or None.
        strength: of the regularization, a positive number or ``(*batch,)``.
        name: what its argument is called.
    """
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        raise ShapeError(f"cost must be a floating tensor, got {cost.dtype if isinstance(cost, Tensor) else type(cost).__name__}")
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ShapeError(f"cost must have the shape (*batch, n, m) with n, m ≥ 1, got {tuple(cost.shape)}")
    n, m = cost.shape[-2:]
    a = cost.new_full((n,), 1 / n) if a is None else a
    b = cost.new_full((m,), 1 / m) if b is None else b
    for side, value, size in (("a", a, n), ("b", b, m)):
        if not isinstance(value, Tensor) or value.dtype != cost.dtype or value.device != cost.device:
            came = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{side} must be a tensor like the cost ({cost.dtype} on {cost.device}), got {came}; convert one of them")
        if value.dim() < 1 or value.shape[-1] != size:
            raise ShapeError(f"{side} must have the shape (*batch, {size}) for a cost (*batch, {n}, {m}), got {tuple(value.shape)}")
    if not isinstance(strength, Tensor):
        if not 0 < strength < float("inf"):
            raise ValueError(f"{name} must be positive, got {strength}; the unregularized problem is a linear program, see solve_qp")
        strength = torch.full((), strength, dtype=torch.float64, device=cost.device)
    try:
        batch = torch.broadcast_shapes(cost.shape[:-2], a.shape[:-1], b.shape[:-1], strength.shape)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in (cost, a, b, strength))
        raise ShapeError(f"batch dimensions of cost, a, b and {name} do not broadcast: {shapes}") from error
    return tuple(batch), (cost, a, b, strength)


def cleaned(given: Sequence[Tensor], prices: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Cost, marginals, strength and prices in float64 with harmless numbers in the elements that are not usable, and which ones are.

    Args:
        given: as :func:`validate` returns them.
        prices: 1/ρ of both sides, ``(*batch,)`` in float64, of which one is positive; or none.
    """
    C, a, b, strength = (part.to(torch.float64) for part in given)
    # A sum is finite if its terms are; asking each term takes longer.
    usable = torch.isfinite(C.sum((-1, -2)) + a.sum(-1) + b.sum(-1) + strength) & (strength > 0)
    for price in prices:
        usable = usable & torch.isfinite(price) & (price >= 0) & (sum(prices) > 0)
    # A NaN would come back as 0 · NaN in the gradients, and so would the logarithm of a zero marginal.
    C, strength = torch.where(usable[..., None, None], C, 0), torch.where(usable, strength, 1)
    a, b = (torch.where(usable.unsqueeze(-1), torch.where(part != 0, part, 0), 1 / part.shape[-1]) for part in (a, b))
    return C, a, b, strength, *(torch.where(usable, price, 1) for price in prices), usable


def infeasibility(a: Tensor, b: Tensor, balanced: float) -> Tensor:
    """What the marginals lack to admit a plan, ``(N,)``; not positive where they do.

    Args:
        a: ``(N, n)``.
        b: ``(N, m)``.
        balanced: the relative difference of the masses that counts as rounding.
    """
    mass = a.sum(-1)
    return torch.stack([(mass - b.sum(-1)).abs() - balanced * mass, -a.amin(-1), -b.amin(-1)]).amax(0)


def flattened(theta: Sequence[Any], batch: Sequence[int], core_ndims: Sequence[int]) -> tuple[Tensor, ...]:
    """The arguments with one batch dimension.

    Args:
        theta: tensors ``(*batch, *core)`` whose batch dimensions broadcast.
        batch: the whole batch.
        core_ndims: for each of θ the dimensions that are not batch.
    """
    return tuple(
        part.expand((*batch, *part.shape[part.dim() - core :])).reshape(math.prod(batch), *part.shape[part.dim() - core :])
        for part, core in zip(theta, core_ndims, strict=True)
    )


def what_failed(name: str, status: Tensor, a: Tensor, b: Tensor, *, wanted: str = "a and b must have the same total mass") -> str:
    """The name of the solve, with what is wrong with the first marginals that admit no plan.

    Args:
        name: of the solve.
        status: ``(N,)``.
        a: ``(N, n)``.
        b: ``(N, m)``.
        wanted: of marginals that are not negative.
    """
    wrong = (status == Status.PRIMAL_INFEASIBLE).nonzero()
    if not len(wrong):
        return name
    a, b = a[int(wrong[0])], b[int(wrong[0])]
    if min(float(a.min()), float(b.min())) < 0:
        return f"{name} (marginals must not be negative; the smallest entry is {min(float(a.min()), float(b.min())):.3g})"
    return f"{name} ({wanted}; a sums to {float(a.sum()):.9g}, b to {float(b.sum()):.9g})"


def filled_where_lost(found: Sequence[Tensor], status: Tensor, on_failure: OnFailure) -> list[Tensor]:
    """What was found, NaN where ``on_failure`` or an unusable argument wants it.

    Args:
        found: tensors ``(*batch, ...)``.
        status: ``(*batch,)``.
        on_failure: the caller's choice.
    """
    if on_failure == "raise":
        return list(found)
    lost = status != Status.SOLVED if on_failure == "nan" else status == Status.NUMERICAL_ERROR
    return [torch.where(lost.reshape((*lost.shape, *[1] * (part.dim() - lost.dim()))), torch.nan, part) for part in found]
