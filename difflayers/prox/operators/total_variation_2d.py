r"""Total variation of images: the proximal operator by splitting, differentiated on the regions that it makes flat.

.. math:: \operatorname{prox}(x) = \arg\min_u \; \tfrac12 \|u - x\|^2 + λ \sum_p w_p \|(Du)_p\|,

with :math:`(Du)_p` the differences of pixel p to its right and lower neighbours, and the 2-norm (isotropic) or the 1-norm (anisotropic).
The solution is found to a duality gap (:mod:`.split_bregman`), and sharpened on its flat regions (:mod:`.flat_regions`), which are held
for the derivatives. With P the average over regions,

.. math:: u = P \Bigl( x - D^T \frac{λ w \, Du}{\|Du\|} \Bigr)

over the differences that are not zero. The anisotropic quotients are signs, and the formula is explicit: the mean of a region is
moved by λ for each unit of its border. The isotropic one is a root problem of the core, with a sparse factorization for its systems.

References: Rudin, Osher and Fatemi, Nonlinear total variation based noise removal algorithms, Physica D 60 (1992); Chambolle, An algorithm
for total variation minimization and applications, J. Math. Imaging and Vision 20 (2004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...convex.projections.arguments import Number
from ...errors import ShapeError
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction, in_a_transform
from ...solution import OnFailure, Solution, Status, report_failures
from .arguments import check_entries
from .difference_weights import difference_weights
from .flat_regions import Curvature, sharpen
from .split_bregman import differences, differences_adjoint, duality_gap, split_bregman

__all__ = ["TotalVariationSolution", "prox_tv2d", "solve_tv2d"]

_COARSE = 1e-5  # the gap at which signs of single differences are tried


class TotalVariationSolution(NamedTuple):
    """What :func:`solve_tv2d` returns.

    Attributes:
        u: ``(*batch, H, W)``, the image.
        dual: ``(*batch, 2, H, W)``, a multiplier of its differences, across and down, of norm at most λw; without a derivative.
        status: ``(*batch,)`` int64 tensor of :class:`~difflayers.solution.Status` codes.
        residual: ``(*batch,)``, the duality gap relative to the energy.
        iterations: ``(*batch,)`` int64, the iterations that each image used.
    """

    u: Tensor
    dual: Tensor
    status: Tensor
    residual: Tensor
    iterations: Tensor


def prox_tv2d(
    x: Tensor,
    lam: Number,
    weights: Tensor | None = None,
    *,
    norm: Literal["isotropic", "anisotropic"] = "isotropic",
    tol: float = 1e-6,
    max_iter: int = 5000,
    polish: bool | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The nearest image of small total variation: ``argmin_u ½‖u − x‖² + λ Σ_p w_p ‖(Du)_p‖``.

    :func:`solve_tv2d` is the same with the dual, the gap and a warm start, and says more on derivatives and polishing.

    Args:
        x: ``(*batch, H, W)``.
        lam: λ ≥ 0, a number or ``(*batch,)``.
        weights: ``(*batch, H, W)``, nonnegative, of the pixels' differences; None for ones.
        norm: of the two differences of a pixel: their 2-norm, or the sum of their absolute values.
        tol: of the duality gap relative to the energy; the squared distance to the solution is at most ``2 * tol`` times the energy.
        max_iter: iterations at the most.
        polish: whether an isotropic solution is sharpened by Newton's method on its regions; None: where a derivative is wanted.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where the gap is not reached, λ or a weight is negative, or something not finite.

    Returns:
        ``(*batch, H, W)``.

    Raises:
        NotConvergedError: an image has no solution (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.
        ValueError: an option is not known, or λ is a negative number.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_tv2d
        >>> image = torch.tensor([[0.0, 0.2, 1.0], [0.1, 0.1, 1.2]])
        >>> prox_tv2d(image, 0.1, norm="anisotropic")
        tensor([[0.1500, 0.1500, 1.0000],
                [0.1500, 0.1500, 1.0000]])
    """
    return solve_tv2d(x, lam, weights, norm=norm, tol=tol, max_iter=max_iter, polish=polish, on_failure=on_failure).u


