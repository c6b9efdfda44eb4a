r"""Linear measurements y = A x: the two products, and the proximal operator of a least-squares misfit.

A plug-and-play algorithm asks three things of an operator. They are named as in deepinv, so that the operators of either package
serve the other: ``A(x)``, ``A_adjoint(y)`` and

.. math:: \operatorname{prox\_l2}(z, y, γ) = \arg\min_u \tfrac{γ}{2} \|A u - y\|^2 + \tfrac12 \|u - z\|^2
    = (I + γ A^T A)^{-1} (z + γ A^T y) = z + γ A^T (I + γ A A^T)^{-1} (y - A z).

Orthonormal rows (AAᵀ = I) and a mask know the inverse, a matrix factorizes the smaller of its two Gram matrices, and any other pair of
products is solved by conjugate gradients. All of it is differentiable in z, y, γ and in the operator's own tensors.

References: Venkatakrishnan, Bouman, Wohlberg, Plug-and-play priors for model based reconstruction, GlobalSIP 2013; Parikh, Boyd, Proximal
algorithms, Found. Trends Optim. 1, 2014, section 6.1.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ShapeError
from ..holding import hold
from ..implicit import linear_solve
from ..implicit.function import in_a_transform

__all__ = [
    "LinearOperator",
    "Mask",
    "MatrixOperator",
    "Operator",
    "adjoint_error",
    "number_or_shape",
    "prox_by_products",
    "spread",
    "squared_norm",
]

Product = Callable[[Tensor], Tensor]


class Operator(nn.Module, abc.ABC):
    """What measures x; a subclass gives ``A`` and ``A_adjoint``, and ``prox_l2`` where it knows better than conjugate gradients.

    Args:
        batch_ndim: how many leading dimensions of x count independent problems.
    """

    def __init__(self, batch_ndim: int = 1) -> None:
        super().__init__()
        self.batch_ndim = batch_ndim

    @abc.abstractmethod
    def A(self, x: Tensor) -> Tensor:
        """A x, the measurements of x."""

    @abc.abstractmethod
    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, with the shape of x."""

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """The proximal operator of γ/2 ‖A · − y‖² at z.

        Args:
            z: the point, with the shape of x.
            y: the measurements.
            gamma: positive; one number, or one for each problem, ``(*batch,)``.

        Returns:
            A tensor like z.
        """
        return prox_by_products(self, z, y, gamma, batch_ndim=self.batch_ndim)

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Aᵀ v, under the name that deepinv has for the derivative of any operator at x."""
        return self.A_adjoint(v)

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self.A(x)


class LinearOperator(Operator):
    """A linear operator given by its two products.

    Args:
        matvec: ``x -> A x`` on a batch of unknowns; the parameters of a module are trained.
        rmatvec: ``y -> Aᵀ y``. :func:`adjoint_error` tells whether the two fit.
        orthonormal_rows: AAᵀ = I, as for some of the rows of an orthogonal transform: the proximal operator is then two products.
        batch_ndim: how many leading dimensions of x count independent problems.

    Example:
        >>> import torch
        >>> from difflayers.prox import LinearOperator, adjoint_error
        >>> cumulative = LinearOperator(lambda x: x.cumsum(-1), lambda y: y.flip(-1).cumsum(-1).flip(-1))
        >>> cumulative.A(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 3., 6.]])
        >>> adjoint_error(cumulative, torch.zeros(1, 3)) < 1e-6
        True
    """

    def __init__(self, matvec: Product, rmatvec: Product, *, orthonormal_rows: bool = False, batch_ndim: int = 1) -> None:
        super().__init__(batch_ndim)
        self.matvec, self.rmatvec, self.orthonormal_rows = matvec, rmatvec, orthonormal_rows

    def A(self, x: Tensor) -> Tensor:
        """A x."""
        return self.matvec(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.rmatvec(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """The proximal operator of γ/2 ‖A · − y‖² at z: two products if the rows are orthonormal, else conjugate gradients."""
        if not self.orthonormal_rows:
            return super().prox_l2(z, y, gamma)
        gamma = spread(gamma, z)
        return z + gamma / (1 + gamma) * self.A_adjoint(y - self.A(z))

    def extra_repr(self) -> str:
        """What is known of the operator."""
        return "orthonormal_rows=True" if self.orthonormal_rows else ""


class Mask(Operator):
    """Pixels that are seen, or weighted: A x = mask · x.

    Args:
        mask: broadcasts against x; an ``nn.Parameter`` is learned.

    Example:
        >>> import torch
        >>> from difflayers.prox import Mask
        >>> Mask(torch.tensor([1.0, 0.0])).prox_l2(torch.tensor([[0.0, 5.0]]), torch.tensor([[4.0, 0.0]]), 1.0)
        tensor([[2., 5.]])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        hold(self, "mask", mask)

    def A(self, x: Tensor) -> Tensor:
        """mask · x."""
        return self.mask * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        """mask · y."""
        return self.mask * y

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """The proximal operator of γ/2 ‖mask · − y‖² at z, pixel by pixel."""
        weight = spread(gamma, z) * self.mask
        return (z + weight * y) / (1 + weight * self.mask)

    def extra_repr(self) -> str:
        """The shape of the mask."""
        return f"mask: {tuple(self.mask.shape)}"


