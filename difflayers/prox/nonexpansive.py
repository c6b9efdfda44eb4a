r"""Proximal operators of convex networks: denoisers that are firmly nonexpansive whatever they have learned.

With a convex network ψ and :math:`R(x) = ψ(x) + \frac{μ}{2} \|x\|^2` the network is

.. math:: f(x) = \operatorname{prox}_R(x) = \arg\min_u \; R(u) + \tfrac12 \|u - x\|^2, \qquad u + ∇R(u) = x,

the proximal operator of a *convex* prior that is known from the outset. So :math:`\|f(x) - f(x')\| \le \|x - x'\| / (1 + μ)`, without a
bound on any weight: plug-and-play iterations with it converge, to the minimizer of a convex objective. The price is a solve where
:class:`~difflayers.LearnedProximalNetwork` has one pass, and that priors which are not convex, those of natural images among them, can
only be approached.

The convex potential of f is :math:`φ(x) = \max_u ⟨u, x⟩ - \frac12 \|u\|^2 - R(u)`, and the inverse needs no solve.

References: Moreau, Proximité et dualité dans un espace hilbertien, 1965; Bauschke and Combettes, Convex Analysis and Monotone Operator
Theory in Hilbert Spaces, 2017, chapter 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..implicit import stationary_value
from ..solution import OnFailure
from .learned import StronglyConvex

__all__ = ["NonexpansiveProximalNetwork"]


class NonexpansiveProximalNetwork(StronglyConvex):
    """The proximal operator of a convex network, as an implicit layer: firmly nonexpansive by construction.

    It has the methods of :class:`LearnedProximalNetwork`, so that one can take the place of the other. Differentiable to any order, in x
    and in the parameters.

    Args:
        potential: ψ, a convex network ``(*batch, *event) -> (*batch,)``, as there.
        strong_convexity: μ ≥ 0 of the prior; f contracts by 1 / (1 + μ).
        tol: of the equations, relative to the size of their terms; None follows the dtype.
        max_iter: Newton steps; None for 50.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where they are not solved.

    Raises:
        ValueError: ``strong_convexity`` is negative.

    Example:
        >>> import torch
        >>> from difflayers.prox import InputConvexNN, NonexpansiveProximalNetwork
        >>> denoise = NonexpansiveProximalNetwork(InputConvexNN(3))
        >>> x, y = torch.randn(2, 5, 3)
        >>> bool(((denoise(x) - denoise(y)).norm(dim=-1) <= (x - y).norm(dim=-1)).all())
        True
    """

    def __init__(
        self,
        potential: nn.Module,
        strong_convexity: float = 0.0,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(potential, strong_convexity, tol=tol, max_iter=max_iter, on_failure=on_failure)

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """The proximal operator of R.

        Args:
            x: ``(*batch, *event)``.
            sigma: the noise level, as plug-and-play algorithms pass it; not looked at.

        Raises:
            NotConvergedError: the minimum was not found (``on_failure="raise"``).
        """
        return self.prox(x)

    def prox(self, x: Tensor, *args: Any, gamma: Tensor | float = 1.0) -> Tensor:
        """The proximal operator of γR.

        Args:
            x: ``(*batch, *event)``.
            args: what a plug-and-play algorithm passes on; not looked at.
            gamma: γ ≥ 0, a number or ``(*batch,)``.

        Raises:
            ValueError: a number γ that is negative.
            NotConvergedError: the same for a tensor, or the minimum was not found (``on_failure="raise"``).
        """
        x, step = self._with_step(x, gamma)
        return self._solve(lambda u, x, g: u + g * self._slope(u) - x, x, step)

    def potential(self, x: Tensor) -> Tensor:
        """φ(x), convex, whose gradient the network is.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.

        Raises:
            NotConvergedError: the minimum was not found (``on_failure="raise"``).
        """
        u, lost = self._without_nan(self(x))
        x = torch.where(lost, 0, x)
        value = stationary_value(lambda u, x: self._inner(u, x) - self._inner(u, u) / 2 - self._phi(u), u, x)
        return torch.where(self._flat(lost), torch.nan, value)

    def inverse(self, x: Tensor) -> Tensor:
        """The y with f(y) = x, which is x + ∇R(x).

        Args:
            x: ``(*batch, *event)``.
        """
        return x + self._slope(x)

    def prior(self, x: Tensor) -> Tensor:
        """R(x).

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """
        return self._phi(x)