@eager
def solve_tv2d(
    x: Tensor,
    lam: Number,
    weights: Tensor | None = None,
    *,
    norm: Literal["isotropic", "anisotropic"] = "isotropic",
    tol: float = 1e-6,
    max_iter: int = 5000,
    polish: bool | None = None,
    warm_start: TotalVariationSolution | None = None,
    on_failure: OnFailure = "raise",
) -> TotalVariationSolution:
    """Total variation denoising of images, with the dual solution and the duality gap.

    Computed in float64. ``u`` is differentiable in x, λ and the weights, to any order, almost everywhere: derivatives are those of the
    solution whose flat regions are the ones found. A multiplier that is just at its bound counts as inside, so its pixel as flat.

    Polishing makes u the exact solution for the regions found, by Newton's method on the CPU. Derivatives need it, so it is the default
    where one is wanted: the same call without a derivative returns an isotropic u that may differ by what the tolerance allows.
    Anisotropic solutions are always polished, which costs little.

    Args:
        x: ``(*batch, H, W)``.
        lam: λ ≥ 0, a number or ``(*batch,)``.
        weights: ``(*batch, H, W)``, nonnegative, of the pixels' differences; None for ones.
        norm: of the two differences of a pixel: their 2-norm, or the sum of their absolute values.
        tol: of the duality gap relative to the energy; the squared distance to the solution is at most ``2 * tol`` times the energy.
        max_iter: iterations at the most.
        polish: whether an isotropic solution is sharpened by Newton's method on its regions; None: where a derivative is wanted.
        warm_start: the solution of a similar problem, whose dual is where the iteration starts.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where the gap is not reached, λ or a weight is negative, or something not finite.

    Raises:
        NotConvergedError: an image has no solution (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.
        ValueError: an option is not known, or λ is a negative number.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import solve_tv2d
        >>> image = torch.tensor([[0.0, 0.2, 1.0], [0.1, 0.1, 1.2]])
        >>> first = solve_tv2d(image, 0.1)
        >>> again = solve_tv2d(image + 0.001, 0.1, warm_start=first)
        >>> bool(again.residual <= 1e-6)
        True
    """
    if norm not in ("isotropic", "anisotropic"):
        raise ValueError(f"norm={norm!r} is not known; choose 'isotropic' or 'anisotropic'")
    check_entries(x)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ShapeError(f"x must have the shape (*batch, H, W) with H, W ≥ 1, got {tuple(x.shape)}")
    isotropic, grid = norm == "isotropic", tuple(x.shape[-2:])
    batch, w = difference_weights(x, lam, weights, grid)
    x64, w = x.to(torch.float64).expand(*batch, *grid), w.unsqueeze(-3)
    dual = x64.new_zeros(2, *grid) if warm_start is None else warm_start.dual.to(x64)
    if dual.shape[-3:] != (2, *grid):
        raise ShapeError(f"warm_start is for images of {tuple(dual.shape[-2:])}, x has {grid}")
    differentiated = in_a_transform(x64, w) or (torch.is_grad_enabled() and (x64.requires_grad or w.requires_grad))
    sharp = differentiated or bool(polish)
    search = _Search(len(batch), isotropic, tol, max_iter, on_failure, sharp)
    operands = visible_to_modes([x64.detach(), w.detach(), dual.detach()])
    u, dual, labels, free, status, gap, iterations = ImplicitFunction.apply(search, x64.new_zeros(0), *operands)[1:]
    if differentiated:
        usable = (status != Status.NUMERICAL_ERROR)[..., None, None]
        x64, w = torch.where(usable, x64, 0), torch.where(usable.unsqueeze(-1), w, 0)
        if isotropic:
            start, *theta = visible_to_modes([u.flatten(-2), x64, w, labels, free])
            u = ImplicitFunction.apply(_Stationary(len(batch)), start, *theta)[0].unflatten(-1, grid)
        else:
            signs = differences(u).sign() * free
            u = _averaged(x64 - differences_adjoint(w * signs), labels)
    if on_failure != "raise":
        lost = status != Status.SOLVED if on_failure == "nan" else status == Status.NUMERICAL_ERROR
        u = torch.where(lost[..., None, None], torch.nan, u)
    # The Function keeps its output for the derivatives; the caller's copy may be modified in place.
    return TotalVariationSolution(u.to(x.dtype, copy=True), dual.to(x.dtype), status, gap.to(x.dtype), iterations)


