r"""Rules that make operators out of others, and the Moreau envelope.

.. math::
   \operatorname{prox}_{γ f^*}(x) &= x - γ \operatorname{prox}_{f/γ}(x/γ), &
   \operatorname{prox}_{γ f(a \cdot + b)}(x) &= \bigl(\operatorname{prox}_{a^2 γ f}(a x + b) - b\bigr) / a, \\
   M_{γf}(x) &= \min_u f(u) + \tfrac{1}{2γ} \|u - x\|^2, &
   ∇M_{γf}(x) &= \bigl(x - \operatorname{prox}_{γf}(x)\bigr) / γ.

An operator is any function ``(x, gamma) -> argmin_u γ f(u) + ½‖u − x‖²``: most of this package are, with λ in the place of γ, and
``lambda x, gamma: prox_lp(x, gamma * lam, p)`` is. γ broadcasts against x, and reaches the operator with the shape that it came with.

The first derivative of the envelope needs none of the minimizer p, nor of f in p, which may not have one there
(:func:`~difflayers.implicit.stationary_value`).

References: Moreau, Proximité et dualité dans un espace hilbertien, Bull. SMF 93 (1965); Bauschke and Combettes, Convex Analysis and
Monotone Operator Theory in Hilbert Spaces, Springer 2017, chapters 12 and 24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...implicit import stationary_value
from ...implicit.eager import eager
from .arguments import Number, check_entries, entry_weight

__all__ = ["Indicator", "Operator", "moreau_envelope", "prox_affine", "prox_conjugate", "prox_indicator"]

Operator = Callable[[Tensor, Any], Tensor]


def prox_conjugate(prox: Operator, x: Tensor, gamma: Number = 1.0) -> Tensor:
    """The proximal operator of γ f*, from that of f by Moreau's identity.

    Args:
        prox: ``(x, gamma) -> argmin_u γ f(u) + ½‖u − x‖²``, for a convex f.
        x: what ``prox`` takes.
        gamma: γ > 0, a number or a tensor that broadcasts against x.

    Returns:
        The shape of x.

    Raises:
        ValueError: γ is a number that is not positive.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_conjugate, soft_threshold
        >>> prox_conjugate(soft_threshold, torch.tensor([-3.0, 0.2, 0.7]))  # the conjugate of ‖·‖₁ is the indicator of a box
        tensor([-1.0000,  0.2000,  0.7000])
    """
    check_entries(x)
    step = entry_weight(gamma, "gamma", x, positive=True)
    return x - step * prox(x / step, 1 / gamma)


def prox_affine(prox: Operator, x: Tensor, gamma: Number = 1.0, *, scale: Number = 1.0, shift: Number = 0.0) -> Tensor:
    """The proximal operator of u ↦ γ f(a u + b).

    Args:
        prox: ``(x, gamma) -> argmin_u γ f(u) + ½‖u − x‖²``.
        x: what ``prox`` takes.
        gamma: γ ≥ 0, a number or a tensor that broadcasts against x.
        scale: a ≠ 0, a number or a tensor; one for each entry only if f acts on each entry alone.
        shift: b, a number or a tensor that broadcasts against x.

    Returns:
        The shape of x.

    Raises:
        ValueError: a is the number zero.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_affine, soft_threshold
        >>> prox_affine(soft_threshold, torch.tensor([4.0, 1.2]), 0.5, shift=-1.0)  # of ½‖u − 1‖₁
        tensor([3.5000, 1.0000])
    """
    check_entries(x)
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError("scale must not be zero: f would not depend on x")
    return (prox(scale * x + shift, scale * scale * gamma) - shift) / scale


def prox_indicator(projection: Callable[..., Tensor], *arguments: Any, **options: Any) -> Operator:
    """The proximal operator of the indicator of a set, its projection, as an operator ``(x, gamma)`` that does not depend on γ.

    Args:
        projection: any function of :mod:`difflayers.convex.projections`, or ``(x, *arguments, **options) -> x``.
        arguments: what the projection takes after x.
        options: its keywords.

    Returns:
        A callable ``(x, gamma=1.0) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_l1_ball
        >>> from difflayers.prox.operators import prox_conjugate, prox_indicator
        >>> ball = prox_indicator(projection_l1_ball, 1.0)
        >>> prox_conjugate(ball, torch.tensor([3.0, -2.5, 1.0]))  # the conjugate is the maximum norm
        tensor([ 2.2500, -2.2500,  1.0000])
    """
    return Indicator(projection, arguments, options)


@eager
def moreau_envelope(fun: Callable[[Tensor], Tensor], prox: Operator, x: Tensor, gamma: Number = 1.0) -> Tensor:
    """The Moreau envelope M(x) = min_u f(u) + ‖u − x‖²/(2γ), a smooth function with the minimizers of f.

    Its gradient (x − p)/γ needs no derivative of f in x, and its second derivatives are exact where the operator has a derivative. Both
    functions are differentiated in the tensors that they close over, too.

    Args:
        fun: f, ``(*batch, ...) -> (*batch,)``.
        prox: ``(x, gamma) -> argmin_u γ f(u) + ½‖u − x‖²``.
        x: what both take.
        gamma: γ > 0, a number or a tensor that broadcasts against x.

    Returns:
        ``(*batch,)``, as f gives it.

    Raises:
        ShapeError: f does not give one value for each element of the batch.
        ValueError: γ is a number that is not positive.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import moreau_envelope, soft_threshold
        >>> x = torch.tensor([3.0, 0.5], requires_grad=True)
        >>> value = moreau_envelope(lambda u: u.abs().sum(-1), soft_threshold, x)  # Huber's function
        >>> value.detach(), torch.autograd.grad(value, x)[0]
        (tensor(2.6250), tensor([1.0000, 0.5000]))
    """
    check_entries(x)
    step = entry_weight(gamma, "gamma", x, positive=True)
    p = prox(x, gamma)

    def objective(p: Tensor, x: Tensor, step: Tensor) -> Tensor:
        value = fun(p)
        if not isinstance(value, Tensor) or value.shape != p.shape[: value.dim()]:
            return value  # refused by stationary_value
        distance = (p - x).square() / (2 * step)
        inner = tuple(range(value.dim(), distance.dim()))
        return value + (distance.sum(inner) if inner else distance)

    return stationary_value(objective, p, x.expand(p.shape), step.expand(p.shape))


class Indicator:
    """A projection with its arguments, as an operator (a class, so that it can be pickled)."""

    def __init__(self, projection: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.projection, self.arguments, self.options = projection, arguments, options

    def __call__(self, x: Tensor, gamma: Any = 1.0) -> Tensor:
        """The projection; ``gamma`` is not used."""
        return self.projection(x, *self.arguments, **self.options)
