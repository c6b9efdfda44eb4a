"""Plain sweeps in the log domain with autograd through all of them: what implicit derivatives are compared with.

All elements of a batch sweep until the last of them meets its marginals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Solution, Status, report_failures
from .arguments import infeasibility, marginal_error
from .marginals import Options, plan_of

__all__ = ["unrolled_potentials"]

_SWEEPS = 1000


def unrolled_potentials(
    C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, usable: Tensor, start: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials ``(*batch, n + m)`` whose graph holds every sweep, status, marginal error and iterations.

    Args:
        C: ``(*batch, n, m)``.
        a: ``(*batch, n)``.
        b: ``(*batch, m)``.
        epsilon: ``(*batch,)``.
        usable: ``(*batch,)``, which elements are finite.
        start: ``(*batch, n + m)`` zeros.
        options: of the solve; ``method`` is not used.
    """
    sizes = list(C.shape[-2:])
    scale = epsilon.unsqueeze(-1)
    g = start[..., sizes[0] :]
    log_a, log_b = (torch.where(part > 0, torch.where(part > 0, part, 1).log(), -torch.inf) for part in (a, b))
    with torch.no_grad():
        mass = a.sum(-1)
        feasible = (infeasibility(a, b, options.balanced) <= 0) & usable
    for iteration in range(1, (options.max_iter or _SWEEPS) + 1):
        columns = torch.where(b > 0, g, -torch.inf)
        f = scale * (log_a - torch.logsumexp((columns.unsqueeze(-2) - C) / scale.unsqueeze(-1), -1))
        g = scale * (log_b - torch.logsumexp((f.unsqueeze(-1) - C) / scale.unsqueeze(-1), -2))
        if iteration % 10 == 0 or iteration == (options.max_iter or _SWEEPS):
            x = torch.cat([torch.where(a > 0, f, 0), torch.where(b > 0, g, 0)], -1)
            with torch.no_grad():
                error = marginal_error(plan_of(x, C, a, b, epsilon), a, b)
                if bool(((error <= options.tol * mass) | ~feasible).all()):
                    break
    status = torch.where(error <= options.tol * mass, int(Status.SOLVED), int(Status.MAX_ITER))
    status = torch.where(feasible, status, torch.where(usable, int(Status.PRIMAL_INFEASIBLE), int(Status.NUMERICAL_ERROR)))
    found = Solution(x, status, error, torch.full_like(status, iteration))
    report_failures(found, "sinkhorn, unrolled", options.on_failure)
    return found.x, found.status, found.residual, found.iterations
