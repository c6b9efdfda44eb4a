r"""Linear conservation laws as a projection of a prediction with its uncertainty (ProbConserv).

A network predicts values u at the points of a grid, with mean μ and covariance Σ. The law is G u = b up to noise of standard deviation σ:
each row of G holds the weights of an integral. Conditioning the normal distribution on the law gives

.. math:: \tilde μ = μ - Σ G^T M^{-1} (G μ - b), \qquad \tilde Σ = Σ - Σ G^T M^{-1} G Σ, \qquad M = G Σ G^T + σ^2 I .

For σ = 0 the law holds exactly, :math:`G \tilde μ = b` and :math:`G \tilde Σ = 0`, and :math:`\tilde μ` is the projection of μ in the norm
of :math:`Σ^{-1}`: values are corrected where the prediction is unsure of them. M has a row and a column for each row of G. A diagonal Σ is
never written out as a matrix: memory is O(rows · points). Redundant rows with values that agree are solved by the
pseudoinverse (:mod:`~difflayers.pde.completion`); rows count as redundant if what they differ by has a prior deviation of less than about
1e-6 of theirs.

Reference: Hansen, Maddix, Alizadeh, Gupta and Mahoney, Learning physical models that can respect conservation laws, ICML 2023,
arXiv:2302.11002.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..convex.kkt import times
from ..convex.projections.arguments import status_reported
from ..errors import ShapeError
from ..holding import hold
from ..implicit.eager import eager
from ..solution import OnFailure, Status
from .completion import completion
from .smoothness import second_difference_rows, second_difference_variance

__all__ = ["ConservationProjection", "ConservationSolution", "conservation_projection"]

Form = Literal["diagonal", "full"]
_STEPS = 3  # of iterative refinement


class ConservationSolution(NamedTuple):
    """What :func:`conservation_projection` returns; n is the number of points of the grid.

    Attributes:
        mean: ``(*batch, *grid)``.
        variance: ``(*batch, *grid)``, the exact marginal variances.
        covariance: ``(*batch, n, n)``; None unless the prior has one, or ``full_posterior`` asks for it. (torch.func.vmap returns no
            None: let the function under it return the fields that you want.)
        log_likelihood: ``(*batch,)``, the log density of the value under the prediction, log N(value; G μ, M): what to maximize
            to learn the noise. Rows that are redundant have a density only among the values that they can take.
        status: ``(*batch,)`` int64 tensor of :class:`~difflayers.Status` codes.
        residual: ``(*batch,)``, the largest distance of weights · mean from the value among the rows: the error of conservation.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None
    log_likelihood: Tensor
    status: Tensor
    residual: Tensor


