r"""A hard constraint: a network proposes, and a solve inside the network obeys the equation.

The network gives N basis functions b₁, …, b_N on a mesh in space and time. The layer returns the combination of them

.. math:: u = \sum_j w^*_j b_j, \qquad w^* = \operatorname{argmin}_w \tfrac12 \|r(w)\|^2,

whose residual r is smallest: the equation at collocation points, the initial and the boundary conditions, everything that a
solution must satisfy, as typed rows (:mod:`difflayers.pde.rows`). w* is differentiated implicitly (:mod:`difflayers.pde.least_squares`),
so a loss on u trains the network to propose functions that hold a good solution in their span. A penalty in the loss asks a network for
small residuals on the average of its training data; the constraint makes them as small as its basis allows for every new input.

Reference: Négiar, Mahoney, Krishnapriyan, Learning differentiable solvers for systems with hard constraints, ICLR 2023,
arXiv:2207.08675; Chalapathi, Du, Krishnapriyan, Scaling physics-informed hard constraints with mixture-of-experts, ICLR 2024,
arXiv:2402.13412.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..errors import ShapeError
from ..solution import OnFailure, Status
from .least_squares import FitOptions
from .rows import BoundaryRows, InteriorRows, pde
from .solve_rows import FreeRows, solve_rows
from .structured import LinearRows, PointRows

__all__ = ["Assembled", "ConstraintSolution", "HardConstraint"]


class ConstraintSolution(NamedTuple):
    """What :meth:`HardConstraint.solve` returns.

    Attributes:
        u: ``(*batch, *grid)``, the combination of the basis functions.
        weights: ``(*batch, N)``, its coefficients; with experts ``(*batch, E, N)``.
        status: ``(*batch,)``, or ``(*batch, E)``, of :class:`~difflayers.Status`.
        residual_norm: like ``status``, ‖r‖₂ over all rows. Without a derivative.
        gradient_norm: like ``status``, what the stopping rule measured: the largest component of Jᵀr, relative to the numbers that it is a
            difference of.
        iterations: like ``status``.
    """

    u: Tensor
    weights: Tensor
    status: Tensor
    residual_norm: Tensor
    gradient_norm: Tensor
    iterations: Tensor


class Assembled(NamedTuple):
    """The rows of a constraint for one basis, before anything is solved.

    Attributes:
        basis: ``(*batch, *grid, N)`` in the dtype of the features.
        batch: the shape of the batch of all rows together.
        points: the pointwise rows, at every point of the grid.
        linear: the linear rows.
        free: the rows of a residual without features.
    """

    basis: Tensor
    batch: torch.Size
    points: list[PointRows]
    linear: list[LinearRows]
    free: FreeRows | None


class HardConstraint(nn.Module):
    """The combination of basis functions with the smallest residual, differentiated implicitly.

    With ``features`` the residual is a pointwise function of quantities that are linear in u (its derivatives, a velocity by a Fourier
    transform, …): then Jacobian and Hessian are assembled from the features of the basis functions, several times faster than they are
    differentiated, and points can be sampled. Without, ``residual_fn`` may be any function of u.

    Args:
        residual_fn: with ``features`` ``(products, *args) -> (*batch, P)``: called with the dict of products of the features with the
            weights at P points, and with the arguments of the call, those whose last dimensions broadcast against the grid taken at the
            same points. Without ``features`` ``(u, *args) -> (*batch, ...)``. None: the rows are all there is.
        features: ``(basis, *args) -> dict`` of tensors ``(*batch, *grid, N)``, linear in the basis.
        rows: more rows: :func:`~difflayers.pde.initial`, :func:`~difflayers.pde.dirichlet`, ….
        grid_ndim: dimensions of the grid.
        points: how many points of the grid each block of pointwise rows is sampled at, without replacement; None is all of them. A sampled
            row weighs √(all / points) times as much: the balance with the other rows does not depend on how many are drawn.
        ridge: adds the rows ``ridge · w``. With a basis that is nearly dependent it keeps w* unique.
        x0: the weights to start from, a number or ``(*batch, N)``. An equation that is not linear may have several minima.
        solver: "lm" (Levenberg–Marquardt), "gauss_newton", or a callable as those of :mod:`difflayers.solvers`.
        hessian: "exact", or "gauss_newton": derivatives without the second derivatives of the residual. It is cheaper, and exact
            only where the residual is zero or linear.
        tol: for the gradient, relative to the numbers that it is a difference of. Newton steps follow, so w* is more accurate than this.
        max_iter: trial points of the solver.
        precision: ``torch.float64``: features and solve are in double precision, whatever comes. ``torch.float32``: features and the first
            iterations are single, the last ones and the derivatives double, with float32 features cast for the time of the solve.
        on_failure: what happens to problems that did not converge (MAX_ITER), whose minimum is not isolated (SINGULAR), or that are not
            finite (NUMERICAL_ERROR): ``"raise"``, ``"nan"`` or ``"warn"``.

    Raises:
        ValueError: an option that has no meaning.

    Example:
        >>> import torch
        >>> from difflayers.pde import HardConstraint, dirichlet, finite_difference
        >>> x = torch.linspace(0, 1, 41, dtype=torch.float64)
        >>> features = lambda basis: {"u": basis, "u_x": finite_difference(basis, x[1], dim=-2, accuracy=4)}
        >>> decay = HardConstraint(lambda z: z["u_x"] + z["u"], features=features, rows=[dirichlet(1.0, dim=0, weight=10.0)])
        >>> basis = torch.stack([x**k for k in range(6)], -1)              # what a network would propose
        >>> u = decay(basis)
        >>> print(f"{float((u - torch.exp(-x)).abs().max()):.0e}")
        9e-07
    """

    def __init__(
        self,
        residual_fn: Callable[..., Tensor] | None,
        *,
        features: Callable[..., dict[str, Tensor]] | None = None,
        rows: Sequence[InteriorRows | BoundaryRows] = (),
        grid_ndim: int = 1,
        points: int | None = None,
        ridge: float = 0.0,
        x0: float | Tensor = 0.0,
        solver: Literal["lm", "gauss_newton"] | Callable[..., Any] = "lm",
        hessian: Literal["exact", "gauss_newton"] = "exact",
        tol: float = 1e-8,
        max_iter: int = 100,
        precision: torch.dtype = torch.float64,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not callable(solver) and solver not in ("lm", "gauss_newton"):
            raise ValueError(f"solver {solver!r} is not known; choose 'lm' or 'gauss_newton', or pass a callable")
        if hessian not in ("exact", "gauss_newton"):
            raise ValueError(f"hessian {hessian!r} is not known; choose 'exact' or 'gauss_newton'")
        if precision not in (torch.float32, torch.float64):
            raise ValueError(f"precision must be torch.float64 or torch.float32, got {precision}")
        if grid_ndim < 1 or (points is not None and points < 1) or not ridge >= 0 or not tol >= 0 or max_iter < 0:
            raise ValueError(
                f"grid_ndim and points must be positive, ridge, tol and max_iter not negative: "
                f"got {grid_ndim=}, {points=}, {ridge=}, {tol=}, {max_iter=}"
            )
        if residual_fn is None and not rows:
            raise ValueError("a constraint needs a residual or rows; got neither")
        self.residual_fn, self.features = residual_fn, features
        self.rows = nn.ModuleList([*([pde(residual_fn)] if residual_fn is not None and features is not None else []), *rows])
        if features is None and any(isinstance(row, InteriorRows) and row.features is None for row in rows):
            raise ValueError("pde rows need features: give them their own, or features= to the constraint")
        self.grid_ndim, self.points, self.ridge, self.x0 = grid_ndim, points, ridge, x0
        self.options = FitOptions(solver, hessian, tol, max_iter, precision, on_failure, "HardConstraint")

    def forward(self, basis: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
        """The constrained solution.

        Args:
            basis: ``(*batch, *grid, N)``, floating.
            args: what the residual and the values of rows depend on; pytrees, differentiated as well. A tensor whose last dimensions
                broadcast against the grid is split like the grid; to keep ``(*batch, n)`` from being read as that, give it a dimension of 1
                for each of the grid's that it lacks.
            generator: of the sampled points.

        Returns:
            u ``(*batch, *grid)`` with dtype and device of ``basis``.
        """
        return self.solve(basis, *args, generator=generator).u

    def solve(self, basis: Tensor, *args: Any, generator: torch.Generator | None = None) -> ConstraintSolution:
        """The solution with weights, status and norms.

        Args:
            basis: as in :meth:`forward`.
            args: as in :meth:`forward`.
            generator: as in :meth:`forward`.
        """
        rows = self.assemble(basis, *args)
        points = [self._sampled(block, rows.batch, generator) for block in rows.points]
        fit = solve_rows(self.start(rows.basis, rows.batch), points, rows.linear, rows.free, options=self.options)
        u = combine(rows.basis, fit.x, self.grid_ndim)
        if self.options.on_failure == "nan":
            u = torch.where((fit.status == Status.SOLVED)[(..., *[None] * self.grid_ndim)], u, torch.nan)
        return ConstraintSolution(u.to(basis.dtype), fit.x.to(basis.dtype), fit.status, fit.residual_norm, fit.residual, fit.iterations)

    def assemble(self, basis: Tensor, *args: Any) -> Assembled:
        """The rows for ``basis``, all points of the grid, nothing solved.

        Args:
            basis: as in :meth:`forward`.
            args: as in :meth:`forward`.

        Raises:
            ShapeError: a basis that has no grid, features or values of another shape.
        """
        if not isinstance(basis, Tensor) or not basis.is_floating_point() or basis.dim() < self.grid_ndim + 1:
            came = f"{tuple(basis.shape)} {basis.dtype}" if isinstance(basis, Tensor) else type(basis).__name__
            raise ShapeError(f"basis must be a floating tensor (*batch, *grid, N) with {self.grid_ndim} dimensions of grid, got {came}")
        grid = tuple(basis.shape[-1 - self.grid_ndim : -1])
        basis = basis.to(self.options.precision)
        points: list[PointRows] = []
        linear: list[LinearRows] = []
        made: dict[Callable[..., Any], dict[str, Tensor]] = {}
        for row in self.rows:
            if isinstance(row, BoundaryRows):
                linear.append(row(basis, self.grid_ndim, *args))
                continue
            # One of the two is there: that has been checked.
            function = cast("Callable[..., dict[str, Tensor]]", cast("InteriorRows", row).features or self.features)
            if function not in made:
                made[function] = function(basis, *args)
            points.append(row(made[function], grid, *args))
        free = None
        if self.residual_fn is not None and self.features is None:
            free = FreeRows(self._residual_of_weights, (basis, args))
        if self.ridge:
            N = basis.shape[-1]
            linear.append(LinearRows(self.ridge * torch.eye(N, dtype=basis.dtype, device=basis.device), basis.new_zeros(N)))
        shapes = [basis.shape[: -1 - self.grid_ndim], *(T.shape[:-2] for block in points for T in block.features.values())]
        shapes += [rows.matrix.shape[:-2] for rows in linear] + [rows.target.shape[:-1] for rows in linear]
        shapes += [block.weight.shape[:-1] for block in points if block.weight is not None]
        # An argument at the points has them last.
        for block in points:
            count = next(iter(block.features.values())).shape[-2]
            shapes += [leaf.shape[:-1] for leaf in _pytree.tree_leaves(block.args) if is_at_points(leaf, count)]
        try:
            batch = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise ShapeError(
                f"the batch of the basis, of the values and of the arguments must broadcast, got {[tuple(s) for s in shapes]}"
            ) from None
        return Assembled(basis, batch, points, linear, free)

    def start(self, basis: Tensor, batch: torch.Size) -> Tensor:
        """The starting weights ``(*batch, N)``, in float64."""
        x0 = torch.as_tensor(self.x0, dtype=torch.float64, device=basis.device)
        return x0.expand(*batch, basis.shape[-1])

    def _residual_of_weights(self, w: Tensor, basis: Tensor, args: Sequence[Any]) -> Tensor:
        residual = cast("Callable[..., Tensor]", self.residual_fn)(combine(basis, w, self.grid_ndim), *args)
        lead = w.dim() - 1
        if not isinstance(residual, Tensor) or residual.dim() < lead or residual.shape[:lead] != w.shape[:-1]:
            came = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
            raise ShapeError(f"the residual must be a tensor (*batch, ...) with the batch {tuple(w.shape[:-1])}, got {came}")
        return residual.flatten(lead) if residual.dim() > lead else residual.unsqueeze(-1)

    def _sampled(self, block: PointRows, batch: torch.Size, generator: torch.Generator | None) -> PointRows:
        """A block at as many of its points as are asked for, others for each problem; on the average its sum of squares stays the same."""
        T = next(iter(block.features.values()))
        total = T.shape[-2]
        if self.points is None or self.points >= total:
            return block
        where = torch.rand(*batch, total, generator=generator, device=T.device).topk(self.points, -1).indices
        drawn = at_points(block, where)
        scale = (total / self.points) ** 0.5
        return drawn._replace(weight=torch.tensor(scale, dtype=T.dtype, device=T.device) if drawn.weight is None else drawn.weight * scale)

    def extra_repr(self) -> str:
        """The options."""
        shown: dict[str, Any] = {"grid_ndim": self.grid_ndim, "points": self.points, "ridge": self.ridge, "solver": self.options.solver}
        shown |= {"hessian": self.options.hessian, "tol": self.options.tol, "precision": self.options.precision}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def combine(basis: Tensor, weights: Tensor, grid_ndim: int) -> Tensor:
    """The combination of basis functions, ``(*batch, *grid)``; NaN weights, of failed problems, count as 0.

    Args:
        basis: ``(*batch, *grid, N)``.
        weights: ``(*batch, N)``.
        grid_ndim: dimensions of the grid.
    """
    lead, weights = weights.shape[:-1], torch.where(torch.isnan(weights), 0, weights)
    flat = basis.flatten(-1 - grid_ndim, -2).to(weights.dtype)
    u = (flat @ weights.unsqueeze(-1)).squeeze(-1)
    return u.reshape(*lead, *basis.shape[-1 - grid_ndim : -1])


def is_at_points(leaf: Any, count: int) -> bool:
    """Whether an argument of pointwise rows holds a number for each point.

    Args:
        leaf: anything.
        count: how many points there are.
    """
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[-1] == count


def at_points(block: PointRows, where: Tensor) -> PointRows:
    """A block of pointwise rows at some of its points.

    Args:
        block: of P points.
        where: ``(*batch, p)``, their numbers; the batch is that of the problems.
    """
    T = next(iter(block.features.values()))
    total, batch = T.shape[-2], where.shape[:-1]

    def take(values: Tensor) -> Tensor:
        return values.expand(*batch, total).gather(-1, where)

    features = {
        name: T.expand(*batch, *T.shape[-2:]).gather(-2, where.unsqueeze(-1).expand(*where.shape, T.shape[-1]))
        for name, T in block.features.items()
    }
    args = _pytree.tree_map(lambda arg: take(arg) if is_at_points(arg, total) else arg, block.args)
    weight = block.weight if block.weight is None or not block.weight.dim() else take(block.weight)
    return PointRows(block.function, features, args, weight)
