r"""The method of lines: a partial differential equation on a fine mesh in space is a stiff system y' = f(t, y), which SciPy integrates.

The integrator chooses its steps and orders by itself so that each stays within ``rtol`` and ``atol``: the error in time is
its affair, and the one in space that of the mesh. Elements of a batch are integrated one by one, each with its own steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import NotConvergedError

__all__ = ["method_of_lines"]


def method_of_lines(rate: Callable[[float, Any], Any], initial: Any, times: Any, *, rtol: float, atol: float, **options: Any) -> Tensor:
    """Integrates y' = rate(t, y) from each row of ``initial``.

    Args:
        rate: f(t, y) on arrays ``(n,)``.
        initial: array ``(*batch, n)``.
        times: array ``(times,)``, increasing; the first one belongs to ``initial``.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        **options: for ``scipy.integrate.solve_ivp``: the method, and the Jacobian or its bands.

    Returns:
        ``(*batch, times, n)`` in float64.

    Raises:
        NotConvergedError: the integrator gave up, or its numbers stopped being finite.
    """
    from scipy.integrate import solve_ivp

    batch = initial.shape[:-1]
    solutions = np.empty((*batch, len(times), initial.shape[-1]))
    for index in np.ndindex(*batch):
        # A step that overflows is shortened or given up by the integrator, and the latter is reported below.
        with np.errstate(over="ignore", invalid="ignore"):
            found = solve_ivp(rate, (times[0], times[-1]), initial[index], t_eval=times, rtol=rtol, atol=atol, **options)
        if not found.success or not np.isfinite(found.y).all():
            reached = found.t[-1] if len(found.t) else times[0]
            raise NotConvergedError(
                f"the reference solution of element {index} reached t = {reached:g} of {times[-1]:g}: {found.message} "
                "Try other tolerances or a finer mesh, and look whether the initial condition is finite and in the range of the equation.",
                solution=found,
                indices=[index],
            )
        solutions[index] = found.y.T
    return torch.from_numpy(solutions)
