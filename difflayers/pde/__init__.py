"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .conservation import ConservationProjection, ConservationSolution, conservation_projection
from .quadrature import riemann_weights, trapezoid_weights

__all__ = [
    "ConservationProjection",
    "ConservationSolution",
    "conservation_projection",
    "problems",
    "riemann_weights",
    "trapezoid_weights",
]
