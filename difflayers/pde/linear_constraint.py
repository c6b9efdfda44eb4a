r"""Linear constraints that the output of any network obeys, in a metric that says which values may move.

.. math:: \min_u \tfrac12 (u - y)^T Σ^{-1} (u - y) \quad\text{subject to}\quad A u = b,\; G u \le h .

With :math:`u = y + S z`, :math:`S S^T = Σ`, it is the point nearest to zero under constraints on z: a projection on an affine set or a
polyhedron (:mod:`difflayers.convex.projections`), which also serves where Σ is singular. A variable of variance zero keeps its value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..convex.kkt import times
from ..convex.projections import projection_affine_set, projection_polyhedron
from ..errors import ShapeError
from ..holding import hold
from ..solution import OnFailure

__all__ = ["LinearConstraint"]


class LinearConstraint(nn.Module):
    """The nearest point that satisfies A u = b and G u ≤ h.

    Differentiable in y, the right-hand sides, the metric, and matrices that are parameters: with equations alone to second order, with
    inequalities to any. A constraint that is active with a zero multiplier counts as inactive.

    Args:
        A: ``(*batch, p, n)``, or None. Redundant rows whose values agree are tolerated.
        b: ``(*batch, p)``; None if ``forward`` is given one.
        G: ``(*batch, m, n)``, or None.
        h: ``(*batch, m)``; None if ``forward`` is given one.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` where no point
            satisfies the constraints. Tensors are buffers; an ``nn.Parameter`` is learned.

    Example:
        >>> import torch
        >>> from difflayers import LinearConstraint
        >>> balance = LinearConstraint(A=torch.tensor([[1.0, 1.0, -1.0]]), b=torch.zeros(1))  # two inflows, one outflow
        >>> balance(torch.tensor([1.0, 2.0, 6.0]))
        tensor([2., 3., 5.])
        >>> balance(torch.tensor([1.0, 2.0, 6.0]), variance=torch.tensor([1.0, 0.0, 2.0]))  # the second was measured
        tensor([2., 2., 4.])
    """

    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None

    def __init__(
        self,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        *,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if A is None and G is None:
            raise ValueError("a constraint needs equations A u = b, inequalities G u ≤ h, or both; got neither A nor G")
        if (A is None and b is not None) or (G is None and h is not None):
            raise ValueError("b belongs to A and h to G: one came without its matrix")
        for name, part in (("A", A), ("b", b), ("G", G), ("h", h)):
            hold(self, name, part)
        self.on_failure: OnFailure = on_failure

    def forward(
        self, y: Tensor, b: Tensor | None = None, h: Tensor | None = None, *, variance: Tensor | None = None, root: Tensor | None = None
    ) -> Tensor:
        """The nearest point, ``(*batch, n)``.

        Args:
            y: ``(*batch, n)``.
            b: ``(*batch, p)``, in place of the one given before.
            h: ``(*batch, m)``, in place of the one given before.
            variance: ``(*batch, n)``, nonnegative: the diagonal of Σ, which is then diagonal. None: distance is Euclidean.
            root: ``(*batch, n, k)``, any S with S Sᵀ = Σ, such as a Cholesky factor; u − y is in its range. Not both.

        Raises:
            InfeasibleError: no point satisfies the constraints (``on_failure="raise"``).
            ShapeError: shapes or dtypes do not fit.
        """
        if variance is not None and root is not None:
            raise ValueError("give a variance or a root of the covariance, not both")
        b, h = self.b if b is None else b, self.h if h is None else h
        for matrix, side, name in ((self.A, b, "b"), (self.G, h, "h")):
            if matrix is not None and side is None:
                raise ShapeError(f"{name} is given neither to the constraint nor to its call")
            if matrix is not None and y.shape[-1:] != matrix.shape[-1:]:
                raise ShapeError(f"y must have the shape (*batch, {matrix.shape[-1]}), got {tuple(y.shape)}")
        if variance is not None:
            positive = variance > 0  # the square root has no slope at zero
            root = torch.diag_embed(torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0))
        if root is None:
            return self._project(y, (self.A, b, self.G, h))
        A, G = (None if matrix is None else matrix @ root for matrix in (self.A, self.G))
        b, h = (None if matrix is None or side is None else side - times(matrix, y) for matrix, side in ((self.A, b), (self.G, h)))
        z = self._project(y.new_zeros(root.shape[-1]), (A, b, G, h))
        failed = z.isnan().any(-1, keepdim=True)
        return torch.where(failed, torch.nan, y + times(root, torch.where(failed, 0, z)))

    def _project(self, x: Tensor, constraints: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
        A, b, G, _ = constraints
        if G is None:
            assert A is not None
            assert b is not None
            return projection_affine_set(x, (A, b), on_failure=self.on_failure)
        return projection_polyhedron(x, constraints, on_failure=self.on_failure)

    def extra_repr(self) -> str:
        """The shapes of what was given, and ``on_failure``."""
        parts = {name: getattr(self, name) for name in ("A", "b", "G", "h")}
        shown = [f"{name}: {tuple(part.shape)}" for name, part in parts.items() if part is not None]
        return ", ".join([*shown, f"on_failure={self.on_failure!r}"])
