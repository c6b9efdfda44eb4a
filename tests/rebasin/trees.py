"""Random layouts for property tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from difflayers.rebasin.axes import Axis, Concatenation, Fixed, Group, Product
from difflayers.rebasin.inference.terms import Term, Unknown, resolve


def trees(leaf: st.SearchStrategy, *, at_most: int = 60) -> st.SearchStrategy:
    """Trees of products and concatenations with a bound on their size."""
    grown = st.recursive(
        leaf,
        lambda parts: st.one_of(
            st.lists(parts, min_size=1, max_size=3).map(lambda found: Product(tuple(found))),
            st.lists(parts, min_size=1, max_size=3).map(lambda found: Concatenation(tuple(found))),
        ),
        max_leaves=5,
    )
    return grown.filter(lambda tree: tree.size <= at_most)


SIZES = {"a": 2, "b": 3, "c": 4}
axes = trees(st.one_of(st.integers(1, 4).map(Fixed), st.sampled_from([Group(name, size) for name, size in SIZES.items()])))
terms = trees(st.one_of(st.integers(1, 4).map(Fixed), st.integers(1, 6).map(Unknown)))


def frozen(term: Term, names: dict[Unknown, str]) -> Axis:
    """The term with its unknowns as groups, which ``names`` holds."""
    term = resolve(term)
    if isinstance(term, Unknown):
        return Group(names.setdefault(term, f"group {len(names)}"), term.size)
    if isinstance(term, Product | Concatenation):
        return type(term)(tuple(frozen(part, names) for part in term.parts))
    return term


def shuffles(names: dict[Unknown, str], seed: int) -> dict[str, Tensor]:
    """A permutation for each unknown."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(unknown.size, generator=generator) for unknown, name in names.items()}
