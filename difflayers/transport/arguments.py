"""What the layers share before and after they solve: arguments that fit together, and marginals that admit a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..solution import OnFailure, Status

__all__ = [
    "BALANCED",
    "centred",
    "check_clouds",
    "cleaned",
    "filled_where_lost",
    "flattened",
    "infeasibility",
    "marginal_error",
    "stopping",
    "validate",
    "what_failed",
    "with_masses",
]

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
    batch, masses = with_masses(cost, (n, m), [cost.shape[:-2]], a, b, strength, name)
    return batch, (cost, *masses)


def check_clouds(x: Tensor, y: Tensor) -> None:
    """Refuse what is not two clouds of points that can be compared.

    Args:
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2 or 0 in value.shape[-2:]:
            came = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{name} must be floating points (*batch, n, d) with n, d ≥ 1, got {came}")
    if x.shape[-1] != y.shape[-1] or x.dtype != y.dtype or x.device != y.device:
        raise ShapeError(
            f"both clouds must have points of one dimension, dtype and device: got {tuple(x.shape)} {x.dtype} on {x.device} and "
            f"{tuple(y.shape)} {y.dtype} on {y.device}"
        )


def with_masses(
    like: Tensor,
    sizes: tuple[int, int],
    batches: Sequence[Sequence[int]],
    a: Tensor | None,
    b: Tensor | None,
    strength: float | Tensor,
    name: str,
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """The batch shape, and both marginals and the strength as tensors.

    Args:
        like: the cost or the points, of the dtype and on the device that the marginals must have.
        sizes: n and m.
        batches: batch shapes of the other arguments.
        a: ``(*batch, n)`` or None.
        b: ``(*batch, m)`` or None.
        strength: of the regularization, a positive number or ``(*batch,)``.
        name: what its argument is called.
    """
    found = []
    for side, value, size in (("a", a, sizes[0]), ("b", b, sizes[1])):
        value = like.new_full((size,), 1 / size) if value is None else value
        if not isinstance(value, Tensor) or value.dtype != like.dtype or value.device != like.device:
            came = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{side} must be a tensor like the cost ({like.dtype} on {like.device}), got {came}; convert one of them")
        if value.dim() < 1 or value.shape[-1] != size:
            raise ShapeError(f"{side} must have the shape (*batch, {size}) for n = {sizes[0]}, m = {sizes[1]}, got {tuple(value.shape)}")
        found.append(value)
    if not isinstance(strength, Tensor):
        if not 0 < strength < float("inf"):
            raise ValueError(f"{name} must be positive, got {strength}; the unregularized problem is a linear program, see solve_qp")
        strength = torch.full((), strength, dtype=torch.float64, device=like.device)
    shapes = [*batches, *(value.shape[:-1] for value in found), strength.shape]
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        shown = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ShapeError(f"batch dimensions do not broadcast: {shown} (the last three: a, b and {name})") from error
    return tuple(batch), (found[0], found[1], strength)


def stopping(tol: float | None, max_iter: int | None, dtype: torch.dtype) -> float:
    """The tolerance, relative to the mass. None: 1e-10 (float64), 1e-6 (float32).

    Args:
        tol: what the caller gives.
        max_iter: what the caller gives.
        dtype: of the arguments.

    Raises:
        ValueError: max_iter is less than 1.
    """
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    return (1e-10 if dtype == torch.float64 else 1e-6) if tol is None else tol


def cleaned(given: Sequence[Tensor], prices: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """What is given, and prices, in float64 with harmless numbers in the elements that are not usable, and which ones are.

    Args:
        given: matrices (the cost, or two clouds), both marginals and the strength, with a common batch.
        prices: 1/ρ of both sides, ``(*batch,)`` in float64, of which one is positive; or none.
    """
    *matrices, a, b, strength = (part.to(torch.float64) for part in given)
    # A sum is finite if its terms are; asking each term takes longer.
    total = sum((matrix.sum((-1, -2)) for matrix in matrices), a.sum(-1) + b.sum(-1) + strength)
    usable = torch.isfinite(total) & (strength > 0)
    for price in prices:
        usable = usable & torch.isfinite(price) & (price >= 0) & (sum(prices) > 0)
    # A NaN would come back as 0 · NaN in the gradients, and so would the logarithm of a zero marginal.
    matrices, strength = [torch.where(usable[..., None, None], matrix, 0) for matrix in matrices], torch.where(usable, strength, 1)
    a, b = (torch.where(usable.unsqueeze(-1), torch.where(part != 0, part, 0), 1 / part.shape[-1]) for part in (a, b))
    return *matrices, a, b, strength, *(torch.where(usable, price, 1) for price in prices), usable


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The larger of the two sides' 1-norms, ``(*batch,)``.

    Args:
        plan: ``(*batch, n, m)``.
        a: ``(*batch, n)``, the row sums that are wanted.
        b: ``(*batch, m)``.
    """
    return torch.maximum((plan.sum(-1) - a).abs().sum(-1), (plan.sum(-2) - b).abs().sum(-1))


def infeasibility(a: Tensor, b: Tensor, balanced: float) -> Tensor:
    """What the marginals lack to admit a plan, ``(*batch,)``; not positive where they do.

    Args:
        a: ``(*batch, n)``.
        b: ``(*batch, m)``.
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


def centred(x: Tensor, a: Tensor, b: Tensor, *, free: bool = True) -> tuple[Tensor, Tensor]:
    """The potentials f and g, −inf where a marginal is zero.

    Args:
        x: (f, g), ``(*batch, n + m)``.
        a: ``(*batch, n)``.
        b: ``(*batch, m)``.
        free: whether f and g may exchange a constant; it is chosen so that ⟨a, f⟩ = ⟨b, g⟩.
    """
    f, g = x.split([a.shape[-1], b.shape[-1]], -1)
    if free:
        mass = a.sum(-1)
        half = (((a * f).sum(-1) - (b * g).sum(-1)) / torch.where(mass > 0, 2 * mass, 1)).unsqueeze(-1)
        f, g = f - half, g + half
    return torch.where(a > 0, f, -torch.inf), torch.where(b > 0, g, -torch.inf)


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
