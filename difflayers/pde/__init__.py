"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .coordinates import coordinate_derivatives
from .finite_difference import edge_derivative, finite_difference, finite_difference_weights
from .spectral import chebyshev_derivative, chebyshev_points, spectral_derivative

__all__ = [
    "chebyshev_derivative",
    "chebyshev_points",
    "coordinate_derivatives",
    "edge_derivative",
    "finite_difference",
    "finite_difference_weights",
    "problems",
    "spectral_derivative",
]
