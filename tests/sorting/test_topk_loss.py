"""Top-k cross-entropy: against torch for k = 1, by hand, far classes, mixtures, derivatives; top-k accuracy against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from difflayers.errors import ShapeError
from difflayers.sorting import TopKCrossEntropyLoss, soft_topk, topk_accuracy, topk_cross_entropy


def logits_and_classes(*batch: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, classes, generator=generator, dtype=torch.float64), torch.randint(classes, batch, generator=generator)


def test_one_is_the_ordinary_cross_entropy() -> None:
    logits, target = logits_and_classes(6, classes=5, seed=0)
    torch.testing.assert_close(topk_cross_entropy(logits, target), cross_entropy(logits, target))
    torch.testing.assert_close(topk_cross_entropy(logits, target, 1, regularization_strength=0.5), cross_entropy(2 * logits, target))
    far = torch.tensor([[0.0, 5000.0]])
    torch.testing.assert_close(topk_cross_entropy(far, torch.tensor([0])), torch.tensor(5000.0))


def test_the_degree_is_that_of_the_mask() -> None:
    logits, target = logits_and_classes(2, 3, classes=6, seed=1)
    for k in (2, 4):
        degree = soft_topk(logits, k, regularization="entropic").gather(-1, target[..., None])[..., 0]
        torch.testing.assert_close(topk_cross_entropy(logits, target, k, reduction="none"), -degree.log())
    mixed = -(0.25 * soft_topk(logits, 2, regularization="entropic") + 0.75 * soft_topk(logits, 4, regularization="entropic")).log()
    expected = mixed.gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(topk_cross_entropy(logits, target, {2: 0.25, 4: 0.75}, reduction="none"), expected)


def test_equal_logits_by_hand() -> None:
    zeros, target = torch.zeros(2, 8), torch.tensor([0, 7])
    for k in (1, 2, 4, 8):
        torch.testing.assert_close(topk_cross_entropy(zeros, target, k), torch.tensor(math.log(8 / k)))


@pytest.mark.parametrize("gap", [10.0, 60.0, 500.0])
def test_a_class_far_behind_still_has_a_gradient(gap: float) -> None:
    logits = torch.tensor([[0.0, -1.0, 1.0, -gap]], requires_grad=True)
    loss = topk_cross_entropy(logits, torch.tensor([3]), 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(gap, abs=5)
    assert gradient[0, 3].item() == pytest.approx(-1, abs=1e-3)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(-50.0, 50.0))
def test_more_places_cost_less(seed: int, k: int, shift: float) -> None:
    logits, target = logits_and_classes(classes=6, seed=seed)
    loss = topk_cross_entropy(logits, target, k)
    assert loss >= 0
    # Softmax and the entropic mask are two families: between them the order holds only by the sum.
    if k > 1:
        assert topk_cross_entropy(logits, target, k + 1) <= loss + 1e-12
    torch.testing.assert_close(topk_cross_entropy(logits + shift, target, k), loss)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(topk_cross_entropy(logits[order], (order == target).long().argmax(), k), loss)


@pytest.mark.parametrize("k", [1, 3, {1: 0.4, 2: 0.3, 5: 0.3}])
def test_derivatives(k) -> None:
    logits, target = logits_and_classes(3, classes=5, seed=2)
    logits.requires_grad_()
    strength = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(logits: Tensor, strength: Tensor) -> Tensor:
        return topk_cross_entropy(logits, target, k, regularization_strength=strength, reduction="none")

    assert gradcheck(loss, (logits, strength), check_forward_ad=True)
    assert gradgradcheck(loss, (logits, strength))


def test_module_dtype_transforms_and_a_nan() -> None:
    logits, target = logits_and_classes(4, classes=5, seed=3)
    k = {1: 0.5, 3: 0.5}
    each = topk_cross_entropy(logits, target, k, reduction="none")
    torch.testing.assert_close(TopKCrossEntropyLoss(k)(logits, target), each.mean())
    torch.testing.assert_close(TopKCrossEntropyLoss(k, reduction="sum")(logits, target), each.sum())
    torch.testing.assert_close(torch.vmap(lambda x, t: topk_cross_entropy(x, t, k))(logits, target), each)
    gradients = torch.vmap(torch.func.grad(lambda x, t: topk_cross_entropy(x, t, k)))(logits, target)
    assert gradients.sum(-1).abs().max() < 1e-12
    assert topk_cross_entropy(logits.float(), target, 3).dtype == torch.float32
    assert "k={1: 0.5, 3: 0.5}" in repr(TopKCrossEntropyLoss(k))
    logits[1, 0] = torch.nan
    assert topk_cross_entropy(logits, target, k, reduction="none").isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_accuracy_against_scikit_learn(k: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits, target = logits_and_classes(50, classes=5, seed=4)
    exact = metrics.top_k_accuracy_score(target.numpy(), logits.numpy(), k=k, labels=range(5))
    assert topk_accuracy(logits, target, k).mean().item() == pytest.approx(exact)


def test_accuracy_of_ties_is_a_chance() -> None:
    assert topk_accuracy(torch.zeros(10), torch.tensor(3), 2).item() == pytest.approx(0.2)
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0], [2.0, 2.0, 1.0, 0.0], [torch.nan, 1.0, 0.0, 0.0]])
    found = topk_accuracy(logits, torch.tensor([1, 2, 1]), 2)
    assert found[:2].tolist() == [0.5, 0]
    assert found[2].isnan()


def test_what_is_refused() -> None:
    logits, target = logits_and_classes(4, classes=5, seed=5)
    with pytest.raises(ShapeError, match=r"class indices, got torch\.float64"):
        topk_cross_entropy(logits, target.double())
    with pytest.raises(ShapeError, match=r"target must have the shape \(4,\)"):
        topk_cross_entropy(logits, target[:3])
    with pytest.raises(ShapeError, match="logits must be a floating tensor"):
        topk_cross_entropy(logits.long(), target)
    for k in (0, 6, 1.5, True, {6: 1.0}):
        with pytest.raises(ValueError, match="k must be an integer of at least 1 and at most 5"):
            topk_cross_entropy(logits, target, k)  # ty: ignore[invalid-argument-type]
    for weights in ({1: 0.5}, {1: 1.5, 2: -0.5}, {}):
        with pytest.raises(ValueError, match="k must be a distribution"):
            topk_cross_entropy(logits, target, weights)
    with pytest.raises(ValueError, match=r"reduction .* is not known"):
        topk_cross_entropy(logits, target, reduction="average")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="k must be an integer"):
        topk_accuracy(logits, target, 6)
