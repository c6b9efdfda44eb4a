"""How a solution is found: batched loops that stop element by element.

| the problem | solver |
|---|---|
| x = T(x) | :func:`anderson`; :func:`picard` for a strong contraction; :func:`broyden` where T does not contract |
| F(x) = 0 | :func:`newton`; :func:`bisection` for one unknown between two bounds |
| min ½‖r(x)‖² | :func:`levenberg_marquardt`; :func:`gauss_newton` near the solution |
| min f(x), smooth | :func:`lbfgs`; :func:`gradient_descent` |
| min f(x) + g(x) with the proximal operator of g | :func:`proximal_gradient` |
| min f(x) on a set with a projection | :func:`projected_gradient`; :func:`mirror_descent` on the simplex |
| A x = b | :mod:`~difflayers.solvers.linear` |

Nothing here is differentiated: hand a solver by name or as it is to :func:`~difflayers.implicit.implicit_root` or
:func:`~difflayers.implicit.implicit_fixed_point`. Each takes a function and a starting point of any structure, whose first ``batch_ndim``
dimensions index independent problems, and returns a :class:`~difflayers.Solution` with one status for each.
"""

from __future__ import annotations

from . import linear
from .bisection import bisection
from .first_order import gradient_descent, mirror_descent, projected_gradient, proximal_gradient
from .fixed_point import anderson, broyden, picard
from .lbfgs import lbfgs
from .least_squares import gauss_newton, levenberg_marquardt
from .newton import newton

__all__ = [
    "anderson",
    "bisection",
    "broyden",
    "gauss_newton",
    "gradient_descent",
    "lbfgs",
    "levenberg_marquardt",
    "linear",
    "mirror_descent",
    "newton",
    "picard",
    "projected_gradient",
    "proximal_gradient",
]
