"""Weights of finite differences: the published tables, numbers against tensors."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from difflayers.errors import ShapeError
from difflayers.pde import finite_difference_weights


def test_known_weights() -> None:
    def weights(offsets: list[float], order: int) -> list[Fraction]:
        return [Fraction(w).limit_denominator(1000) for w in finite_difference_weights(offsets, order).tolist()]

    # Fornberg (1988), tables 1 and 3.
    assert weights([-2, -1, 0, 1, 2], 1) == [Fraction(1, 12), Fraction(-2, 3), 0, Fraction(2, 3), Fraction(-1, 12)]
    assert weights([-2, -1, 0, 1, 2], 4) == [1, -4, 6, -4, 1]
    assert weights([0, 1, 2, 3], 2) == [2, -5, 4, -1]
    assert weights([-0.5, 0.5], 0) == [Fraction(1, 2), Fraction(1, 2)]


@given(st.lists(st.integers(-6, 6), min_size=2, max_size=7, unique=True), st.integers(0, 3))
def test_weights_of_tensors_are_those_of_numbers(offsets: list[int], order: int) -> None:
    order = min(order, len(offsets) - 1)
    exact = finite_difference_weights(offsets, order)
    found = finite_difference_weights(torch.tensor([offsets, offsets], dtype=torch.float64), order)
    torch.testing.assert_close(found, torch.stack([exact, exact]), rtol=1e-11, atol=1e-11)


def test_derivatives_in_the_offsets() -> None:
    offsets = torch.tensor([[-1.2, 0.1, 0.9, 2.0], [0.0, 1.0, 1.5, 2.5]], dtype=torch.float64, requires_grad=True)
    for order in range(4):
        assert gradcheck(lambda d: finite_difference_weights(d, order), (offsets,), check_forward_ad=True)  # noqa: B023
    assert finite_difference_weights(torch.arange(4.0, device="meta"), 2).device.type == "meta"


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="takes at least 3 offsets, got 2"):
        finite_difference_weights([0, 1], 2)
    with pytest.raises(ShapeError, match=r"torch\.int64"):
        finite_difference_weights(torch.arange(3), 1)
    with pytest.raises(ValueError, match="must differ"):
        finite_difference_weights([0, 1, 1], 1)
