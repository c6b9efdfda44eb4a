r"""Layouts of dimensions as terms with unknowns, made equal where an operation demands it: unification, as types are inferred.

Each dimension of a tensor has a term: how its entries are renamed by the permutations that are yet unknown. An operation commutes with
renamings if some dimensions of its operands are renamed alike (the columns of a matrix and the entries of the vector it multiplies). Each
such demand is an equation between terms; :func:`unify` solves it by giving unknowns a meaning, and where it can't, by fixing what is
left: a fixed dimension is always a solution. What remains unknown in the end may be permuted at will. A view into several dimensions makes
an unknown a product (:func:`split`), a slice makes it a concatenation (:func:`cut`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..axes import Concatenation, Fixed, Group, Product

__all__ = ["Term", "Unknown", "concatenate", "cut", "fix", "is_fixed", "multiply", "reshape", "resolve", "split", "unify"]


class Unknown:
    """``size`` entries whose renaming is not known; ``meaning`` is the term that it turned out to be."""

    __slots__ = ("meaning", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.meaning: Term | None = Fixed(1) if size == 1 else None


Term = Fixed | Unknown | Product | Concatenation | Group


def resolve(term: Term) -> Term:
    """The term with what is known put in, in a normal form.

    Products and concatenations are flat, have no parts of size one and no neighbouring fixed parts; a product does not begin with a
    concatenation.
    """
    while isinstance(term, Unknown):
        if term.meaning is None:
            return term
        term = term.meaning
    if isinstance(term, Product):
        return multiply(term.parts)
    return concatenate(term.parts) if isinstance(term, Concatenation) else term


def multiply(parts: Sequence[Term]) -> Term:
    """The product of terms, in the normal form of :func:`resolve`."""
    flat: list[Term] = []
    for part in map(resolve, parts):
        for factor in part.parts if isinstance(part, Product) else (part,):
            if isinstance(factor, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * factor.size)
            elif factor.size != 1:
                flat.append(factor)
    if len(flat) < 2:
        return flat[0] if flat else Fixed(1)
    if isinstance(flat[0], Concatenation):
        return concatenate([multiply([part, *flat[1:]]) for part in flat[0].parts])
    return Product(tuple(flat))


def concatenate(parts: Sequence[Term]) -> Term:
    """The concatenation of terms, in the normal form of :func:`resolve`."""
    flat: list[Term] = []
    for part in map(resolve, parts):
        for piece in part.parts if isinstance(part, Concatenation) else (part,):
            if isinstance(piece, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + piece.size)
            elif piece.size:
                flat.append(piece)
    return flat[0] if len(flat) == 1 else Concatenation(tuple(flat))


def fix(term: Term) -> Fixed:
    """Let nothing of the term move."""
    term = resolve(term)
    if isinstance(term, Unknown):
        term.meaning = Fixed(term.size)
    elif isinstance(term, Product | Concatenation):
        for part in term.parts:
            fix(part)
    return Fixed(term.size)


def is_fixed(term: Term) -> bool:
    """Whether nothing of the term can move."""
    return isinstance(resolve(term), Fixed)


def unify(first: Term, second: Term) -> None:
    """Make two terms of one size equal.

    Args:
        first: a term.
        second: a term.
    """
    first, second = resolve(first), resolve(second)
    if first.size != second.size:
        raise ValueError(f"dimensions of {first.size} and {second.size} entries cannot be renamed alike")
    if first == second:
        return
    if isinstance(first, Unknown):
        first.meaning = second
    elif isinstance(second, Unknown):
        second.meaning = first
    elif isinstance(first, Fixed) or isinstance(second, Fixed):
        fix(first), fix(second)
    elif isinstance(first, Product) and isinstance(second, Product):
        _unify_products(list(first.parts), list(second.parts))
    elif isinstance(first, Concatenation) and isinstance(second, Concatenation):
        _unify_concatenations(list(first.parts), list(second.parts))
    elif isinstance(first, Product) and isinstance(second, Concatenation) and isinstance(first.parts[0], Fixed):
        _unify_concatenations([multiply(first.parts[1:])] * first.parts[0].size, list(second.parts))
    elif isinstance(first, Concatenation) and isinstance(second, Product) and isinstance(second.parts[0], Fixed):
        unify(second, first)
    else:
        fix(first), fix(second)


def split(term: Term, outer: int) -> tuple[Term, Term]:
    """The term as a product of a term of size ``outer``, which has to divide its size, and another one.

    Args:
        term: a term.
        outer: size of the slow part.
    """
    term = resolve(term)
    inner, rest = divmod(term.size, outer)
    if rest:
        raise ValueError(f"{term.size} entries are not {outer} equal parts")
    if inner == 1 or outer == 1:
        return (term, Fixed(1)) if inner == 1 else (Fixed(1), term)
    if isinstance(term, Unknown):
        halves = Unknown(outer), Unknown(inner)
        term.meaning = Product(halves)
        return halves
    if isinstance(term, Product):
        first, remaining = term.parts[0], multiply(term.parts[1:])
        if outer % first.size == 0:
            middle, last = split(remaining, outer // first.size)
            return multiply([first, middle]), last
        if first.size % outer == 0:
            first, middle = split(first, outer)
            return first, multiply([middle, remaining])
    if isinstance(term, Concatenation):
        count = len(term.parts)
        if outer % count == 0 and len({part.size for part in term.parts}) == 1:
            for part in term.parts[1:]:
                unify(term.parts[0], part)
            first, last = split(term.parts[0], outer // count)
            return multiply([Fixed(count), first]), last
    fix(term)
    return Fixed(outer), Fixed(inner)


def cut(term: Term, sizes: Sequence[int]) -> list[Term]:
    """The term as a concatenation of pieces.

    Args:
        term: a term.
        sizes: of the pieces.
    """
    term = resolve(term)
    if term.size != sum(sizes):
        raise ValueError(f"{term.size} entries are not pieces of {list(sizes)}")
    if len(sizes) == 1:
        return [term]
    if isinstance(term, Unknown):
        pieces: list[Term] = [Unknown(size) for size in sizes]
        term.meaning = Concatenation(tuple(pieces))
        return pieces
    if isinstance(term, Product):
        inner = math.prod(part.size for part in term.parts[1:])
        if all(size % inner == 0 for size in sizes):
            return [multiply([piece, *term.parts[1:]]) for piece in cut(term.parts[0], [size // inner for size in sizes])]
    if isinstance(term, Concatenation):
        remaining, pieces = list(term.parts), []
        for size in sizes:
            taken: list[Term] = []
            while size:
                part = remaining.pop(0)
                if part.size > size:
                    part, after = cut(part, [size, part.size - size])
                    remaining.insert(0, after)
                taken.append(part)
                size -= part.size
            pieces.append(concatenate(taken) if taken else Fixed(0))
        return pieces
    fix(term)
    return [Fixed(size) for size in sizes]


def reshape(terms: Sequence[Term], sizes: Sequence[int]) -> tuple[Term, ...]:
    """The terms of a view with other dimensions of the same entries in row-major order.

    Args:
        terms: one a dimension.
        sizes: of the new dimensions.
    """
    remaining, found = [term for term in map(resolve, terms) if term.size != 1], []
    for size in sizes:
        taken: list[Term] = []
        while size != 1:
            term = remaining.pop(0)
            if size % term.size and term.size % size:
                for part in terms:
                    fix(part)
                return tuple(Fixed(whole) for whole in sizes)
            if size % term.size:
                term, after = split(term, size)
                remaining.insert(0, after)
            taken.append(term)
            size //= term.size
        found.append(multiply(taken))
    return tuple(found)


def _unify_products(first: list[Term], second: list[Term]) -> None:
    while first and second:
        left, right = resolve(first.pop(0)), resolve(second.pop(0))
        if left.size % right.size == 0:
            left, after = split(left, right.size)
            first.insert(0, after)
        elif right.size % left.size == 0:
            right, after = split(right, left.size)
            second.insert(0, after)
        else:
            for part in (left, right, *first, *second):
                fix(part)
            return
        unify(left, right)
        first, second = ([part for part in side if part.size != 1] for side in (first, second))


def _unify_concatenations(first: list[Term], second: list[Term]) -> None:
    while first:
        left, right = first.pop(0), second.pop(0)
        if left.size > right.size:
            left, after = cut(left, [right.size, left.size - right.size])
            first.insert(0, after)
        elif right.size > left.size:
            right, after = cut(right, [left.size, right.size - left.size])
            second.insert(0, after)
        unify(left, right)
