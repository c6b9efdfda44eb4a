r"""The value of an objective at its own optimum, differentiated by the envelope theorem.

Let y(θ) be a stationary point of Φ(·, θ): a minimizer, a maximizer, a saddle point. Then

.. math:: \frac{d}{dθ} Φ(y(θ), θ) = \frac{∂Φ}{∂θ}(y(θ), θ),

since the term with ∂y/∂θ is multiplied by ∂Φ/∂y = 0. The first derivative needs y alone, and no linear system. It is a function of y
itself, so that the second one,

.. math:: \frac{∂^2 Φ}{∂θ^2} + \frac{∂^2 Φ}{∂θ\,∂y} \frac{∂y}{∂θ},

follows from the derivative that y carries. (Detaching y would lose its last term.)

References: Milgrom and Segal, Envelope theorems for arbitrary choice sets, Econometrica 70 (2002); Danskin, The theory of max-min, 1967.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..errors import ShapeError
from ..solution import Solution
from .broadcasting import ExplicitProblem
from .closure import hoist, visible_to_modes
from .eager import eager
from .function import ImplicitFunction, Problem
from .methods import LinearMethod

__all__ = ["HeldArgument", "stationary_value"]


@eager
def stationary_value(fun: Callable[..., Tensor], y: Tensor, *args: Any) -> Tensor:
    """``fun(y, *args)`` where y is a stationary point of it: a first derivative that takes no linear system.

    Args:
        fun: ``(y, *args) -> (*batch,)``, row by row. Tensors that it closes over, module parameters included, are differentiated as well.
        y: ``(*batch, ...)`` with ∂fun/∂y = 0, as a layer returned it; what it carries makes second derivatives exact. A y that is
            stationary up to a residual r leaves an error of r · ∂y/∂θ in the first derivative.
        args: pytrees; every floating tensor in them is differentiated.

    Returns:
        ``(*batch,)``.

    Raises:
        ShapeError: the batch of the value is not that of y.

    Example:
        >>> import torch
        >>> from difflayers.implicit import stationary_value
        >>> x = torch.tensor([0.5, 3.0], requires_grad=True)
        >>> y = torch.nn.functional.softshrink(x, 1.0)                # argmin |y| + ½ (y − x)²
        >>> envelope = stationary_value(lambda y, x: y.abs() + (y - x) ** 2 / 2, y, x)   # Huber's function
        >>> torch.autograd.grad(envelope.sum(), x)[0]
        tensor([0.5000, 1.0000])
    """
    leaves, spec = _pytree.tree_flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def value(y: Tensor, *tensors: Tensor) -> Tensor:
        full = list(leaves)
        for i, tensor in zip(moving, tensors, strict=True):
            full[i] = tensor
        return fun(y, *_pytree.tree_unflatten(full, spec))

    tensors = [leaves[i] for i in moving]
    explicit, captured, first = hoist(value, y, *tensors, of=fun)
    if not isinstance(first, Tensor) or first.shape != y.shape[: first.dim()]:
        came = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ShapeError(
            f"fun must return one value for each y, a tensor (*batch,) with y (*batch, ...): got {came}, y is {tuple(y.shape)}"
        )
    held = len(captured)

    def residual(v: Tensor, *theta: Tensor) -> Tensor:
        return v - explicit(theta[:held], *theta[held:]).unsqueeze(-1)

    operands = visible_to_modes([*captured, y, *tensors])
    start = torch.zeros_like(first.detach()).unsqueeze(-1)
    return ImplicitFunction.apply(_StationaryValue(residual, held, first.dim()), start, *operands)[0].squeeze(-1)


class HeldArgument(Problem):
    """A problem unchanged by one of its arguments, to first order: number ``held``, the last by default, gets no derivative."""

    held = -1

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Any:
        """The gradient with it held; what the argument carries itself makes second derivatives right."""
        held = self.held % len(theta)
        kept = [i for i in which if i != held]
        slopes = dict(zip(kept, super().pullback(x, theta, kept, u), strict=True)) if kept else {}
        return [slopes.get(i) for i in which]

    def pushforward(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """The derivative with it held."""
        held = self.held % len(theta)
        pairs = [(i, tangent) for i, tangent in zip(which, tangents, strict=True) if i != held]
        if not pairs:
            return torch.zeros_like(x)
        return super().pushforward(x, theta, [i for i, _ in pairs], [tangent for _, tangent in pairs])


class _StationaryValue(HeldArgument):
    """v − Φ(y, θ) = 0 in v, with no derivative in y."""

    operator = ExplicitProblem.operator
    solve_linear = ExplicitProblem.solve_linear

    def __init__(self, residual: Callable[..., Tensor], held: int, batch_ndim: int) -> None:
        super().__init__(residual, _one_step, LinearMethod(), batch_ndim=batch_ndim)
        self.held = held

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        """The same with one more batch dimension."""
        key = (in_dims, size, randomness)
        if key not in self._batched:
            residual = torch.func.vmap(self.residual, in_dims=(0, *in_dims), randomness=randomness)
            self._batched[key] = _StationaryValue(residual, self.held, self.batch_ndim + 1)
        return self._batched[key]


def _one_step(residual: Callable[[Tensor], Tensor], v: Tensor, batch_ndim: int) -> Solution:
    status = torch.zeros(v.shape[:-1], dtype=torch.int64, device=v.device)
    return Solution(v - residual(v), status, v.new_zeros(v.shape[:-1]), status)
