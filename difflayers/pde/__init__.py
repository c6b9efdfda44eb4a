"""Physics as a hard constraint: a network proposes, a solve inside it obeys the equations; and conservation laws as a projection."""

from . import problems

__all__ = [
    "problems",
]
