"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems
from .finite_difference import edge_derivative, finite_difference, finite_difference_weights

__all__ = [
    "edge_derivative",
    "finite_difference",
    "finite_difference_weights",
    "problems",
]
