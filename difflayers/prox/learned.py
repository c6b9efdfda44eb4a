r"""Learned proximal networks: the gradient of a convex network, which is the proximal operator of a prior that can be evaluated.

.. math:: f = ∇φ, \qquad φ(x) = ψ(x) + \tfrac{μ}{2} \|x\|^2,

with a convex network ψ. The eigenvalues of its symmetric Jacobian are at least μ; for μ > 0 it is a bijection. Trained as a denoiser f
becomes the proximal operator of what it has learned of the data (see :mod:`difflayers.prox.proximal_network` for the mathematics).

Reference: Fang, Buchanan and Sulam, What's in a prior? Learned proximal networks for inverse problems, ICLR 2024, arXiv:2310.14344.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..solution import OnFailure
from .proximal_network import ProximalNetwork

__all__ = ["LearnedProximalNetwork", "StronglyConvex"]


class StronglyConvex(ProximalNetwork):
    """A network made of φ(x) = ψ(x) + μ/2 ‖x‖².

    Args:
        potential: ψ, a convex module.
        strong_convexity: μ ≥ 0.
        options: as of :class:`ProximalNetwork`.
    """

    def __init__(self, potential: nn.Module, strong_convexity: float, **options: Any) -> None:
        if not strong_convexity >= 0:
            raise ValueError(f"strong_convexity must not be negative, got {strong_convexity}")
        super().__init__(getattr(potential, "event_ndim", 1), **options)
        self.network, self.strong_convexity = potential, float(strong_convexity)

    def extra_repr(self) -> str:
        """The modulus of convexity."""
        return f"strong_convexity={self.strong_convexity}"

    def _phi(self, x: Tensor) -> Tensor:
        return self.network(x) + self.strong_convexity / 2 * self._inner(x, x)

    def _slope(self, x: Tensor) -> Tensor:
        """∇φ(x)."""
        gradient: Any = getattr(self.network, "gradient", None)
        slope = torch.func.grad(lambda x: self.network(x).sum())(x) if gradient is None else gradient(x)
        return slope + self.strong_convexity * x


class LearnedProximalNetwork(StronglyConvex):
    """The gradient of a convex network: a denoiser that is the proximal operator of a prior one can look at.

    All methods are differentiable to any order, in x and in the parameters.

    Args:
        potential: ψ, a convex network ``(*batch, *event) -> (*batch,)``: :class:`InputConvexNN`, :class:`ConvolutionalInputConvexNN`, or
            any module that you know to be convex. It may have ``.gradient(x)``, and ``.event_ndim`` if that is not 1.
        strong_convexity: μ ≥ 0, a lower bound of the Jacobian's eigenvalues. ``inverse``, ``prior`` and ``prox`` with γ < 1 need μ > 0,
            which also says how well they can be computed: the condition number of their equations is ‖∇²φ‖ / μ.
        tol: of the equations that ``inverse``, ``prior`` and ``prox`` solve, relative to the size of their terms; None follows the dtype.
        max_iter: Newton steps for them; None for 50.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where they are not solved.

    Raises:
        ValueError: ``strong_convexity`` is negative.

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
        super().__init__(potential, strong_convexity, tol=tol, max_iter=max_iter, on_failure=on_failure)

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """f(x) = ∇ψ(x) + μ x: the denoised x, by one explicit pass if ψ has ``.gradient``.

        Args:
            x: ``(*batch, *event)``.
            sigma: the noise level, as plug-and-play algorithms pass it. This network was trained for one, and does not look at it.
        """
        return self._slope(x)

    def potential(self, x: Tensor) -> Tensor:
        """φ(x) = ψ(x) + μ/2 ‖x‖², whose gradient the network is.

        Args:
            x: ``(*batch, *event)``.

        Returns:
            ``(*batch,)``.
        """
        return self._phi(x)