@eager
def conservation_projection(
    mean: Tensor,
    variance: Tensor,
    value: Tensor | float,
    weights: Tensor,
    noise: Tensor | float = 0.0,
    *,
    covariance: Form = "diagonal",
    grid_ndim: int = 1,
    smoothness: float | None = None,
    full_posterior: bool = False,
    on_failure: OnFailure = "raise",
) -> ConservationSolution:
    """A normal distribution of values on a grid, conditioned on linear conservation laws weights · u = value.

    Differentiable to any order in every tensor. Computed in float64, and returned in the dtype of ``mean``. Leading batch dimensions
    broadcast. A law at each of several times is one row with the times as a batch dimension, as long as the prior has no
    covariance between them.

    Args:
        mean: ``(*batch, *grid)``.
        variance: ``(*batch, *grid)``, nonnegative; ones project in the Euclidean norm. With ``covariance="full"`` ``(*batch, n, n)``
            for the n points of the grid, read as its symmetric part.
        value: b, ``(*batch,)`` or a number for one row, ``(*batch, rows)`` for several.
        weights: G, ``(*grid)`` for one row; ``(rows, *grid)`` or ``(*batch, rows, *grid)`` for several.
        noise: σ, the standard deviation of the noise in the law, finite: a number, or a tensor like ``value``. Zero is exact.
        covariance: the form of the second argument.
        grid_ndim: the number of dimensions of the grid.
        smoothness: a number α in [0, 1) conditions on small second differences, too (:mod:`~difflayers.pde.smoothness`): as a
            stage before the law, whose exactness it leaves. One-dimensional grids; O(points³) time. None: no such stage.
        full_posterior: return the covariance of a diagonal prior, too, which the law makes dense.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"``.

    Returns:
        :class:`ConservationSolution`.

    Raises:
        ShapeError: shapes do not fit.
        InfeasibleError: exact rows contradict each other, or the values under them have no variance (``on_failure="raise"``).
        NotConvergedError: an input is not finite, a variance is negative, or a covariance is not positive semidefinite.

    Example:
        >>> import torch
        >>> from difflayers.pde import conservation_projection
        >>> found = conservation_projection(torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), 3.0, torch.tensor([1.0, 2.0, 1.0]))
        >>> found.mean  # the last one was certain
        tensor([0.6000, 1.2000, 0.0000])
        >>> found.variance
        tensor([0.8000, 0.2000, 0.0000])
    """
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"covariance={covariance!r} is not known; choose 'diagonal' or 'full'")
    if smoothness is not None and not (0 <= smoothness < 1 and grid_ndim == 1):
        raise ValueError(f"smoothness is a number in [0, 1) for one-dimensional grids, got {smoothness} and grid_ndim={grid_ndim}")
    full = covariance == "full"
    grid = _check(mean, variance, weights, grid_ndim, full)
    n, several = math.prod(grid), weights.dim() > grid_ndim
    mu = mean.to(torch.float64).flatten(-grid_ndim)
    prior = variance.to(torch.float64) if full else variance.to(torch.float64).flatten(-grid_ndim)
    G = (weights if several else weights.unsqueeze(0)).to(mean.device, torch.float64).flatten(-grid_ndim)
    b = _per_row(value, "value", G.shape[-2], several, mean.device)
    sigma = _per_row(noise, "noise", G.shape[-2], several, mean.device)
    broken = ~(_finite(mu, 1) & _finite(prior, 2 if full else 1) & _finite(G, 2) & _finite(b, 1) & _finite(sigma, 1))
    if not full:
        broken = broken | (prior < 0).any(-1)
    # What is not finite is reported below; here it would spoil the gradients of shared tensors.
    mu, prior, G, b, sigma = (torch.where(torch.isfinite(part), part, 0) for part in (mu, prior, G, b, sigma))
    prior = (prior + prior.mT) / 2 if full else prior.clamp(min=0)

    rows, noise_variance = G.shape[-2], sigma.square()
    if smoothness is not None:  # these rows first: the last rows of a Cholesky factor are conditional on those before
        small = second_difference_variance(_diagonal(prior) if full else prior, smoothness)
        noise_variance = _joined(small, noise_variance, core=1)
        G, b = _joined(second_difference_rows(n, G), G, core=2), torch.cat([b.new_zeros(*b.shape[:-1], n - 2), b], -1)
    K = G @ prior if full else G * prior.unsqueeze(-2)
    M = K @ G.mT + torch.diag_embed(noise_variance)
    size = _diagonal(M).detach()
    scale = torch.where(size > 0, size, 1).rsqrt()
    A = scale.unsqueeze(-1) * M * scale.unsqueeze(-2)
    missing, indefinite = completion(A)
    factor = torch.linalg.cholesky_ex(A + missing).L
    gain = torch.linalg.solve_triangular(factor, scale.unsqueeze(-1) * K, upper=False)
    step = _solve(factor, scale * (times(G, mu) - b))
    point = mu - times(gain.mT, step)
    correction, misses, sizes = _refinement(*(part.detach() for part in (point, step, gain, factor, scale, G, b, noise_variance)))
    point = point + correction

    marginal = (_diagonal(prior) if full else prior) - gain.square().sum(-2)
    dense = (prior if full else torch.diag_embed(prior)) - gain.mT @ gain if full or full_posterior else None
    rank = rows - _diagonal(missing).sum(-1).round()
    spread = factor.diagonal(dim1=-2, dim2=-1).log() - scale.log()
    log_likelihood = -(step.square() / 2 + spread)[..., -rows:].sum(-1) - rank / 2 * math.log(2 * math.pi)
    residual = (times(G, point) - b)[..., -rows:].detach().abs().amax(-1)

    if full:
        broken = broken | (marginal < -1e-8 * _diagonal(prior).abs()).any(-1)
    slack = 100 * n**0.5 * torch.finfo(mean.dtype).eps * sizes
    status = torch.where((misses > slack).any(-1), int(Status.PRIMAL_INFEASIBLE), int(Status.SOLVED))
    status = torch.where(broken | indefinite, int(Status.NUMERICAL_ERROR), status)
    lost = status != Status.SOLVED if on_failure == "nan" else status == Status.NUMERICAL_ERROR

    def finished(part: Tensor, core_ndim: int) -> Tensor:
        return torch.where(lost.reshape((*lost.shape, *[1] * core_ndim)), torch.nan, part).to(mean.dtype)

    point = status_reported(finished(point, 1), status, residual, "conservation_projection", on_failure)
    batch = point.shape[:-1]
    return ConservationSolution(
        point.unflatten(-1, grid),
        finished(marginal.clamp(min=0), 1).unflatten(-1, grid),
        None if dense is None else finished(dense, 2),
        finished(log_likelihood, 0),
        status.expand(batch),
        finished(residual, 0).expand(batch),
    )


