"""Solvers: how a solution is found, a batch at a time.

Which solver?

| problem | solver | it needs |
|---|---|---|
| x = T(x), T a contraction | :func:`anderson`; :func:`picard` where its memory is too much | T |
| x = T(x), T not a contraction | :func:`broyden` | T |
| F(x) = 0 | :func:`newton` | F that can be differentiated; large systems go matrix-free |
| f(x) = 0, one unknown each | :func:`bisection` | a bracket; cannot fail on a continuous f |
| min ½‖r(x)‖² | :func:`levenberg_marquardt`; :func:`gauss_newton` from a good start | r |
| min f(x), smooth | :func:`lbfgs`; :func:`newton` on the gradient where it is small and convex | f |
| min f(x) + g(x), g simple | :func:`proximal_gradient` | f and the proximal operator of g |
| min f(x), x in a simple convex set | :func:`projected_gradient` | f and the projection |
| min f(x), x on the simplex | :func:`mirror_descent` | f |
| A x = b | :mod:`difflayers.solvers.linear` | a matrix, or its products |

All of them take and return pytrees of tensors ``(*batch, ...)`` whose first ``batch_ndim`` dimensions index independent problems: each
stops on its own and has its own status, and a batch gives what a loop would. They return a :class:`~difflayers.Solution` and never
raise because a problem was not solved. Nothing here is differentiated: hand a solver by name or as it is to
:func:`~difflayers.implicit.implicit_root` or :func:`~difflayers.implicit.implicit_fixed_point`.
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
