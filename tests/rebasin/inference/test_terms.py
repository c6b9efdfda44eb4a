"""Whatever is put for the unknowns, unified terms are renamed alike, and views and pieces are renamed as the whole."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from difflayers.rebasin.axes import Concatenation, Fixed, Product, index
from difflayers.rebasin.inference.terms import Unknown, concatenate, cut, fix, is_fixed, multiply, reshape, resolve, split, unify

from ..trees import frozen, shuffles, terms

sizes = st.sampled_from([2, 3, 4, 6, 8, 12])


def renamed(term, names, seed):
    axis = frozen(term, names)
    return index(axis, shuffles(names, seed))


def both(first, second, seed):
    """How two terms are renamed by the same permutations."""
    names: dict[Unknown, str] = {}
    frozen(first, names), frozen(second, names)
    return renamed(first, names, seed), renamed(second, names, seed)


@settings(max_examples=60)
@given(terms, terms, st.integers(0, 99))
def test_unified_terms_are_renamed_alike(first, second, seed) -> None:
    if first.size != second.size:  # make them fit
        first, second = Concatenation((first, Unknown(second.size))), Concatenation((Unknown(first.size), second))
    unify(first, second)
    left, right = both(first, second, seed)
    assert left.tolist() == right.tolist()


@settings(max_examples=60)
@given(st.data(), st.integers(0, 99))
def test_products_of_unknowns_unify(data, seed) -> None:
    total = data.draw(st.sampled_from([12, 24, 36]))

    def factors(size):
        divisors = [k for k in range(2, size + 1) if size % k == 0]
        if not divisors:
            return []
        first = data.draw(st.sampled_from(divisors))
        return [first, *factors(size // first)]

    first, second = (Product(tuple(Unknown(size) for size in factors(total))) for _ in range(2))
    unify(first, second)
    left, right = both(first, second, seed)
    assert left.tolist() == right.tolist()


@settings(max_examples=60)
@given(terms, st.integers(0, 99))
def test_the_normal_form_is_the_same_layout(term, seed) -> None:
    names: dict[Unknown, str] = {}

    def raw(part):
        if isinstance(part, Product | Concatenation):
            return type(part)(tuple(raw(piece) for piece in part.parts))
        return frozen(part, names)

    axis, normal = raw(term), frozen(resolve(term), names)
    permutations = shuffles(names, seed)
    assert index(axis, permutations).tolist() == index(normal, permutations).tolist()


@settings(max_examples=60)
@given(st.lists(terms, min_size=1, max_size=3), st.data(), st.integers(0, 99))
def test_views_are_renamed_as_the_tensor(parts, data, seed) -> None:
    total = math.prod(part.size for part in parts)
    assume(total <= 200)
    shape, left = [], total
    while left > 1:
        shape.append(data.draw(st.sampled_from([k for k in range(2, left + 1) if left % k == 0])))
        left //= shape[-1]
    viewed = reshape(parts, shape)
    assert [term.size for term in viewed] == shape
    before, after = both(multiply(parts), multiply(viewed), seed)
    assert before.tolist() == after.tolist()


@settings(max_examples=60)
@given(terms, st.data(), st.integers(0, 99))
def test_pieces_are_renamed_as_the_whole(term, data, seed) -> None:
    pieces, left = [], term.size
    while left:
        pieces.append(data.draw(st.integers(1, left)))
        left -= pieces[-1]
    before, after = both(term, concatenate(cut(term, pieces)), seed)
    assert before.tolist() == after.tolist()


@settings(max_examples=60)
@given(terms, st.data(), st.integers(0, 99))
def test_halves_are_renamed_as_the_whole(term, data, seed) -> None:
    outer = data.draw(st.sampled_from([k for k in range(1, term.size + 1) if term.size % k == 0]))
    before, after = both(term, multiply(split(term, outer)), seed)
    assert before.tolist() == after.tolist()


def test_an_unknown_takes_the_meaning_of_what_it_meets() -> None:
    channels, half = Unknown(12), Unknown(6)
    unify(channels, concatenate([half, half]))
    assert resolve(channels) == Concatenation((half, half))
    unify(half, Product((Unknown(2), Fixed(3))))
    left, right = both(channels, concatenate([half, half]), 0)
    assert left.tolist() == right.tolist()


def test_what_meets_a_fixed_dimension_is_fixed() -> None:
    heads, features = Unknown(2), Unknown(4)
    unify(multiply([heads, features]), Fixed(8))
    assert is_fixed(heads)
    assert is_fixed(features)


def test_three_equal_pieces_are_a_product() -> None:
    features = [Unknown(4) for _ in range(3)]
    outer, inner = split(concatenate(features), 3)
    assert is_fixed(outer)
    assert all(resolve(part) is resolve(inner) for part in features)


def test_fixing_reaches_every_unknown() -> None:
    parts = [Unknown(2), Unknown(3)]
    assert fix(concatenate([multiply(parts), Unknown(5)])) == Fixed(11)
    assert torch.tensor([is_fixed(part) for part in parts]).all()
