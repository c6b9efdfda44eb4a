"""The core: how a solution is differentiated.

| you have | use |
|---|---|
| equations F(x, θ) = 0 | :func:`implicit_root` |
| a map x = T(x, θ) | :func:`implicit_fixed_point` |
| a solver of your own | :func:`custom_root`, :func:`custom_fixed_point` |
| an optimization problem | one of these with a residual from :mod:`~difflayers.implicit.conditions` |
| a linear system | :func:`linear_solve` |
| the optimal value of an objective | :func:`stationary_value` |
| a solution, and one product | :func:`root_vjp`, :func:`root_jvp` |
"""

from __future__ import annotations

from . import conditions
from .fixed_point import ImplicitFixedPoint, custom_fixed_point, implicit_fixed_point
from .linear_solve import linear_solve
from .root import ImplicitRoot, custom_root, implicit_root, root_jvp, root_vjp
from .stationary import stationary_value

__all__ = [
    "ImplicitFixedPoint",
    "ImplicitRoot",
    "conditions",
    "custom_fixed_point",
    "custom_root",
    "implicit_fixed_point",
    "implicit_root",
    "linear_solve",
    "root_jvp",
    "root_vjp",
    "stationary_value",
]
