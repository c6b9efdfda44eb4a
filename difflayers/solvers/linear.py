"""Batched linear systems A x = b on plain tensors: Krylov methods and dense factors.

| A | method |
|---|---|
| small, any | :func:`lu_factor`, solved as often as needed |
| small, symmetric positive definite | :func:`cholesky_factor` (half the work) |
| large, symmetric definite | :func:`cg`, with a preconditioner if there is one (it may be a learned network) |
| large, general | :func:`gmres` (robust, keeps a basis) or :func:`bicgstab` (two products per iteration, constant memory) |
| large, general, Aᵀ at hand | :func:`normal_cg` (squares the condition number, cannot break down) |
| I − J with ‖J‖ < 1 | :func:`neumann` (truncate it with ``max_iter``) |

Nothing here is differentiated: :func:`difflayers.implicit.linear_solve` is the differentiable form.
"""

from __future__ import annotations

from .dense import DenseFactor, cholesky_factor, lu_factor
from .gmres import gmres
from .krylov import bicgstab, cg, neumann, normal_cg
from .loop import default_tol

__all__ = ["DenseFactor", "bicgstab", "cg", "cholesky_factor", "default_tol", "gmres", "lu_factor", "neumann", "normal_cg"]
