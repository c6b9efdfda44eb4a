r"""Exponential time differencing: the linear part of y' = λ y + N(y) is integrated exactly, however stiff, the rest to fourth order.

Of the explicit Runge–Kutta method with four stages of Cox and Matthews (ETDRK4). λ is diagonal, as a Laplacian is among waves. Its
coefficients are divided differences of the exponential, which cancel near zero; as means over a circle around λh they do not.

References: Cox and Matthews, Exponential time differencing for stiff systems, Journal of Computational Physics 176 (2002); Kassam and
Trefethen, Fourth-order time-stepping for stiff PDEs, SIAM Journal on Scientific Computing 26 (2005).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...errors import NotConvergedError

__all__ = ["etdrk4", "exponential_integration"]

_DOUBLINGS = 12


def exponential_integration(
    rate: Tensor, nonlinear: Callable[[Tensor], Tensor], start: Tensor, t: Tensor, *, step: float, tol: float
) -> Tensor:
    """Integrates y' = λ y + N(y), with steps halved until nothing changes.

    Args:
        rate: λ ≤ 0, of the shape of y.
        nonlinear: N.
        start: y at the first of the times.
        t: ``(times,)``, equidistant.
        step: the longest step to begin with.
        tol: half the step changes no number by more than this, relative to the largest.

    Returns:
        ``(times, *y)``.

    Raises:
        NotConvergedError: ``tol`` was not reached.
    """
    between = float(t[1] - t[0])
    count = max(1, round(between / step))
    found = torch.stack([start, *etdrk4(rate, nonlinear, start, len(t) - 1, between, count)])
    for _ in range(_DOUBLINGS):
        before, count = found, 2 * count
        found = torch.stack([start, *etdrk4(rate, nonlinear, start, len(t) - 1, between, count)])
        if bool((found - before).abs().max() <= tol * found.abs().max()):
            return found
    raise NotConvergedError(f"no reference solution: {count} steps from one time to the next do not reach tol = {tol:.0e}")


def etdrk4(rate: Tensor, nonlinear: Callable[[Tensor], Tensor], y: Tensor, times: int, between: float, count: int) -> Iterator[Tensor]:
    """The solution of y' = λ y + N(y) at one time after another.

    Args:
        rate: λ, real, of the shape of y or of its last dimensions.
        nonlinear: N.
        y: where it starts.
        times: how many follow.
        between: from each to the next.
        count: the steps between them.
    """
    h = between / count
    phi1, phi2, phi3 = _phi(rate * h)
    whole, half, inner = (rate * h).exp(), (rate * h / 2).exp(), h / 2 * _phi(rate * h / 2)[0]
    first, middle, last = h * (phi1 - 3 * phi2 + 4 * phi3), h * (2 * phi2 - 4 * phi3), h * (4 * phi3 - phi2)
    for _ in range(times):
        for _ in range(count):
            at_start = nonlinear(y)
            a = half * y + inner * at_start
            at_a = nonlinear(a)
            at_b = nonlinear(half * y + inner * at_a)
            at_c = nonlinear(half * a + inner * (2 * at_b - at_start))
            y = whole * y + first * at_start + middle * (at_a + at_b) + last * at_c
        yield y


def _phi(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ₁(z) = (eᶻ − 1)/z, φ₂ = (φ₁ − 1)/z, φ₃ = (φ₂ − ½)/z."""
    circle = z.unsqueeze(-1) + torch.exp(1j * torch.pi * (torch.arange(32, dtype=z.dtype, device=z.device) + 0.5) / 32)
    phi1 = (circle.exp() - 1) / circle
    phi2 = (phi1 - 1) / circle
    phi3 = (phi2 - 0.5) / circle
    return phi1.real.mean(-1), phi2.real.mean(-1), phi3.real.mean(-1)
