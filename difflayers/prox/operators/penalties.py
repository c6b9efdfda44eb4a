r"""Penalties that grow slower than |u|, and powers: λ log(1 + |u|/ε) and λ|u|^p, by their global minimizers.

.. math:: \min_{u \ge 0} \; \tfrac12 (u - x)^2 + λ \log(1 + u/ε): \qquad u^2 + (ε - x) u + λ - ε x = 0,

whose larger root is the local minimizer; where it is no better than zero, the minimizer is zero. It jumps unless λ ≤ ε².

.. math:: \min_{u \ge 0} \; \tfrac12 (u - x)^2 + λ u^p: \qquad u + λ p u^{p-1} = x.

For p < 1 the minimizer is zero below :math:`τ = β + λ p β^{p-1}`, :math:`β = (2λ(1 - p))^{1/(2-p)}`, and the larger root, which is at
least β, from there on; for p > 1 it is the only root. The root is found by Newton's method in a bracket, for w = log u, in which the
equation is a sum of exponentials: so roots of all sizes are found to rounding. Its derivatives come from the implicit rule, in x, λ and p.

References: Candès, Wakin and Boyd, Enhancing sparsity by reweighted ℓ₁ minimization, 2008, arXiv:0711.1612; Gong, Zhang, Lu, Huang and
Ye, A general iterative shrinkage and thresholding algorithm, ICML 2013, arXiv:1303.4434; Marjanovic and Solo, On ℓq optimization and
matrix completion, IEEE TSP 60 (2012).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...convex.projections.scalar_root import Equation, scalar_root
from ...implicit.eager import eager
from ...solution import OnFailure
from .arguments import Number, check_entries, entry_weight, negative, weights_reported

__all__ = ["prox_log", "prox_lp"]


def prox_log(x: Tensor, lam: Number, epsilon: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    r"""The proximal operator of :math:`λ \sum_i \log(1 + |x_i|/ε)`.

    The penalty is :math:`λ|x|/ε` near zero and hardly grows far out, where entries are shrunk by :math:`λ/(|x| + ε)` only. Not convex: the
    global minimizer is returned, and where two are equally good, at the jump, the one that is not zero. Computed in float64.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        epsilon: ε > 0, likewise. With λ ≤ ε² the operator is continuous.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative, or ε is not positive.

    Returns:
        The shape of x, λ and ε broadcast.

    Raises:
        NotConvergedError: λ is negative, or ε not positive, somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_log
        >>> prox_log(torch.tensor([-3.0, 0.4, 2.0]), 1.0, 0.5)
        tensor([-2.6861,  0.0000,  1.5000])
    """
    check_entries(x)
    weight, width = entry_weight(lam, "lam", x), entry_weight(epsilon, "epsilon", x, positive=True)
    left = x < 0
    size, weight, width = torch.broadcast_tensors(*(part.to(torch.float64) for part in (torch.where(left, -x, x), weight, width)))
    refused = (weight < 0) | (width <= 0)
    weight, width = torch.where(refused, 0, weight), torch.where(refused, 1, width)
    square = (size + width).square() - 4 * weight
    real = square > 0
    root = torch.where(real, torch.where(real, square, 1).sqrt(), 0)
    # The form of the larger root in which nothing cancels.
    right = size >= width
    other = torch.where(right, 1, root + width - size)
    u = torch.where(right, (size - width + root) / 2, 2 * (size * width - weight) / torch.where(other > 0, other, 1))
    found = u.detach().clamp(min=0)
    gain = found * (found / 2 - size.detach()) + weight.detach() * torch.log1p(found / width.detach())
    # With λ = 0, and for x = 0, both minimizers are one.
    chosen = real & (u.detach() >= 0) & (gain <= 0)
    point = torch.where(chosen, torch.where(left, -u, u), 0)
    point = torch.where((size + weight + width).isnan(), torch.nan, point).to(x.dtype)
    violation = _violation(negative(lam), epsilon)
    rule = "lam must not be negative, and epsilon must be positive"
    return weights_reported(point, violation, "prox_log", on_failure, core_ndim=0, rule=rule)


@eager
def prox_lp(x: Tensor, lam: Number, p: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    r"""The proximal operator of :math:`λ \sum_i |x_i|^p`, for any p > 0.

    For p < 1 it is not convex: the global minimizer is returned, and where two are equally good, at the jump, the one that is not zero.
    p = 1 is the soft threshold. Differentiable in x, λ and p; computed in float64. For p = 0 see :func:`prox_l0`.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        p: p > 0, likewise.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative, or p is not positive.

    Returns:
        The shape of x, λ and p broadcast. An entry that is not finite gives NaN.

    Raises:
        NotConvergedError: λ is negative, or p not positive, somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_lp
        >>> prox_lp(torch.tensor([-3.0, 0.4, 2.0]), 1.0, 0.5)
        tensor([-2.6955,  0.0000,  1.6054])
    """
    check_entries(x)
    weight, power = entry_weight(lam, "lam", x), entry_weight(p, "p", x, positive=True)
    size, weight, power = torch.broadcast_tensors(*(part.to(torch.float64) for part in (x.abs(), weight, power)))
    broken = ~(torch.isfinite(size) & torch.isfinite(weight) & torch.isfinite(power)) | (weight < 0) | (power <= 0)
    weight, power = torch.where(broken, 0, weight), torch.where(broken, 1, power)
    least = _jump(weight.detach(), power.detach())
    solved = ~broken & (size > 0) & torch.where(power <= 1, size >= least + _pull(least, weight, power).detach(), True)
    parts = [torch.where(solved, part, 1) for part in (size, weight, power)]
    parts[0] = torch.where(solved, size, 2)
    u = scalar_root(_ROOT, *(part.unsqueeze(-1) for part in parts)).exp().squeeze(-1)
    # At x = 0 the line that touches the operator there.
    slope = torch.where((weight == 0) | (power > 2), 1, torch.where(power == 2, 1 / (1 + 2 * weight), 0))
    point = torch.where(solved, x.sign() * u, torch.where(size == 0, slope, 0) * torch.where(size == 0, x, 0))
    point = torch.where(broken, torch.nan, point).to(x.dtype)
    violation = _violation(negative(lam), p)
    rule = "lam must not be negative, and p must be positive"
    return weights_reported(point, violation, "prox_lp", on_failure, core_ndim=0, rule=rule)


def _pull(u: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    """λ p u^(p−1), the derivative of the penalty, where it is finite."""
    return torch.where(u > 0, weight * power * torch.where(u > 0, u, 1) ** (power - 1), torch.where(power == 1, weight, 0))


def _jump(weight: Tensor, power: Tensor) -> Tensor:
    """β: the least minimizer for p < 1 that is not zero; 0 from p = 1 on."""
    below = power < 1
    q = torch.where(below, power, 0)
    return torch.where(below, (2 * weight * (1 - q)) ** (1 / (2 - q)), 0)


def _residual(w: Tensor, size: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    return w.exp() + weight * power * ((power - 1) * w).exp() - size


def _newton(w: Tensor, size: Tensor, weight: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    u, pull = w.exp(), weight * power * ((power - 1) * w).exp()
    # An exponential carries the rounding of its exponent.
    return u + (power - 1) * pull, 2 * ((1 + w.abs()) * u + (1 + ((power - 1) * w).abs()) * pull + size)


def _bracket(size: Tensor, weight: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms between which the root is. For p ≤ 1 the pull is largest at β; for p > 1 one of the two terms is at least half of x."""
    least = _jump(weight, power)
    concave = torch.maximum(least, size - _pull(least, weight, power)).log()
    safe = torch.where(power > 1, power, 2)
    half = (size / 2).log()
    convex = torch.minimum(half, (half - (weight * safe).log()) / (safe - 1))
    upper = torch.minimum(size.log(), torch.where(power > 1, (size.log() - (weight * safe).log()) / (safe - 1), torch.inf))
    lower = torch.where(power > 1, convex, concave)
    return lower, torch.maximum(lower, upper)


def _violation(violation: Tensor | None, scale: Number) -> Tensor | None:
    """Positive also where ``scale`` is not."""
    if not isinstance(scale, Tensor):
        return violation
    outside = torch.where(scale.detach() <= 0, 1 - scale.detach(), -1)
    return outside if violation is None else torch.maximum(violation, outside)


_ROOT = Equation(_residual, _newton, _bracket)