class _Search(BroadcastingProblem):
    """Everything that is found without a derivative: u, the dual, regions, free differences, status, gap, iterations."""

    core_ndims = (2, 3, 3)

    def __init__(self, batch_ndim: int, isotropic: bool, tol: float, max_iter: int, on_failure: OnFailure, sharp: bool) -> None:
        super().__init__(batch_ndim, on_failure=on_failure)
        self.isotropic, self.tol, self.max_iter, self.sharp = isotropic, tol, max_iter, sharp

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        x, w, z = theta
        height, width = x.shape[-2:]
        batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-3], z.shape[:-3])
        count = math.prod(batch)
        x = x.expand(*batch, height, width).reshape(count, height, width)
        w = w.expand(*batch, -1, height, width).reshape(count, 1, height, width)
        z = z.expand(*batch, 2, height, width).reshape(count, 2, height, width)
        usable = torch.isfinite(x).flatten(1).all(1) & (torch.isfinite(w) & (w >= 0)).flatten(1).all(1)
        usable &= torch.isfinite(z).flatten(1).all(1)
        x, w, z = (torch.where(usable.reshape(-1, *[1] * (part.dim() - 1)), part, 0) for part in (x, w, z))
        if not self.isotropic:
            w = w.expand(-1, 2, -1, -1)
        middle = x.mean((1, 2), keepdim=True)
        u, z, labels, free, gap, iterations = self._solve(x - middle, w, z)
        status = torch.where(gap <= self.tol, int(Status.SOLVED), int(Status.MAX_ITER))
        status = torch.where(usable, status, int(Status.NUMERICAL_ERROR))
        found = (u + middle, z, labels, free, status, gap, iterations)
        u, *rest, status, gap, iterations = (part.reshape((*batch, *part.shape[1:])) for part in found)
        report_failures(Solution(u, status, gap, iterations), "prox_tv2d", self.on_failure)
        return x0.clone(), u, *rest, status, gap, iterations

    def _solve(self, x: Tensor, w: Tensor, z: Tensor) -> list[Tensor]:
        if len(x) == 0 or (self.isotropic and not self.sharp):
            split = split_bregman(x, w, z, True, self.tol, self.max_iter)
            labels = split.iterations.new_zeros(len(x), x.shape[1] * x.shape[2])
            return [split.u, split.z, labels, ~split.flat, split.gap, split.iterations]
        running = torch.arange(len(x), device=x.device)
        spent = torch.zeros_like(running)
        found: list[Tensor] = []
        start = self.tol if self.isotropic else max(self.tol, _COARSE)
        # A sharpened image may miss a gap that its start has met, where the regions were not the right ones yet.
        for goal in (start, start / 10, start / 100, self.tol / 1000):
            split = split_bregman(x, w, z, self.isotropic, goal, self.max_iter)
            arrays = sharpen(*(part.cpu().numpy() for part in (x, w, split.u, split.flat)), self.isotropic)
            u, labels, free = (torch.from_numpy(part).to(x.device) for part in arrays)
            gap = duality_gap(u, split.z, x, w, self.isotropic)
            spent = spent + split.iterations
            parts = [u, split.z, labels, free, gap, spent]
            if not found:
                found = [part.clone() for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[running] = part
            left = (gap > self.tol) & (spent < self.max_iter)
            if not bool(left.any()):
                break
            running, x, w, z, spent = running[left], x[left], w[left], split.z[left], spent[left]
        return found

    def deeper(self, size: int) -> _Search:
        return _Search(self.batch_ndim + 1, self.isotropic, self.tol, self.max_iter, self.on_failure, self.sharp)


class _Stationary(BroadcastingProblem):
    """u − P (x − Dᵀ w Du/‖Du‖) for u ``(*batch, H * W)``; the last two arguments are the regions and the free pixels."""

    core_ndims = (2, 3, 1, 3)

    def __init__(self, batch_ndim: int) -> None:
        super().__init__(batch_ndim, residual=_stationarity)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        status = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
        return Solution(x0.clone(), status, x0.new_zeros(x0.shape[:-1]), status.clone())

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        u, x, w, labels, free = point
        batch, (height, width) = u.shape[:-1], x.shape[-2:]
        count = math.prod(batch)
        if self._factor is None:
            parts = (u.unflatten(-1, (height, width)), w, labels, free)
            shapes = ((height, width), (1, height, width), (height * width,), (1, height, width))
            flat = [part.expand(*batch, *shape).reshape(count, *shape).cpu().numpy() for part, shape in zip(parts, shapes, strict=True)]
            self._factor = Curvature(*flat)
        b = rhs.reshape(-1 if columns else 1, count * height * width).T
        solved = torch.from_numpy(self._factor.solve(b.cpu().numpy())).T.reshape(rhs.shape).to(rhs.device)
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        return Solution(solved, status, rhs.new_zeros(rhs.shape[:-1]), status.clone())

    def deeper(self, size: int) -> _Stationary:
        return _Stationary(self.batch_ndim + 1)


def _stationarity(u: Tensor, x: Tensor, w: Tensor, labels: Tensor, free: Tensor) -> Tensor:
    d = differences(_averaged(u.unflatten(-1, x.shape[-2:]), labels))
    size = torch.where(free, d.square().sum(-3, keepdim=True), 1).sqrt()
    slope = torch.where(free, w / size, 0) * d
    return u - _averaged(x - differences_adjoint(slope), labels).flatten(-2)


def _averaged(u: Tensor, labels: Tensor) -> Tensor:
    """P u: each pixel has the mean of its region."""
    rows = u.flatten(-2)
    batch = torch.broadcast_shapes(rows.shape[:-1], labels.shape[:-1])
    rows, labels = rows.expand(*batch, -1), labels.expand(*batch, -1)
    empty = torch.zeros_like(rows)
    size = empty.scatter_add(-1, labels, torch.ones_like(rows))
    mean = empty.scatter_add(-1, labels, rows) / size.clamp(min=1)
    return mean.gather(-1, labels).unflatten(-1, u.shape[-2:])
