"""Exact ranks: against SciPy, ties, masks, infinities, edges; soft ranks of padded lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.sorting import average_rank, soft_rank
from difflayers.sorting.ranks import soft_rank_masked


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.booleans())
def test_against_scipy_with_ties(values: list[int], descending: bool) -> None:
    exact = torch.from_numpy(rankdata([-v for v in values] if descending else values))
    found = average_rank(torch.tensor(values), descending=descending)
    assert torch.equal(found, exact)
    assert torch.equal(average_rank(torch.tensor(values, dtype=torch.float32), descending=descending).double(), exact)


def test_leading_dimensions_and_transposed_input() -> None:
    x = rows(5, 2, 3, seed=0).mul(2).round()
    loop = torch.stack([torch.stack([average_rank(row) for row in part]) for part in x])
    assert torch.equal(average_rank(x), loop)
    assert torch.equal(average_rank(x.mT), torch.stack([average_rank(part.mT) for part in x]))
    assert torch.equal(torch.vmap(average_rank)(x), loop)
    assert average_rank(x[:0]).shape == (0, 2, 3)


def test_small_integers_and_bools() -> None:
    x = torch.tensor([200, 0, 255], dtype=torch.uint8)
    assert average_rank(x, descending=True).tolist() == [2, 3, 1]
    assert average_rank(torch.tensor([True, False, True])).tolist() == [2.5, 1, 2.5]


def test_nan_is_alone_and_infinities_are_ranked() -> None:
    x = torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, -torch.inf, 0.0]])
    ranks = average_rank(x)
    assert ranks[0].isnan().all()
    assert ranks[1].tolist() == [3, 1, 2]


@pytest.mark.parametrize("descending", [False, True])
def test_a_mask_leaves_the_ranks_of_the_rest(descending: bool) -> None:
    x = torch.tensor([[3.0, 9.0, torch.inf, -1.0, torch.nan], [2.0, 2.0, 5.0, 0.0, 1.0]])
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    ranks = average_rank(x, descending=descending, mask=mask)
    assert torch.equal(ranks[0, mask[0]], average_rank(x[0, mask[0]], descending=descending))
    assert ranks[~mask].isnan().all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("descending", [False, True])
def test_soft_ranks_of_padded_lists(regularization, descending: bool, strength: float, scale: float) -> None:
    options = {"regularization": regularization, "regularization_strength": strength, "descending": descending}
    x = scale * rows(3, 6, seed=1)
    lengths = torch.tensor([[2], [6], [0]])
    mask = torch.arange(6) < lengths
    x[~mask] = torch.nan
    x.requires_grad_()
    found = soft_rank_masked(x, mask, **options)
    assert found.isfinite().all()
    for row, keep, ranks in zip(x[:2], mask[:2], found[:2], strict=True):
        torch.testing.assert_close(ranks[keep], soft_rank(row[keep], **options), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(torch.where(mask, found, 0).square().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


def test_what_is_refused() -> None:
    with pytest.raises(ShapeError, match="real numbers, got list"):
        average_rank([1.0, 2.0])  # ty: ignore[invalid-argument-type]
    with pytest.raises(ShapeError, match=r"real numbers, got torch\.complex64"):
        average_rank(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ShapeError, match="n of at least 1"):
        average_rank(torch.zeros(2, 0))
    with pytest.raises(ShapeError, match="n of at least 1"):
        average_rank(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="mask must be a bool"):
        average_rank(torch.zeros(2), mask=torch.ones(2))
    with pytest.raises(ShapeError, match="mask must have the shape of x"):
        average_rank(torch.zeros(2, 3), mask=torch.ones(3, dtype=torch.bool))
