r"""Learned proximal networks: networks that are exactly the proximal operator of some function, which can be evaluated.

Let ψ be a convex network and :math:`φ(y) = ψ(y) + \frac{μ}{2}\|y\|^2`. Its gradient

.. math:: f(y) = ∇φ(y) = ∇ψ(y) + μ y

is a bijection (μ > 0) and the proximal operator of a function R, the *prior*, which need not be convex:

.. math:: f(y) = \arg\min_u \; R(u) + \tfrac12 \|u - y\|^2, \qquad R(x) = \max_y \bigl(⟨x, y⟩ - φ(y)\bigr) - \tfrac12 \|x\|^2.

Every gradient of a convex function is such an operator, and nothing else is. R is evaluated where f is inverted, at :math:`y = f^{-1}(x)`;
by the envelope theorem :math:`∇R(x) = y - x` and :math:`∂R/∂θ = -∂_θ φ(y)` with y held. For any other step size γ,

.. math:: \operatorname{prox}_{γR}(x) = f(y), \qquad γ y + (1 - γ) f(y) = x,

because the optimality condition is :math:`γ (y - u) + u - x = 0` with :math:`u = f(y)`. For γ = 1 that is y = x, for γ = 0 the inverse. The
equation has the symmetric Jacobian :math:`γ I + (1 - γ) ∇^2 φ(y)`, positive definite for 0 ≤ γ ≤ 1, and beyond as long as
:math:`∇^2 φ < \frac{γ}{γ - 1} I`, where γR + ½‖·‖² stops to be convex. It is solved by Newton's method with conjugate gradients, and so are
the derivatives' linear systems.

References: Fang, Buchanan and Sulam, What's in a prior? Learned proximal networks for inverse problems, ICLR 2024, arXiv:2310.14344;
Gribonval and Nikolova, A characterization of proximity operators, J. Math. Imaging Vis. 62 (2020); Moreau, Proximité et dualité dans un
espace hilbertien, 1965.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..implicit import implicit_root, stationary_value
from ..solution import OnFailure
from ..solvers import newton

__all__ = ["LearnedProximalNetwork", "ProximalNetwork"]


class ProximalNetwork(nn.Module):
    """What proximal networks share: φ(x) = ψ(x) + μ/2 ‖x‖², its gradient, and a way to solve equations with it.

    Args:
        potential: ψ, as of :class:`LearnedProximalNetwork`.
        strong_convexity: μ.
        tol, max_iter, on_failure: of the equations, as of :func:`~difflayers.implicit.implicit_root`.
    """

    def __init__(
        self, potential: nn.Module, strong_convexity: float, tol: float | None, max_iter: int | None, on_failure: OnFailure
    ) -> None:
        super().__init__()
        self.network = potential
        self.strong_convexity = float(strong_convexity)
        self.event_ndim: int = getattr(potential, "event_ndim", 1)
        self.tol, self.max_iter, self.on_failure = tol, max_iter, on_failure

    def extra_repr(self) -> str:
        """The modulus of convexity."""
        return f"strong_convexity={self.strong_convexity}"

    def _phi(self, x: Tensor) -> Tensor:
        return self.network(x) + self.strong_convexity / 2 * self._inner(x, x)

    def _slope(self, x: Tensor) -> Tensor:
        gradient: Any = getattr(self.network, "gradient", None)
        if gradient is not None:
            return gradient(x) + self.strong_convexity * x
        return torch.func.grad(lambda x: self.network(x).sum())(x) + self.strong_convexity * x

    def _inner(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(tuple(range(-self.event_ndim, 0)))

    def _solve(self, equation: Callable[..., Tensor], start: Tensor, *args: Any) -> Tensor:
        """The root of an equation whose Jacobian is symmetric positive definite, for each point."""
        root = implicit_root(
            equation,
            functools.partial(newton, symmetric=True, dense_limit=0),
            linear_solver="cg",
            symmetric=True,
            batch_ndim=start.dim() - self.event_ndim,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )
        return root(start.detach(), *args)

    def _step(self, gamma: Tensor | float, x: Tensor) -> Tensor:
        """γ as a tensor that broadcasts against x."""
        if not isinstance(gamma, Tensor):
            if not gamma >= 0:
                raise ValueError(f"gamma must not be negative, got {gamma}")
            return x.new_tensor(gamma)
        return gamma.to(x.dtype)[(..., *[None] * self.event_ndim)] if 0 < gamma.dim() < x.dim() else gamma.to(x.dtype)


class LearnedProximalNetwork(ProximalNetwork):
    """The gradient of a convex network: a denoiser that is the proximal operator of a prior one can look at.

    Trained as a denoiser (with :class:`ProximalMatchingLoss`, say) it is the proximal operator of what it has learned of the data, R. All
    methods are differentiable to any order, in x and in the parameters.

    Args:
        potential: ψ, a convex network ``(*batch, *event) -> (*batch,)``: :class:`InputConvexNN`, :class:`ConvolutionalInputConvexNN`, or
            any module that you know to be convex. It may have ``.gradient(x)``, and ``.event_ndim`` if that is not 1.
        strong_convexity: μ ≥ 0, a lower bound of the Jacobian's eigenvalues. ``inverse``, ``prior`` and ``prox`` with γ < 1 need μ > 0,
            which also says how well they can be computed: the condition number of their equations is ‖∇²φ‖ / μ.
        tol: of the equations that ``inverse``, ``prior`` and ``prox`` solve, relative to the size of their terms; None follows the dtype.
        max_iter: Newton steps for them; None for 50.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where they are not solved.

    Example:
        >>> import torch
        >>> from difflayers.prox import InputConvexNN, LearnedProximalNetwork
        >>> denoise = LearnedProximalNetwork(InputConvexNN(3), strong_convexity=0.1).double()
        >>> y = torch.randn(4, 3, dtype=torch.float64)
        >>> x = denoise(y)
        >>> bool((denoise.inverse(x) - y).abs().max() < 1e-8), denoise.prior(x).shape
        (True, torch.Size([4]))
    """

    def __init__(
        self,
        potential: nn.Module,
        strong_convexity: float = 0.02,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        if not strong_convexity >= 0:
            raise ValueError(f"strong_convexity must not be negative, got {strong_convexity}")
        super().__init__(potential, strong_convexity, tol, max_iter, on_failure)

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """f(x) = ∇ψ(x) + μ x: the denoised x, by one explicit pass if ψ has ``.gradient``.

        Args:
            x: ``(*batch, *event)``.
            sigma: the noise level, as plug-and-play algorithms pass it. This network was trained for one, and does not look at it.
        """
        return self._slope(x)

    def prox(self, x: Tensor, *args: Any, gamma: Tensor | float = 1.0) -> Tensor:
        """The proximal operator of γR: f itself for γ = 1, else by one root.

        Args:
            x: ``(*batch, *event)``.
            args: what a plug-and-play algorithm passes on, a noise level say; not looked at.
            gamma: γ ≥ 0, a number or ``(*batch,)``. For γ > 1 the operator exists while γR + ½‖·‖² is convex; where it is not, the solve
                fails and says so.
        """
        if not isinstance(gamma, Tensor) and gamma == 1:
            return self(x)
        return self(self._solve(lambda y, x, g: g * y + (1 - g) * self._slope(y) - x, x, x, self._step(gamma, x)))

    def potential(self, x: Tensor) -> Tensor:
        """φ(x) = ψ(x) + μ/2 ‖x‖², whose gradient the network is.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """
        return self._phi(x)

    def inverse(self, x: Tensor) -> Tensor:
        """The y with f(y) = x, of all points at once.

        Args:
            x: ``(*batch, *event)``.

        Raises:
            NotConvergedError: an equation was not solved (``on_failure="raise"``).
        """
        return self._solve(lambda y, x: self._slope(y) - x, x, x)

    def prior(self, x: Tensor) -> Tensor:
        """R(x), up to a constant that all x share. Its gradient is y − x with f(y) = x, and takes no linear system.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.

        Raises:
            NotConvergedError: the inverse was not found (``on_failure="raise"``).
        """
        conjugate = stationary_value(lambda y, x: self._inner(x, y) - self._phi(y), self.inverse(x), x)
        return conjugate - self._inner(x, x) / 2
