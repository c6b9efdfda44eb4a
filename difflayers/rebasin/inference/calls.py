"""What a rule of an operation is given and returns, and the rules that need no more than that.

A rule says what an operation demands of its operands' dimensions to commute with their renaming, and how it renames its result. It takes
the :class:`Call` and the operation's own arguments, in which a tensor is a :class:`Traced`, and returns a term for each dimension of the
result; a tuple of those, if the result is a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .terms import Fixed, Term, Unknown, fix, unify

__all__ = ["Call", "Rule", "Terms", "Traced", "Unprovable", "broadcast", "elementwise", "fixed", "fixed_all", "traced_in"]

Rule = Callable[..., Any]
Terms = tuple[Term, ...]


class Unprovable(Exception):
    """A rule meets arguments that it has no proof for; the text says which."""


class Traced(NamedTuple):
    """A tensor with a term for each of its dimensions."""

    value: Tensor
    terms: Terms


class Call(NamedTuple):
    """An operation that is traced.

    Attributes:
        output: what it has returned.
        operation: the function, or the class of the module.
        module: the module that is called, None for a function.
        parameter: a module's parameter or buffer by name, None if it has none of that name.
        inside: the call of a part of the module, by name.
    """

    output: Any
    operation: Any
    module: nn.Module | None = None
    parameter: Callable[[str], Traced | None] = lambda name: None
    inside: Callable[[str], Call] = lambda name: Call(None, None)


def fixed(value: Tensor) -> Terms:
    """Terms of a tensor in which nothing may move."""
    return tuple(Fixed(size) for size in value.shape)


def traced_in(arguments: Any) -> list[Traced]:
    """All the traced tensors in nested arguments."""
    if isinstance(arguments, Traced):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return [found for part in arguments for found in traced_in(part)] if isinstance(arguments, list | tuple) else []


def broadcast(operands: Sequence[Terms], sizes: Sequence[int]) -> Terms:
    """The terms of what operands broadcast to; dimensions that meet are renamed alike.

    Args:
        operands: terms of each.
        sizes: of the result.
    """
    found = []
    for place, size in enumerate(sizes, -len(sizes)):
        met = [terms[place] for terms in operands if len(terms) >= -place and terms[place].size == size]
        for other in met[1:]:
            unify(met[0], other)
        # Entries that are all the same may move.
        found.append(met[0] if met else Unknown(size))
    return tuple(found)


def elementwise(call: Call, *args: Any, **kwargs: Any) -> Terms:
    """One entry of the result needs one entry of each operand; or, as for softmax, the renaming of a whole dimension commutes."""
    return broadcast([operand.terms for operand in traced_in([args, kwargs])], call.output.shape)


def fixed_all(output: Any, *operands: Traced) -> Any:
    """Nothing moves, neither in the operands nor in the output."""
    for operand in operands:
        for term in operand.terms:
            fix(term)
    if isinstance(output, Tensor):
        return fixed(output)
    return tuple(fixed_all(part) for part in output) if isinstance(output, list | tuple) else None
