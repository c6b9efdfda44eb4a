"""How the permutation symmetries of a network are found: the calls it makes, what each demands, and the solution.

:mod:`~difflayers.rebasin.inference.terms` is the algebra of layouts with unknowns, ``calls``, ``shapes``, ``weights`` and ``modules`` hold
the rules of the operations, ``tracing`` puts them together.
"""

from .calls import Call, Rule, Terms, Traced, Unprovable
from .probe import Example
from .terms import concatenate, cut, fix, multiply, reshape, split, unify
from .tracing import Override, infer_axes

__all__ = [
    "Call",
    "Example",
    "Override",
    "Rule",
    "Terms",
    "Traced",
    "Unprovable",
    "concatenate",
    "cut",
    "fix",
    "infer_axes",
    "multiply",
    "reshape",
    "split",
    "unify",
]
