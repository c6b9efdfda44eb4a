"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .conservation import ConservationProjection, ConservationSolution, conservation_projection
from .finite_difference import edge_derivative, finite_difference, finite_difference_weights
from .linear_constraint import LinearConstraint
from .quadrature import riemann_weights, trapezoid_weights

__all__ = [
    "ConservationProjection",
    "ConservationSolution",
    "LinearConstraint",
    "conservation_projection",
    "edge_derivative",
    "finite_difference",
    "finite_difference_weights",
    "problems",
    "riemann_weights",
    "trapezoid_weights",
]
