"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .coordinates import coordinate_derivatives
from .finite_difference import edge_derivative, finite_difference, finite_difference_weights
from .hard_constraint import ConstraintSolution, HardConstraint
from .rows import dirichlet, initial, integral, neumann, pde, periodic, robin

__all__ = [
    "ConstraintSolution",
    "HardConstraint",
    "dirichlet",
from .spectral import chebyshev_derivative, chebyshev_points, spectral_derivative

    "chebyshev_derivative",
    "chebyshev_points",
    "coordinate_derivatives",
from .conservation import ConservationProjection, ConservationSolution, conservation_projection
from .linear_constraint import LinearConstraint
from .quadrature import riemann_weights, trapezoid_weights

    "ConservationProjection",
    "ConservationSolution",
    "LinearConstraint",
    "conservation_projection",
    "edge_derivative",
    "finite_difference",
    "finite_difference_weights",
    "initial",
    "integral",
    "neumann",
    "pde",
    "periodic",
    "problems",
    "robin",
    "spectral_derivative",
    "riemann_weights",
    "trapezoid_weights",
]
