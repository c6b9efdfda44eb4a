r"""How well x explains the measurements y: f(x) = (w / 2) ‖A x − y‖², its gradient and its proximal operator.

.. math:: \nabla f(x) = w A^T (A x - y), \qquad
    \operatorname{prox}_{γ f}(x) = (I + γ w A^T A)^{-1} (x + γ w A^T y).

The calls are those of deepinv's data fidelities: ``grad(x, y, physics)`` and ``prox(x, y, physics, gamma=...)``. Here the operator may
be given once and ``physics`` left out. Any object with ``A`` and ``A_adjoint`` is an operator.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..holding import hold
from .linear_operators import Operator, number_or_shape, prox_by_products, spread

__all__ = ["L2"]


class L2(nn.Module):
    """The misfit (w / 2) ‖A x − y‖² of Gaussian noise.

    Args:
        operator: A, any object with ``A`` and ``A_adjoint``; None for the identity, or if each call brings its own.
        weight: w, one over the variance of the noise; one number, or one for each problem, ``(*batch,)``. An ``nn.Parameter`` is learned.
        batch_ndim: how many leading dimensions of x count independent problems.

    Example:
        >>> import torch
        >>> from difflayers.prox import L2, Mask
        >>> misfit = L2(Mask(torch.tensor([1.0, 0.0])))
        >>> misfit.grad(torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([[2., 0.]])
        >>> misfit.prox(torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 0.0]]), gamma=1.0)
        tensor([[2., 3.]])
    """

    weight: Tensor | float

    def __init__(self, operator: Any = None, weight: Tensor | float = 1.0, *, batch_ndim: int = 1) -> None:
        super().__init__()
        self.operator, self.batch_ndim = operator, batch_ndim
        hold(self, "weight", weight)

    def forward(self, x: Tensor, y: Tensor, physics: Any = None) -> Tensor:
        """The misfit of each problem, ``(*batch,)``."""
        misfit = self._measure(x, physics) - y
        return spread(self.weight, misfit.flatten(self.batch_ndim)[..., 0]) / 2 * misfit.flatten(self.batch_ndim).square().sum(-1)

    def grad(self, x: Tensor, y: Tensor, physics: Any = None) -> Tensor:
        """The gradient of the misfit in x.

        Args:
            x: ``(*batch, ...)``.
            y: the measurements.
            physics: an operator in place of the one given at the start.
        """
        return spread(self.weight, x) * self.start(self._measure(x, physics) - y, physics)

    def prox(self, x: Tensor, y: Tensor, physics: Any = None, *, gamma: Tensor | float = 1.0) -> Tensor:
        """The proximal operator of γ times the misfit at x.

        Args:
            x: ``(*batch, ...)``.
            y: the measurements.
            physics: an operator in place of the one given at the start.
            gamma: γ, one number, or one for each problem.
        """
        weight = spread(self.weight, x) * spread(gamma, x)
        operator = self.operator if physics is None else physics
        if operator is None:
            return (x + weight * y) / (1 + weight)
        if isinstance(operator, Operator):
            return operator.prox_l2(x, y, weight)
        return prox_by_products(operator, x, y, weight, batch_ndim=self.batch_ndim)

    def start(self, y: Tensor, physics: Any = None) -> Tensor:
        """Aᵀ y, where an algorithm starts."""
        operator = self.operator if physics is None else physics
        return y if operator is None else operator.A_adjoint(y)

    def _measure(self, x: Tensor, physics: Any) -> Tensor:
        operator = self.operator if physics is None else physics
        return x if operator is None else operator.A(x)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={number_or_shape(self.weight)}"