class MatrixOperator(Operator):
    """Measurements by a matrix, as in compressed sensing: A x is ``matrix @ x``, x flattened.

    The eigenvectors of a constant matrix's smaller Gram matrix are computed at the first ``prox_l2`` and kept. A matrix that is
    differentiated, or batched by vmap, gets a Cholesky factorization at each call.

    Args:
        matrix: ``(m, n)``, or ``(*batch, m, n)`` with one for each problem; an ``nn.Parameter`` is learned.
        shape: the shape of one x, whose product is n; None for ``(n,)``.

    Raises:
        ShapeError: matrix and shape do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox import MatrixOperator
        >>> MatrixOperator(torch.ones(1, 4), shape=(2, 2)).A_adjoint(torch.tensor([[3.0]]))
        tensor([[[3., 3.],
                 [3., 3.]]])
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if matrix.dim() < 2 or (shape is not None and math.prod(shape) != matrix.shape[-1]):
            raise ShapeError(f"expected a matrix (*batch, m, n) with n the product of shape={shape}, got {tuple(matrix.shape)}")
        self.shape = (matrix.shape[-1],) if shape is None else tuple(shape)
        hold(self, "matrix", matrix)
        self._kept: tuple[Any, ...] = (None, -1)

    def A(self, x: Tensor) -> Tensor:
        """matrix @ x, ``(*batch, m)``."""
        return _times(self.matrix, self._flat(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """matrixᵀ @ y, ``(*batch, *shape)``."""
        return _times(self.matrix.mT, y).unflatten(-1, self.shape)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
        """The proximal operator of γ/2 ‖matrix · − y‖² at z, by the smaller of the two Gram matrices."""
        gamma = torch.as_tensor(gamma, dtype=z.dtype, device=z.device)
        gamma = gamma.reshape(gamma.shape[: max(z.dim() - len(self.shape), 0)])
        if self._is_wide():
            return z + spread(gamma, z) * self.A_adjoint(self._divide(gamma, y - self.A(z)))
        return self._divide(gamma, self._flat(z + spread(gamma, z) * self.A_adjoint(y))).unflatten(-1, self.shape)

    def _divide(self, gamma: Tensor, rhs: Tensor) -> Tensor:
        """(I + γ G)⁻¹ rhs."""
        if _is_differentiated(self.matrix):
            gram = self._gram()
            system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + gamma[..., None, None] * gram
            return linear_solve(system, rhs, method="cholesky", on_failure="nan").x
        values, vectors = self._eigenvectors()
        return _times(vectors, _times(vectors.mT, rhs) / (1 + gamma[..., None] * values))

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Of the Gram matrix, computed anew when the matrix is another one, or was changed."""
        matrix, version, *found = self._kept
        if matrix is not self.matrix or version != self.matrix._version:
            with torch.no_grad():
                found = list(torch.linalg.eigh(self._gram()))
            if not in_a_transform():  # whose tensors do not outlive it
                self._kept = (self.matrix, self.matrix._version, *found)
        return found[0], found[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": (None, -1)}

    def _gram(self) -> Tensor:
        return self.matrix @ self.matrix.mT if self._is_wide() else self.matrix.mT @ self.matrix

    def _is_wide(self) -> bool:
        return self.matrix.shape[-2] <= self.matrix.shape[-1]

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[x.dim() - len(self.shape) :] != self.shape:
            raise ShapeError(f"expected x of shape (*batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return x.flatten(x.dim() - len(self.shape))

    def extra_repr(self) -> str:
        """The shapes of the matrix and of one x."""
        return f"matrix: {tuple(self.matrix.shape)}, shape={self.shape}"


def prox_by_products(operator: Any, z: Tensor, y: Tensor, gamma: Tensor | float, *, batch_ndim: int = 1) -> Tensor:
    """``prox_l2`` of any object with ``A`` and ``A_adjoint``, by conjugate gradients on I + γ AᵀA.

    Args:
        operator: ours or deepinv's.
        z: the point, with the shape of x.
        y: the measurements.
        gamma: positive; one number, or one for each problem.
        batch_ndim: how many leading dimensions of x count independent problems.

    Returns:
        A tensor like z; a problem without a solution is NaN.
    """
    gamma = spread(gamma, z)

    def product(u: Tensor) -> Tensor:
        return u + gamma * operator.A_adjoint(operator.A(u))

    rhs = z + gamma * operator.A_adjoint(y)
    return linear_solve(product, rhs, method="cg", symmetric=True, batch_ndim=batch_ndim, on_failure="nan").x


def adjoint_error(operator: Any, x: Tensor, *, generator: torch.Generator | None = None) -> float:
    """How far ``A_adjoint`` is from the adjoint of ``A``: ⟨A x, y⟩ − ⟨x, Aᵀ y⟩ for random x and y, relative to their sizes.

    Rounding gives about 1e-8 in float32 and 1e-16 in float64. Much more is a mistake in one of the products, and makes gradients wrong.

    Args:
        operator: any object with ``A`` and ``A_adjoint``.
        x: an example of its argument; only shape, dtype and device matter.
        generator: draws x and y.
    """
    with torch.no_grad():
        x = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        image = operator.A(x)
        y = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
        back = operator.A_adjoint(y)
        difference = (image * y).sum() - (x * back).sum()
        return float(difference.abs() / (image.norm() * y.norm() + x.norm() * back.norm()).clamp_min(torch.finfo(x.dtype).tiny))


def squared_norm(operator: Any, x: Tensor, *, max_iter: int = 100, generator: torch.Generator | None = None) -> float:
    """‖A‖², the Lipschitz constant of the gradient of ½‖A x − y‖², by the power iteration.

    The estimate comes from below, usually to a percent: leave the step size that much room.

    Args:
        operator: any object with ``A`` and ``A_adjoint``.
        x: an example of its argument; only shape, dtype and device matter.
        max_iter: products with AᵀA.
        generator: draws the start.
    """
    with torch.no_grad():
        x = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        for _ in range(max_iter):
            x = operator.A_adjoint(operator.A(x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)))
        return float(x.norm())


def spread(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or one number for each problem, ``(*batch,)``, with dimensions behind it so that it broadcasts against ``like``."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(*value.shape, *[1] * (like.dim() - value.dim())) if value.dim() else value


def number_or_shape(value: Tensor | float) -> str:
    """How a number, or a tensor of them, is shown."""
    if isinstance(value, Tensor):
        return f"{value.detach().item():.4g}" if value.dim() == 0 else str(tuple(value.shape))
    return f"{value:.4g}"


def _is_differentiated(tensor: Tensor) -> bool:
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
