"""Raveler: a tree and its rows are one thing, batched or not; what is no unknown passes through."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils import _pytree

from difflayers.errors import ShapeError
from difflayers.pytree import Raveler, is_floating

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def trees(draw: st.DrawFn) -> tuple[object, int]:
    """A tree of float64 tensors with a common batch shape, and some leaves that are no unknowns."""
    batch = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))

    def leaf(shape: tuple[int, ...]) -> Tensor:
        return torch.arange(float(math.prod((*batch, *shape))), dtype=torch.float64).reshape((*batch, *shape))

    leaves = st.one_of(SHAPES.map(leaf), st.sampled_from([7, None, torch.tensor([1, 2]), torch.tensor(True)]))
    nodes = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3), st.tuples(inner, inner)
        ),
        max_leaves=6,
    )
    return {"first": leaf(draw(SHAPES)), "rest": draw(nodes)}, len(batch)


def same(left: object, right: object) -> bool:
    a, b = _pytree.tree_flatten(left), _pytree.tree_flatten(right)
    pairs = zip(a[0], b[0], strict=True)
    return a[1] == b[1] and all(torch.equal(x, y) if isinstance(x, Tensor) else x is y for x, y in pairs)


@settings(max_examples=30)
@given(trees())
def test_there_and_back(case: tuple[object, int]) -> None:
    tree, batch_ndim = case
    raveler = Raveler(tree, batch_ndim)
    rows = raveler.ravel(tree)
    assert rows.dim() == batch_ndim + 1
    assert same(raveler.unravel(rows), tree)
    assert torch.equal(raveler.ravel(raveler.unravel(rows)), rows)


@settings(max_examples=30)
@given(trees())
def test_leading_dimensions_ride_along(case: tuple[object, int]) -> None:
    tree, batch_ndim = case
    raveler = Raveler(tree, batch_ndim)
    rows = raveler.ravel(tree)
    many = torch.stack([rows, rows + 1])
    assert torch.equal(raveler.ravel(raveler.unravel(many)), many)
    mapped = vmap(lambda row: raveler.ravel(raveler.unravel(row)))(many)
    assert torch.equal(mapped, many)


def test_scalar_unknown() -> None:
    raveler = Raveler(torch.tensor(2.0))
    assert raveler.ravel(torch.tensor(2.0)).shape == (1,)
    assert raveler.unravel(torch.tensor([3.0])).shape == ()
    batched = Raveler(torch.zeros(4), batch_ndim=1)
    assert batched.ravel(torch.zeros(4)).shape == (4, 1)
    assert batched.unravel(torch.zeros(4, 1)).shape == (4,)


def test_leaves_that_are_no_unknowns_pass_through() -> None:
    mask, tree = torch.tensor([True, False]), OrderedDict(x=torch.ones(2), mask=torch.tensor([True, False]), name="a", n=3, none=None)
    tree["mask"] = mask
    raveler = Raveler(tree)
    assert raveler.ravel(tree).shape == (2,)
    back = raveler.unravel(torch.zeros(2))
    assert isinstance(back, OrderedDict)
    assert back["mask"] is mask
    assert (back["name"], back["n"], back["none"]) == ("a", 3, None)


def test_on_rows_is_differentiable() -> None:
    raveler = Raveler({"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)})
    function = raveler.on_rows(lambda tree, s: {"a": tree["b"].sum() * s, "b": tree["a"] * tree["b"]})
    row = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    value, slope = jvp(lambda row: function(row, 5.0), (row,), (torch.ones_like(row),))
    assert value.tolist() == [35.0, 6.0, 8.0]
    assert slope.tolist() == [10.0, 5.0, 6.0]


def test_rows_may_be_modified_in_place() -> None:
    row = torch.ones(3, requires_grad=True)
    parts = Raveler({"a": torch.zeros(1), "b": torch.zeros(2)}).unravel(row * 2)
    parts["a"].mul_(2)
    parts["b"].add_(1)
    (parts["a"].sum() + parts["b"].sum()).backward()
    assert row.grad.tolist() == [4.0, 2.0, 2.0]


def test_is_floating() -> None:
    assert is_floating(torch.zeros(1))
    assert not any(is_floating(leaf) for leaf in (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64), 1.0, None))


@pytest.mark.parametrize(
    ("example", "batch_ndim", "message"),
    [
        (None, 0, "no floating tensor"),
        ({"n": torch.tensor(1), "s": "a"}, 0, r"no floating tensor.*int64"),
        (1.0, 0, "float"),
        (torch.zeros(2, dtype=torch.complex64), 0, "view_as_real"),
        ((torch.zeros(2), torch.zeros(2, dtype=torch.float64)), 0, r"one dtype.*float32.*float64"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), 1, r"batch_ndim=1.*\(2, 3\), \(3, 3\)"),
        (torch.zeros(2), 2, r"batch_ndim=2"),
    ],
)
def test_examples_that_are_refused(example: object, batch_ndim: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Raveler(example, batch_ndim)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": torch.zeros(2)}, "structure"),
        ([torch.zeros(2), torch.zeros(1)], "structure"),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"\(2,\).*got \(3,\)"),
        ({"a": torch.zeros(2), "b": 1.0}, r"\(1,\).*got float"),
    ],
)
def test_trees_that_do_not_fit(tree: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Raveler({"a": torch.zeros(2), "b": torch.zeros(1)}).ravel(tree)
