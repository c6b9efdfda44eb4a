r"""A network that is the gradient of a convex function, with that function in closed form.

.. math:: ψ(x) = H(Wx + b) + \tfrac12 \|Ax\|^2 + \tfrac μ2 \|x\|^2 + g_0^\top x, \qquad
          g(x) = \nabla ψ(x) = W^\top ρ(Wx + b) + A^\top A x + μ x + g_0

with a convex H and ρ = ∇H. With H a sum over units this is a sum of ridge functions, each monotone along its own direction. With H the
log-sum-exp of all units, or of groups of them, a ridge is a smooth maximum of affine functions, and such sums come close to any convex
function, which sums of functions of one direction do not in three dimensions and more.

The Jacobian is Wᵀ ∇²H W + AᵀA + μI: symmetric, at least μ, at most μ + ‖M‖² where M stacks A and √d W, ∇²H ≤ d. So g is monotone; with
μ > 0 it has an inverse, the root of a symmetric positive definite system; and as the gradient of a convex function it is the proximal
operator of a function R, which is convex if g is nonexpansive (Gribonval and Nikolova).

The published input convex gradient network integrates :math:`\int_0^1 J_V(tx)^\top J_V(tx)\, x \, dt` for any network V. For one hidden
layer that is this sum with ρ' = σ'². For two it is no gradient, and not monotone: depth has to come from the sum.

References: Richter-Powell, Lorraine and Amos, Input convex gradient networks, 2021 (arXiv:2111.12187); Chaudhari, Pranav and Moura,
Gradient networks, 2024 (arXiv:2404.07361); Gribonval and Nikolova, A characterization of proximity operators, 2020 (arXiv:1807.04014).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ShapeError
from ..solution import OnFailure
from .proximal_network import ProximalNetwork

__all__ = ["ConvexActivation", "ConvexGradientNetwork"]


class ConvexActivation(NamedTuple):
    """A convex function H of the last dimension, its gradient ρ, and a bound d of its Hessian.

    Args:
        potential: ``(*batch, m) -> (*batch,)``.
        gradient: ``(*batch, m) -> (*batch, m)``.
        slope: d, the largest eigenvalue that the Hessian can have.
    """

    potential: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    slope: float


def _squareplus_potential(z: Tensor) -> Tensor:
    return (z.square() + z * (z.square() + 1).sqrt() + z.asinh()).sum(-1) / 4


_ACTIVATIONS = {
    "softmax": ConvexActivation(lambda z: z.logsumexp(-1), lambda z: z.softmax(-1), 0.5),
    "tanh": ConvexActivation(lambda z: (torch.logaddexp(z, -z) - math.log(2)).sum(-1), torch.tanh, 1.0),
    "squareplus": ConvexActivation(_squareplus_potential, lambda z: (z + (z.square() + 1).sqrt()) / 2, 1.0),
}


class ConvexGradientNetwork(ProximalNetwork):
    r"""The gradient g of a convex function, as a network: monotone, invertible, a proximal operator.

    Args:
        dim: n, entries of x.
        hidden: units, rows of W.
        activation: ρ = ∇H. ``"softmax"`` (H is log-sum-exp) has every convex function in its reach. ``"tanh"`` is bounded,
            ``"squareplus"``, (u + √(u² + 1))/2, is a smooth rectifier: both act on each unit alone. Or a :class:`ConvexActivation`.
        groups: H is the sum over so many groups of units of the same size. It makes a difference for softmax, where two units in a group
            are one sigmoid.
        rank: rows of A; None for n, 0 for no quadratic part.
        strong_convexity: μ ≥ 0, a lower bound of the Jacobian that no training can break.
        lipschitz: an upper bound of the Jacobian that no training can break, by spectral normalization of M. With 1.0 the network is
            nonexpansive, and its prior convex; without a bound ``prox`` takes γ ≤ 1 only.
        tol: of the equations that ``inverse``, ``prior`` and ``prox`` solve, relative to the size of their terms; None follows the dtype.
        max_iter: Newton steps for them; None for 50.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where they are not solved.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from difflayers.prox import ConvexGradientNetwork
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> network = ConvexGradientNetwork(3, hidden=8, strong_convexity=0.1, lipschitz=1.0).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> torch.allclose(network.inverse(network(x)), x)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 64,
        activation: str | ConvexActivation = "softmax",
        *,
        groups: int = 1,
        rank: int | None = None,
        strong_convexity: float = 0.0,
        lipschitz: float | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(tol=tol, max_iter=max_iter, on_failure=on_failure)
        rank = dim if rank is None else rank
        if min(dim, hidden, groups) < 1 or hidden % groups or rank < 0:
            raise ValueError(
                f"wanted dim, hidden and groups of at least 1, groups that divide hidden, and a rank of at least 0; got dim={dim}, "
                f"hidden={hidden}, groups={groups}, rank={rank}"
            )
        if not isinstance(activation, ConvexActivation) and activation not in _ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not known; choose one of {', '.join(_ACTIVATIONS)}, or pass a ConvexActivation")
        if not 0 <= strong_convexity < math.inf:
            raise ValueError(f"strong_convexity must be at least 0, got {strong_convexity}")
        if lipschitz is not None and not strong_convexity < lipschitz < math.inf:
            raise ValueError(f"lipschitz must be larger than strong_convexity={strong_convexity:g}, got {lipschitz}")
        self.dim, self.hidden, self.groups, self.rank = dim, hidden, groups, rank
        self.activation = activation
        self.strong_convexity, self.lipschitz = strong_convexity, lipschitz
        self.bias = nn.Parameter(torch.randn(hidden) / 2)
        self.offset = nn.Parameter(torch.zeros(dim))
        # M: the rows of A above those of √d W, so that its spectral norm is what the Jacobian can reach.
        quadratic = 0.7 * torch.eye(rank, dim) + 0.1 * torch.randn(rank, dim) / math.sqrt(dim)
        self.matrix = nn.Parameter(torch.cat([quadratic, torch.randn(hidden, dim) / math.sqrt(dim)]))

    @property
    def weight(self) -> Tensor:
        """M: the parameter ``matrix``, made smaller where its spectral norm is more than ``lipschitz`` leaves room for."""
        if self.lipschitz is None:
            return self.matrix
        limit = math.sqrt(self.lipschitz - self.strong_convexity)
        return self.matrix * (limit / _largest_eigenvalue(self.matrix).sqrt().clamp_min(limit))

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """g(x).

        Args:
            x: ``(*batch, n)``.
            sigma: the noise level, as plug-and-play algorithms pass it; not looked at.

        Returns:
            Like x.

        Raises:
            ShapeError: the last dimension is not n.
        """
        A, W = self._parts(self.weight)
        slopes = self._activation.gradient(self._grouped(linear(self._checked(x), W, self.bias))).flatten(-2)
        return linear(slopes, W.mT, self.offset) + linear(linear(x, A), A.mT) + self.strong_convexity * x

    def potential(self, x: Tensor) -> Tensor:
        """ψ(x), whose gradient is :meth:`forward`.

        Args:
            x: ``(*batch, n)``.

        Returns:
            ``(*batch,)``.

        Raises:
            ShapeError: the last dimension is not n.
        """
        x = self._checked(x)
        A, W = self._parts(self.weight)
        H = self._activation.potential(self._grouped(linear(x, W, self.bias))).sum(-1)
        return H + linear(x, A).square().sum(-1) / 2 + self.strong_convexity / 2 * x.square().sum(-1) + x @ self.offset

    def jacobian_bounds(self) -> tuple[Tensor, Tensor]:
        """Scalars l and L with l·I ≤ ∂g/∂x ≤ L·I at every x: strong convexity and Lipschitz constant."""
        A, _ = self._parts(self.weight)
        least = torch.linalg.eigvalsh(A.mT @ A)[0].clamp_min(0) if self.rank >= self.dim else self.matrix.new_zeros(())
        return self.strong_convexity + least, self.strong_convexity + _largest_eigenvalue(self.weight)

    def extra_repr(self) -> str:
        """The options."""
        name = self.activation if isinstance(self.activation, str) else "custom"
        optional = (("groups", self.groups, 1), ("rank", self.rank, self.dim))
        return ", ".join(
            [
                f"{self.dim}, hidden={self.hidden}, activation={name!r}",
                *(f"{option}={value}" for option, value, default in optional if value != default),
                f"strong_convexity={self.strong_convexity:g}, lipschitz={self.lipschitz}",
            ]
        )

    @property
    def _activation(self) -> ConvexActivation:
        # Looked up, not kept: the functions of the table cannot be pickled.
        return _ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation

    def _largest_gamma(self) -> float:
        if self.lipschitz is None:
            return 1.0
        # Strictly less than L / (L − 1), with room for rounding.
        return math.inf if self.lipschitz <= 1 else (1 - 1e-6) * self.lipschitz / (self.lipschitz - 1)

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[: self.rank], weight[self.rank :] / math.sqrt(self._activation.slope)

    def _grouped(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.groups, -1))

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must have the shape (*batch, {self.dim}), got {tuple(x.shape)}")
        return x


def _largest_eigenvalue(M: Tensor) -> Tensor:
    """‖M‖² by the smaller of the two Gram matrices, whose other eigenvalues don't coincide by construction."""
    return torch.linalg.eigvalsh(M @ M.mT if M.shape[0] < M.shape[1] else M.mT @ M)[-1]
