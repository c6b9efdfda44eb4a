r"""The method of lines: a partial differential equation on a mesh in space is a stiff system y' = f(t, y), which SciPy integrates.

The integrator chooses its steps and orders by itself so that each step stays within ``rtol`` and ``atol``: the error in time is
its affair, the one in space that of the mesh. Elements of a batch are integrated one by one, each with its own steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import NotConvergedError

__all__ = ["cells_for", "method_of_lines", "refined"]


def method_of_lines(rate: Callable[[float, Any], Any], initial: Tensor, t: Tensor, *, rtol: float, atol: float, **options: Any) -> Tensor:
    """Integrates y' = rate(t, y) from each row of ``initial``.

    Args:
        rate: f(t, y) on NumPy arrays ``(n,)``.
        initial: ``(*batch, n)``.
        t: ``(times,)``, increasing; the first one belongs to ``initial``.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        **options: for ``scipy.integrate.solve_ivp``: the method, the bands of the Jacobian.

    Returns:
        ``(*batch, times, n)`` in float64 on the CPU.

    Raises:
        NotConvergedError: the integrator gave up, or met numbers that are not finite.
    """
    import numpy as np
    from scipy.integrate import solve_ivp

    def finite_rate(time: float, value: Any) -> Any:
        # LSODA takes an infinite rate for a number, and goes on for long.
        with np.errstate(over="ignore", invalid="ignore"):
            slope = rate(time, value)
        if not np.isfinite(slope).all():
            raise FloatingPointError(f"the solution is not finite, or its rate of change is not, at t = {time:.4g}.")
        return slope

    rows, ticks = initial.detach().to("cpu", torch.float64).numpy(), t.numpy()
    y = torch.empty(*initial.shape[:-1], len(t), initial.shape[-1], dtype=torch.float64)
    for index in np.ndindex(*rows.shape[:-1]):
        try:
            found = solve_ivp(finite_rate, (ticks[0], ticks[-1]), rows[index], t_eval=ticks, rtol=rtol, atol=atol, **options)
            if not found.success:
                raise FloatingPointError(f"it did not go beyond t = {found.t[-1]:g}. {found.message}")
        except FloatingPointError as error:
            message = (
                f"no reference solution for element {index}: {error} Look whether its initial condition is one that the equation can keep."
            )
            raise NotConvergedError(message, indices=[index]) from error
        y[index] = torch.from_numpy(found.y.T)
    return y


def cells_for(wanted: int, cells: int) -> int:
    """Into how many parts each of ``cells`` cells has to be divided to make at least ``wanted`` of them."""
    return math.ceil(wanted / cells)


def refined(u: Tensor, factor: int) -> Tensor:
    """``(*batch, n)`` → ``(*batch, (n − 1)·factor + 1)`` in float64, by cubics that make no new maxima or minima (PCHIP)."""
    from scipy.interpolate import pchip_interpolate

    rows = u.detach().to("cpu", torch.float64)
    if factor == 1:
        return rows.clone()
    coarse = torch.arange(rows.shape[-1])
    fine = torch.arange((len(coarse) - 1) * factor + 1) / factor
    return torch.from_numpy(pchip_interpolate(coarse.numpy(), rows.numpy(), fine.numpy(), axis=-1))
