"""Spearman: the metric against SciPy, the loss against the metric and the linear correlation, derivatives, constant rows, masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ShapeError
from difflayers.sorting import SpearmanLoss, average_rank, spearman, spearman_loss


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_metric_against_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(pairs).T
    exact = torch.tensor(spearmanr(a.numpy(), b.numpy()).statistic, dtype=torch.float64)
    torch.testing.assert_close(spearman(a, b), exact, equal_nan=True, rtol=0, atol=1e-12)


def test_metric_of_dtypes_and_dimensions() -> None:
    a, b = rows(2, 3, 7, seed=0), rows(2, 3, 7, seed=1)
    assert spearman(a, b).shape == (2, 3)
    assert spearman(a.float(), b.float()).dtype == torch.float32
    assert spearman(a.float(), torch.arange(7).expand(2, 3, 7)).dtype == torch.float64
    assert not spearman(a.requires_grad_(), b).requires_grad


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_small_strength_is_the_metric(regularization) -> None:
    scores, target = rows(5, 9, seed=2), rows(5, 9, seed=3).mul(2).round()
    loss = spearman_loss(scores, target, regularization=regularization, regularization_strength=1e-4, reduction="none")
    torch.testing.assert_close(loss, 1 - spearman(scores, target), rtol=0, atol=1e-9)


def test_large_strength_is_the_correlation_with_ranks() -> None:
    scores, target = rows(9, seed=4), rows(9, seed=5)
    linear = torch.corrcoef(torch.stack([scores, average_rank(target)]))[0, 1]
    torch.testing.assert_close(spearman_loss(scores, target, regularization_strength=50.0), 1 - linear, rtol=0, atol=1e-9)


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_derivatives(regularization) -> None:
    scores, target = rows(2, 5, seed=6).requires_grad_(), rows(2, 5, seed=7)
    mask = torch.tensor([[True] * 5, [True, False, True, True, True]])

    def loss(scores: Tensor) -> Tensor:
        return spearman_loss(scores, target, regularization=regularization, regularization_strength=0.3, mask=mask, reduction="none")

    assert gradcheck(loss, (scores,), check_forward_ad=True)
    assert gradgradcheck(loss, (scores,))


@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_only_the_order_of_the_target_matters(seed: int, scale: float, shift: float) -> None:
    scores, target = rows(6, seed=seed), rows(6, seed=seed + 1)
    loss = spearman_loss(scores, target)
    torch.testing.assert_close(spearman_loss(scores, scale * target.exp() + shift), loss)
    torch.testing.assert_close(spearman_loss(scores + shift, target), loss)
    torch.testing.assert_close(spearman_loss(scale * scores, target, regularization_strength=scale), loss)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(spearman_loss(scores[order], target[order]), loss)
    torch.testing.assert_close(spearman_loss(scores, -target), 2 - loss)
    assert 0 <= loss <= 2


def test_equal_scores_are_pulled_apart() -> None:
    scores, target = torch.zeros(4, requires_grad=True), torch.tensor([3.0, 1.0, 2.0, 4.0])
    loss = spearman_loss(scores, target)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss == 1
    assert gradient.isfinite().all()
    assert torch.equal(average_rank(-gradient), average_rank(target))


def test_rows_that_teach_nothing() -> None:
    scores = rows(3, 4, seed=8).requires_grad_()
    target, mask = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool)
    target[1] = torch.arange(4)
    mask[1, 1:], mask[2] = False, False
    loss = spearman_loss(scores, target, mask=mask, reduction="none")
    assert loss.tolist() == [1, 1, 1]
    assert (torch.autograd.grad(loss.sum(), scores)[0] == 0).all()
    assert spearman(scores, target, mask=mask).isnan().all()
    assert spearman_loss(torch.ones(2, 1), torch.ones(2, 1)) == 1


def test_a_mask_is_a_shorter_row() -> None:
    scores, target = rows(6, seed=9), rows(6, seed=10)
    mask = torch.tensor([True, False, True, True, True, False])
    torch.testing.assert_close(spearman(scores, target, mask=mask), spearman(scores[mask], target[mask]))
    torch.testing.assert_close(spearman_loss(scores, target, mask=mask), spearman_loss(scores[mask], target[mask]))


def test_a_nan_stays_in_its_row() -> None:
    scores, target = rows(3, 5, seed=11), rows(3, 5, seed=12)
    scores[0, 1], target[1, 2] = torch.nan, torch.nan
    assert spearman(scores, target).isnan().tolist() == [True, True, False]
    scores.requires_grad_()
    loss = spearman_loss(scores, target, reduction="none")
    assert loss.isnan().tolist() == [True, True, False]
    assert torch.autograd.grad(loss[2], scores)[0][2].isfinite().all()


def test_module_reductions_and_transforms() -> None:
    scores, target = rows(2, 3, 5, seed=13), rows(2, 3, 5, seed=14)
    each = spearman_loss(scores, target, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(SpearmanLoss()(scores, target), each.mean())
    torch.testing.assert_close(SpearmanLoss(reduction="sum")(scores, target), each.sum())
    torch.testing.assert_close(torch.vmap(spearman_loss)(scores, target), each.mean(-1))
    gradients = torch.vmap(torch.func.grad(spearman_loss))(scores, target)
    loop = torch.stack([torch.func.grad(spearman_loss)(s, t) for s, t in zip(scores, target, strict=True)])
    torch.testing.assert_close(gradients, loop)
    assert spearman_loss(scores.float(), target).dtype == torch.float32
    assert "regularization_strength=0.5" in repr(SpearmanLoss(regularization_strength=0.5))


def test_half_precision_of_a_long_row() -> None:
    scores, target = rows(300, seed=15), rows(300, seed=16)
    for dtype in (torch.float16, torch.bfloat16):
        few = scores.to(dtype)
        exact = spearman_loss(few.double(), target)
        assert spearman_loss(few, target).dtype == dtype
        assert spearman_loss(few, target).item() == pytest.approx(exact.item(), abs=5e-3)
        assert spearman(few, target.to(dtype)).item() == pytest.approx(spearman(few, target).item(), abs=5e-3)


def test_what_is_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"scores must be a floating tensor, got torch\.int64"):
        spearman_loss(x.long(), x)
    with pytest.raises(ShapeError, match="target must have the shape of scores"):
        spearman_loss(x, x[0])
    with pytest.raises(ShapeError, match="target must have the shape of scores"):
        spearman(x, x[:1])
    with pytest.raises(ValueError, match=r"reduction .* is not known"):
        spearman_loss(x, x, reduction="average")  # ty: ignore[invalid-argument-type]
