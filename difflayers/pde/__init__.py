"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .conservation import ConservationProjection, ConservationSolution, conservation_projection
from .coordinates import coordinate_derivatives
from .finite_difference import edge_derivative, finite_difference
from .hard_constraint import ConstraintSolution, HardConstraint
from .linear_constraint import LinearConstraint
from .mixture import MixtureOfConstraints
from .quadrature import riemann_weights, trapezoid_weights
from .rows import dirichlet, initial, integral, neumann, pde, periodic, robin
from .spectral import chebyshev_derivative, chebyshev_points, spectral_derivative
from .stencils import finite_difference_weights

__all__ = [
    "ConservationProjection",
    "ConservationSolution",
    "ConstraintSolution",
    "HardConstraint",
    "LinearConstraint",
    "MixtureOfConstraints",
    "chebyshev_derivative",
    "chebyshev_points",
    "conservation_projection",
    "coordinate_derivatives",
    "dirichlet",
    "edge_derivative",
    "finite_difference",
    "finite_difference_weights",
    "initial",
    "integral",
    "neumann",
    "pde",
    "periodic",
    "problems",
    "riemann_weights",
    "robin",
    "spectral_derivative",
    "trapezoid_weights",
]
