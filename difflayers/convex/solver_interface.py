r"""The conic engine as a solver inside cvxpylayers.

Whoever builds ``cvxpylayers.torch.CvxpyLayer`` himself passes ``solver=cvxpylayers_solver()``: cvxpylayers canonicalizes and maps the
parameters, and hands over the values of P, q and (A, b) for the whole batch. They are solved and differentiated by
:mod:`~difflayers.convex.cone_program`. What its own autograd.Function cannot do stays out of reach: second derivatives, forward mode
and ``torch.func`` are those of :class:`~difflayers.CvxpyLayer` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solution import OnFailure
from .canonicalization import canonicalizer, cones_of, split_rows, square_pattern
from .cone import solve_rows
from .cone_program import ConeOptions
from .cone_solvers import automatic_solver, known_solver, lower_triangles
from .cone_structure import Structure

__all__ = ["cvxpylayers_solver"]


def cvxpylayers_solver(*, solver: str = "auto", tol: float = 1e-8, on_failure: OnFailure = "raise") -> Any:
    """A ``cvxpylayers.interfaces.base.SolverInterface`` for the argument ``solver=`` of cvxpylayers' layers.

    Args:
        solver: as in :func:`~difflayers.convex.solve_cone`.
        tol: as in :func:`~difflayers.convex.solve_cone`.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"``, for each element of the batch.

    Returns:
        The object; one for each layer.

    Raises:
        MissingExtraError: cvxpylayers is not installed.

    Example:
        >>> import cvxpy as cp
        >>> import torch
        >>> from cvxpylayers.torch import CvxpyLayer
        >>> from difflayers.convex import cvxpylayers_solver
        >>> x, a = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1])
        >>> layer = CvxpyLayer(problem, [a], [x], solver=cvxpylayers_solver())
        >>> layer(torch.tensor([3.0, 4.0], dtype=torch.float64))[0]
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    if solver != "auto":
        known_solver(solver)
    interface = canonicalizer()

    class DiffLayersSolver(interface):
        """Solves and differentiates in torch, the whole batch at once."""

        canon_solver = "CLARABEL"
        supports_quad_obj = True

        def setup(self, ctx: Any) -> None:
            """Keep the patterns."""
            self.cones = cones_of(ctx.cone_dims)
            n, m = ctx.q.shape[0] - 1, self.cones.rows
            self.P = square_pattern(ctx.reduced_P, n)
            self.A, self.inside, self.where = split_rows(ctx.reduced_A, n, m)
            # cvxpylayers reads semidefinite multipliers as lower triangles.
            self.order = torch.as_tensor(lower_triangles(self.cones))

        def solve_torch_batch(
            self, P: Tensor | None, q: Tensor, A: Tensor, dims: Any, solver_args: dict[str, Any], needs_grad: bool
        ) -> tuple[Tensor, Tensor, Any]:
            """x and y of the batch, and the graph behind them."""
            name = automatic_solver(self.cones, self.P, self.A) if solver == "auto" and not solver_args else solver
            options = ConeOptions(tol, None, "CLARABEL" if name == "auto" else name, solver_args, on_failure, False, "cvxpylayers_solver")
            with torch.enable_grad() if needs_grad else torch.no_grad():
                leaves = [None if part is None else part.detach().clone().requires_grad_(needs_grad) for part in (P, q, A)]
                values: list[Any] = [None if part is None else part.to(torch.float64) for part in leaves]
                values_P, values_q, rows = values
                b = rows.new_zeros(len(rows), self.A.shape[0]).index_add(-1, self.where, rows[:, ~self.inside])
                theta = (None if self.P is None else values_P, values_q[:, :-1], -rows[:, self.inside], b)
                x, y, *_ = solve_rows(Structure((len(q),), self.cones, self.P, self.A), theta, options)
                y = y[:, self.order]
            return x.detach().to(q.dtype), y.detach().to(q.dtype), (leaves, x, y)

        def derivative_torch_batch(self, dprimal: Tensor, ddual: Tensor, saved_state: Any) -> tuple[Tensor | None, ...]:
            """The cotangents of P, q and (A, b)."""
            leaves, x, y = saved_state
            wanted = [leaf for leaf in leaves if leaf is not None]
            slopes = torch.autograd.grad((x, y), wanted, (dprimal.to(x), ddual.to(y)), retain_graph=True, allow_unused=True)
            found = iter(torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(wanted, slopes, strict=True))
            return tuple(None if leaf is None else next(found) for leaf in leaves)

    return DiffLayersSolver()
