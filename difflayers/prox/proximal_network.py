r"""What every network that is the gradient of a convex function can do, because it is a proximal operator.

Let f = ∇φ with φ convex. Then f is the proximal operator of a function R, the *prior*, which need not be convex:

.. math:: f(y) = \arg\min_u \; R(u) + \tfrac12 \|u - y\|^2, \qquad R(x) = \max_y \bigl(⟨x, y⟩ - φ(y)\bigr) - \tfrac12 \|x\|^2.

Every gradient of a convex function is such an operator, and nothing else is. R is evaluated where f is inverted, at :math:`y = f^{-1}(x)`;
by the envelope theorem :math:`∇R(x) = y - x` and :math:`∂R/∂θ = -∂_θ φ(y)` with y held. For any other step size γ,

.. math:: \operatorname{prox}_{γR}(x) = f(y), \qquad γ y + (1 - γ) f(y) = x,

because the optimality condition is :math:`γ (y - u) + u - x = 0` with :math:`u = f(y)`. For γ = 1 that is y = x, for γ = 0 the inverse. The
equation has the symmetric Jacobian :math:`γ I + (1 - γ) ∇^2 φ(y)`, positive definite for 0 ≤ γ ≤ 1, and beyond as long as
:math:`∇^2 φ < \frac{γ}{γ - 1} I`, where γR + ½‖·‖² is still convex. It is solved by Newton's method with conjugate gradients, all points at
once, and so are the linear systems of its derivatives.

References: Moreau, Proximité et dualité dans un espace hilbertien, 1965; Gribonval and Nikolova, A characterization of proximity operators,
J. Math. Imaging Vis. 62 (2020), arXiv:1807.04014; Fang, Buchanan and Sulam, What's in a prior? Learned proximal networks for inverse
problems, ICLR 2024, arXiv:2310.14344.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..implicit import implicit_root, stationary_value
from ..solution import OnFailure
from ..solvers import newton

__all__ = ["ProximalNetwork"]


class ProximalNetwork(nn.Module, abc.ABC):
    """The base of networks that are the gradient of a convex function: :meth:`forward` is f, :meth:`potential` is φ, and the rest follows.

    Args:
        event_ndim: how many last dimensions of x are one point.
        tol: of the equations that are solved, relative to the size of their terms; None follows the dtype.
        max_iter: Newton steps for them; None for 50.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where they are not solved.
    """

    def __init__(
        self, event_ndim: int = 1, *, tol: float | None = None, max_iter: int | None = None, on_failure: OnFailure = "raise"
    ) -> None:
        super().__init__()
        self.event_ndim, self.tol, self.max_iter, self.on_failure = event_ndim, tol, max_iter, on_failure

    @abc.abstractmethod
    def potential(self, x: Tensor) -> Tensor:
        """φ(x), convex, whose gradient the network is.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """

    def inverse(self, x: Tensor) -> Tensor:
        """The y with f(y) = x, of all points at once.

        Args:
            x: ``(*batch, *event)``.

        Raises:
            NotConvergedError, SingularError: there is no such y, or it was not found (``on_failure="raise"``).
        """
        return self._solve(lambda y, x: self(y) - x, x)

    def prior(self, x: Tensor) -> Tensor:
        """R(x), up to a constant that all x share. Its gradient is y − x with f(y) = x, and takes no linear system.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.

        Raises:
            NotConvergedError, SingularError: x is not in the range of f, where R is infinite, or the inverse was not found
                (``on_failure="raise"``).
        """
        y, lost = self._without_nan(self.inverse(x))
        x = torch.where(lost, 0, x)
        conjugate = stationary_value(lambda y, x: self._inner(x, y) - self.potential(y), y, x)
        return torch.where(self._flat(lost), torch.nan, conjugate - self._inner(x, x) / 2)

    def prox(self, x: Tensor, *args: Any, gamma: Tensor | float = 1.0) -> Tensor:
        """The proximal operator of γR: the network itself for the number 1, else by one root.

        Args:
            x: ``(*batch, *event)``.
            args: what a plug-and-play algorithm passes on, a noise level say; not looked at.
            gamma: γ ≥ 0, a number or ``(*batch,)``. For γ > 1 the operator exists while γR + ½‖·‖² is convex; where it is not, the solve
                may fail, and says so.

        Raises:
            ValueError: a number γ that is negative, or known to be too large.
            NotConvergedError: the same for a tensor, or the root was not found (``on_failure="raise"``).
        """
        if not isinstance(gamma, Tensor) and gamma == 1:
            return self(x)
        x, step = self._with_step(x, gamma)
        y, lost = self._without_nan(self._solve(lambda y, x, g: g * y + (1 - g) * self(y) - x, x, step))
        return torch.where(lost, torch.nan, self(y))

    def _largest_gamma(self) -> float:
        """The largest γ for which the proximal operator of γR is known to exist, or inf where nothing is known."""
        return math.inf

    def _inner(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(tuple(range(-self.event_ndim, 0)))

    def _flat(self, marks: Tensor) -> Tensor:
        return marks.reshape(marks.shape[: marks.dim() - self.event_ndim])

    def _with_step(self, x: Tensor, gamma: Tensor | float) -> tuple[Tensor, Tensor]:
        """x, and γ as a tensor that broadcasts against it, a number of each point; x has a point for each γ."""
        limit = self._largest_gamma()
        if isinstance(gamma, Tensor):
            step = gamma.to(x.dtype).reshape(*gamma.shape, *[1] * self.event_ndim)
        elif not 0 <= gamma < math.inf or gamma > limit:
            raise ValueError(f"gamma must be at least 0, and at most {limit:g} for this network, got {gamma}")
        else:
            step = x.new_tensor(gamma)
        # A value that makes no sense fails as NaN, in its own element: under vmap it cannot be looked at.
        step = torch.where((step >= 0) & (step <= limit), step, torch.nan)
        return x.expand(torch.broadcast_shapes(x.shape, step.shape)), step

    def _solve(self, equation: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        """The root of an equation with a symmetric positive definite Jacobian, for each point, from x."""
        root = implicit_root(
            equation,
            functools.partial(newton, symmetric=True, dense_limit=0),
            linear_solver="cg",
            symmetric=True,
            batch_ndim=x.dim() - self.event_ndim,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )
        return root(x.detach().nan_to_num(), x, *args)

    def _without_nan(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Points that were not found as zeros, and which they are: what is computed of a NaN has the gradient NaN, also if it is masked."""
        lost = y.isnan().flatten(-self.event_ndim).any(-1)
        lost = lost.reshape(*lost.shape, *[1] * self.event_ndim)
        return torch.where(lost, 0, y), lost
