"""NDCG: the metric against scikit-learn, the loss against the metric, truncation, gains, masks, derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ShapeError
from difflayers.sorting import NDCGLoss, ndcg, ndcg_loss


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relevances(*shape: int, seed: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), min_size=2, max_size=9), st.none() | st.integers(1, 12))
def test_metric_against_scikit_learn_with_ties(pairs: list[tuple[int, int]], k: int | None) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, relevance = torch.tensor(pairs).T
    exact = metrics.ndcg_score(relevance[None].numpy(), scores[None].double().numpy(), k=k)
    torch.testing.assert_close(ndcg(scores, relevance, k=k).item(), float(exact), rtol=0, atol=1e-12)


def test_metric_by_hand() -> None:
    scores, relevance = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([2, 0, 1])
    dcg = 1 / math.log2(3) + 3 / 2
    torch.testing.assert_close(ndcg(scores, relevance, gains="exponential").item(), dcg / (3 + 1 / math.log2(3)))
    torch.testing.assert_close(ndcg(scores, relevance, k=2).item(), (1 / math.log2(3)) / (2 + 1 / math.log2(3)))


@pytest.mark.parametrize("gains", ["linear", "exponential"])
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_small_strength_is_the_metric(regularization, k: int | None, gains) -> None:
    scores, relevance = rows(6, 8, seed=0), relevances(6, 8, seed=1)
    options = {"k": k, "gains": gains}
    loss = ndcg_loss(scores, relevance, regularization=regularization, regularization_strength=1e-4, reduction="none", **options)
    torch.testing.assert_close(loss, 1 - ndcg(scores, relevance, **options), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [None, 2])
def test_derivatives(k: int | None) -> None:
    scores, relevance = rows(2, 5, seed=2).requires_grad_(), relevances(2, 5, seed=3)
    mask = torch.tensor([[True] * 5, [True, False, True, True, True]])

    def loss(scores: Tensor) -> Tensor:
        return ndcg_loss(scores, relevance, k=k, regularization_strength=0.5, mask=mask, reduction="none")

    assert gradcheck(loss, (scores,), check_forward_ad=True)
    assert gradgradcheck(loss, (scores,))


@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_invariances(seed: int, scale: float, shift: float) -> None:
    scores, relevance = rows(6, seed=seed), relevances(6, seed=seed + 1)
    loss = ndcg_loss(scores, relevance)
    torch.testing.assert_close(ndcg_loss(scores + shift, relevance), loss)
    torch.testing.assert_close(ndcg_loss(scale * scores, relevance, regularization_strength=scale), loss)
    torch.testing.assert_close(ndcg_loss(scores, scale * relevance), loss)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ndcg_loss(scores[order], relevance[order]), loss)


def test_descent_sorts_by_relevance() -> None:
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([0, 3, 1, 2, 4])
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(100):
        loss = ndcg_loss(scores, relevance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ndcg(scores, relevance) == 1
    assert torch.equal(scores.argsort(), relevance.argsort())


def test_truncation_does_not_starve_equal_scores() -> None:
    scores = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    relevance = torch.arange(10)
    (gradient,) = torch.autograd.grad(ndcg_loss(scores, relevance, k=2), scores)
    assert torch.equal(gradient.argsort(descending=True), relevance)


def test_a_mask_is_a_shorter_row() -> None:
    scores, relevance = rows(6, seed=4), relevances(6, seed=5).double()
    mask = torch.tensor([True, False, True, True, True, False])
    for k in (None, 2):
        metric, loss = ndcg(scores[mask], relevance[mask], k=k), ndcg_loss(scores[mask], relevance[mask], k=k)
        scores[~mask], relevance[~mask] = torch.nan, torch.nan
        torch.testing.assert_close(ndcg(scores, relevance, k=k, mask=mask), metric)
        torch.testing.assert_close(ndcg_loss(scores, relevance, k=k, mask=mask), loss)


def test_rows_without_relevance_and_broken_rows() -> None:
    scores = rows(5, 4, seed=6)
    relevance = torch.tensor([[0, 0, 0, 0], [1, 0, 2, 0], [1, -1, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4]]).double()
    scores[3, 0] = torch.nan
    relevance[4, 0] = torch.nan
    scores.requires_grad_()
    metric, loss = ndcg(scores, relevance), ndcg_loss(scores, relevance, reduction="none")
    assert metric[0] == 0
    assert loss[0] == 1
    assert metric.isnan().tolist() == loss.isnan().tolist() == [False, False, True, True, True]
    (gradient,) = torch.autograd.grad(loss[:2].sum(), scores)
    assert (gradient[0] == 0).all()
    assert gradient[1].isfinite().all()
    assert ndcg(scores[:2], relevance[:2], mask=torch.zeros(2, 4, dtype=torch.bool)).tolist() == [0, 0]


def test_module_reductions_and_transforms() -> None:
    scores, relevance = rows(2, 3, 5, seed=7), relevances(2, 3, 5, seed=8)
    each = ndcg_loss(scores, relevance, k=3, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(NDCGLoss(k=3)(scores, relevance), each.mean())
    torch.testing.assert_close(NDCGLoss(k=3, reduction="sum")(scores, relevance), each.sum())
    torch.testing.assert_close(torch.vmap(lambda s, r: ndcg_loss(s, r, k=3))(scores, relevance), each.mean(-1))
    torch.testing.assert_close(torch.vmap(ndcg)(scores, relevance), ndcg(scores, relevance))
    assert ndcg_loss(scores.float(), relevance).dtype == torch.float32
    assert ndcg(scores.float(), relevance.float()).dtype == torch.float32
    assert "k=3" in repr(NDCGLoss(k=3))


def test_what_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ShapeError, match="scores must be a floating tensor"):
        ndcg_loss(x.long(), x)
    with pytest.raises(ShapeError, match="relevance must have the shape of scores"):
        ndcg(x, x[0])
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        ndcg(x, x, k=0)
    with pytest.raises(ValueError, match="k must be an integer"):
        ndcg_loss(x, x, k=1.5)  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match=r"gains .* is not known"):
        ndcg_loss(x, x, gains="log")  # ty: ignore[invalid-argument-type]