class ConservationProjection(nn.Module):
    """:func:`conservation_projection` as a module: a prediction with its uncertainty, made to obey linear conservation laws.

    Args:
        weights: G, ``(*grid)`` for one row, ``(rows, *grid)`` or ``(*batch, rows, *grid)`` for several: the weights of the integrals, such
            as :func:`trapezoid_weights`. A buffer; an ``nn.Parameter`` is learned.
        noise: σ, the standard deviation of the noise in the law: a number, or a tensor ``(rows,)``. Zero is exact; an
            ``nn.Parameter`` is learned (only its square matters, so its sign does not).
        covariance: "diagonal": ``forward`` takes and returns variances; "full": covariance matrices.
        grid_ndim: as in :func:`conservation_projection`.
        smoothness: as in :func:`conservation_projection`.
        on_failure: as in :func:`conservation_projection`.

    Example:
        >>> import torch
        >>> from difflayers import ConservationProjection
        >>> from difflayers.pde import trapezoid_weights
        >>> x = torch.linspace(0, 1, 5)
        >>> project = ConservationProjection(trapezoid_weights(x))
        >>> mean, variance = project(1 - x, torch.tensor([0.0, 0.1, 0.2, 0.1, 0.0]), torch.tensor(0.6))
        >>> mean
        tensor([1.0000, 0.8500, 0.7000, 0.3500, 0.0000])
        >>> torch.trapezoid(mean, x)
        tensor(0.6000)
    """

    weights: Tensor
    noise: Tensor | float

    def __init__(
        self,
        weights: Tensor,
        noise: Tensor | float = 0.0,
        *,
        covariance: Form = "diagonal",
        grid_ndim: int = 1,
        smoothness: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        hold(self, "weights", weights)
        hold(self, "noise", noise)
        self.covariance: Form = covariance
        self.grid_ndim, self.smoothness = grid_ndim, smoothness
        self.on_failure: OnFailure = on_failure

    def forward(self, mean: Tensor, variance_or_covariance: Tensor, value: Tensor | float) -> tuple[Tensor, Tensor]:
        """The conditioned mean ``(*batch, *grid)``, and its variance ``(*batch, *grid)`` or covariance ``(*batch, n, n)``.

        With a variance the result is the exact marginal variance; what the law correlates is in ``solve(..., full_posterior=True)``.

        Args:
            mean: ``(*batch, *grid)``.
            variance_or_covariance: ``(*batch, *grid)``, or ``(*batch, n, n)`` with ``covariance="full"``.
            value: ``(*batch,)`` for one row, ``(*batch, rows)`` for several.
        """
        found = self.solve(mean, variance_or_covariance, value)
        return found.mean, found.variance if found.covariance is None else found.covariance

    def solve(
        self, mean: Tensor, variance_or_covariance: Tensor, value: Tensor | float, *, full_posterior: bool = False
    ) -> ConservationSolution:
        """As ``forward``, with the likelihood, the status and the error of conservation.

        Args:
            mean: ``(*batch, *grid)``.
            variance_or_covariance: ``(*batch, *grid)``, or ``(*batch, n, n)`` with ``covariance="full"``.
            value: ``(*batch,)`` for one row, ``(*batch, rows)`` for several.
            full_posterior: return the covariance, too.
        """
        options = {name: getattr(self, name) for name in ("covariance", "grid_ndim", "smoothness", "on_failure")}
        return conservation_projection(
            mean, variance_or_covariance, value, self.weights, self.noise, full_posterior=full_posterior, **options
        )

    def extra_repr(self) -> str:
        """The shape of the weights, the noise and the options."""
        noise = f"noise: {tuple(self.noise.shape)}" if isinstance(self.noise, Tensor) else f"noise={self.noise}"
        shown = [f"weights: {tuple(self.weights.shape)}", noise]
        shown += [f"{name}={getattr(self, name)!r}" for name in ("covariance", "grid_ndim", "smoothness", "on_failure")]
        return ", ".join(shown)


def _refinement(
    point: Tensor, step: Tensor, gain: Tensor, factor: Tensor, scale: Tensor, G: Tensor, b: Tensor, noise_variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What rounding has left of the equations: the correction of the point, then by how much each still fails, and the size of its terms.

    Where the equations can hold the correction is zero but for rounding, and so are its derivatives. Each step gains the digits that
    the condition of the rows leaves.
    """
    refined = point
    for _ in range(_STEPS):
        again = _solve(factor, scale * _miss(refined, step, factor, scale, G, b, noise_variance)[0])
        refined, step = refined - times(gain.mT, again), step + again
    miss, multiplier = _miss(refined, step, factor, scale, G, b, noise_variance)
    size = times(G.abs(), refined.abs()) + b.abs() + noise_variance * multiplier.abs()
    return refined - point, miss.abs(), size


def _miss(
    point: Tensor, step: Tensor, factor: Tensor, scale: Tensor, G: Tensor, b: Tensor, noise_variance: Tensor
) -> tuple[Tensor, Tensor]:
    multiplier = scale * _solve(factor.mT, step, upper=True)
    return times(G, point) - b - noise_variance * multiplier, multiplier


def _check(mean: Tensor, variance: Tensor, weights: Tensor, grid_ndim: int, full: bool) -> torch.Size:
    """The shape of the grid."""
    for name, part in (("mean", mean), ("variance", variance), ("weights", weights)):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise ShapeError(f"{name} must be a floating tensor, got {part.dtype if isinstance(part, Tensor) else type(part).__name__}")
    if grid_ndim < 1 or mean.dim() < grid_ndim:
        raise ShapeError(f"mean must have the shape (*batch, *grid) with {grid_ndim} grid dimensions, got {tuple(mean.shape)}")
    grid = mean.shape[mean.dim() - grid_ndim :]
    n = math.prod(grid)
    if weights.shape[max(weights.dim() - grid_ndim, 0) :] != grid:
        raise ShapeError(
            f"weights must have the shape (*grid) or (*batch, rows, *grid) with grid {tuple(grid)}, got {tuple(weights.shape)}"
        )
    wanted = (n, n) if full else tuple(grid)
    if tuple(variance.shape[max(variance.dim() - len(wanted), 0) :]) != wanted:
        what = "a covariance (*batch, n, n)" if full else "a variance (*batch, *grid)"
        raise ShapeError(f"the second argument must be {what} whose last dimensions are {wanted}, got {tuple(variance.shape)}")
    return grid


def _per_row(value: Tensor | float, name: str, rows: int, several: bool, device: torch.device) -> Tensor:
    """A value for each row ``(*batch, rows)`` in float64."""
    if not isinstance(value, Tensor):
        return torch.full((rows,), value, dtype=torch.float64, device=device)
    value = value.to(torch.float64)
    if not several or value.dim() == 0:
        value = value.unsqueeze(-1)
    if value.shape[-1] not in (1, rows):
        raise ShapeError(f"{name} must have the shape (*batch, rows) with {rows} rows, got {tuple(value.shape)}")
    return value.expand(*value.shape[:-1], rows)


def _finite(part: Tensor, core_ndim: int) -> Tensor:
    return torch.isfinite(part).flatten(-core_ndim).all(-1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _solve(factor: Tensor, vector: Tensor, *, upper: bool = False) -> Tensor:
    return torch.linalg.solve_triangular(factor, vector.unsqueeze(-1), upper=upper).squeeze(-1)


def _joined(first: Tensor, second: Tensor, core: int) -> Tensor:
    """Rows of both, whose batch dimensions broadcast; ``core`` counts the dimensions of one element, rows first."""
    batch = torch.broadcast_shapes(first.shape[: first.dim() - core], second.shape[: second.dim() - core])
    return torch.cat([part.expand(*batch, *part.shape[part.dim() - core :]) for part in (first, second)], -core)
