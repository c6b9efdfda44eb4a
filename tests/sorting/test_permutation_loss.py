"""Permutation matrices and their cross-entropy: by hand, against torch, at 0 and 1, ties; accuracies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import binary_cross_entropy, cross_entropy

from difflayers.errors import ShapeError
from difflayers.sorting import PermutationCrossEntropyLoss, permutation_accuracy, permutation_cross_entropy, permutation_matrix


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.booleans())
def test_the_matrix_sorts(values: list[int], descending: bool) -> None:
    x = torch.tensor(values)
    P = permutation_matrix(x, descending=descending)
    torch.testing.assert_close(x.double() @ P, x.double().sort(descending=descending).values)
    torch.testing.assert_close(P.sum(0), torch.ones(len(values), dtype=torch.float64))
    torch.testing.assert_close(P.sum(1), torch.ones(len(values), dtype=torch.float64))
    assert torch.equal(P.flip(0), permutation_matrix(x.flip(0), descending=descending))


def test_binary_against_torch() -> None:
    P, values = rows(2, 3, 4, 4, seed=0).sigmoid(), rows(2, 3, 4, seed=1)
    target = permutation_matrix(values)
    exact = binary_cross_entropy(P, target, reduction="none").mean((-2, -1))
    torch.testing.assert_close(permutation_cross_entropy(P, values, reduction="none"), exact)
    torch.testing.assert_close(permutation_cross_entropy(P, target, reduction="none"), exact)
    torch.testing.assert_close(permutation_cross_entropy(P, values), exact.mean())
    torch.testing.assert_close(permutation_cross_entropy(P, values, reduction="sum"), exact.sum())
    torch.testing.assert_close(permutation_cross_entropy(P, -values, descending=True), exact.mean())


def test_categorical_is_the_cross_entropy_of_columns() -> None:
    logits, values = rows(3, 4, 4, seed=2), rows(3, 4, seed=3)
    # Classes are dimension 1: for every place, which input belongs there.
    exact = cross_entropy(logits, values.argsort(-1))
    torch.testing.assert_close(permutation_cross_entropy(logits.softmax(-2), values, form="categorical"), exact)


@pytest.mark.parametrize("form", ["binary", "categorical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_ones_are_safe(dtype: torch.dtype, form) -> None:
    eps = torch.finfo(dtype).eps
    P = torch.tensor([[1.0 + 2 * eps, -2 * eps, 0], [0, 1, 0], [0, 0, 1]], dtype=dtype, requires_grad=True)
    right, wrong = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 3])
    assert permutation_cross_entropy(P, right, form=form).abs() < 1e-5
    loss = permutation_cross_entropy(P, wrong, form=form)
    (gradient,) = torch.autograd.grad(loss, P)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1.01 / eps
    assert gradient[0, 1] < 0
    assert gradient[1, 0] < 0
    exact = torch.eye(3, dtype=dtype, requires_grad=True)
    assert permutation_cross_entropy(exact, wrong, form=form).item() == pytest.approx(
        (1 - math.log(eps)) * (4 / 9 if form == "binary" else 2 / 3)
    )


@pytest.mark.parametrize("form", ["binary", "categorical"])
def test_derivatives(form) -> None:
    P, values = rows(2, 3, 3, seed=4).sigmoid().requires_grad_(), rows(2, 3, seed=5)
    assert gradcheck(lambda P: permutation_cross_entropy(P, values, form=form), (P,), check_forward_ad=True)
    assert gradgradcheck(lambda P: permutation_cross_entropy(P, values, form=form), (P,))


def test_tied_targets_do_not_depend_on_the_order_of_the_input() -> None:
    P, values = rows(4, 4, seed=6).softmax(0), torch.tensor([7, 3, 7, 1])
    order = torch.tensor([2, 3, 1, 0])
    for form in ("binary", "categorical"):
        torch.testing.assert_close(
            permutation_cross_entropy(P[order], values[order], form=form), permutation_cross_entropy(P, values, form=form)
        )


def test_module_transforms_and_a_nan() -> None:
    P, values = rows(4, 3, 3, seed=7).sigmoid(), rows(4, 3, seed=8)
    each = permutation_cross_entropy(P, values, reduction="none")
    torch.testing.assert_close(PermutationCrossEntropyLoss(reduction="none")(P, values), each)
    torch.testing.assert_close(torch.vmap(permutation_cross_entropy)(P, values), each)
    assert permutation_cross_entropy(P.float(), values).dtype == torch.float32
    assert "'categorical'" in repr(PermutationCrossEntropyLoss("categorical"))
    values[1, 0] = torch.nan
    assert permutation_cross_entropy(P, values, reduction="none").isnan().tolist() == [False, True, False, False]


def test_accuracy_of_scores_and_of_matrices() -> None:
    target = torch.tensor([[3, 1, 2], [3, 1, 2], [5, 5, 1]])
    scores = torch.tensor([[0.3, 0.1, 0.2], [0.3, 0.2, 0.1], [0.8, 0.9, 0.1]])
    found = permutation_accuracy(scores, target)
    assert found.exact_match.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.element_wise, torch.tensor([1, 1 / 3, 1]))
    for descending in (False, True):
        P = 0.8 * permutation_matrix(scores, descending=descending) + 0.05
        matrix = permutation_accuracy(P, target, descending=descending)
        torch.testing.assert_close(matrix.exact_match, found.exact_match)
        torch.testing.assert_close(matrix.element_wise, found.element_wise)
    assert torch.equal(permutation_accuracy(scores, target, descending=True).exact_match, found.exact_match)


def test_accuracy_of_a_nan() -> None:
    scores = torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])
    target = torch.tensor([[1, 2], [1, 2]])
    assert permutation_accuracy(scores, target).exact_match.isnan().tolist() == [True, False]
    assert permutation_accuracy(permutation_matrix(scores), target).element_wise.isnan().tolist() == [True, False]


def test_what_is_refused() -> None:
    P = torch.eye(3).expand(2, 3, 3)
    with pytest.raises(ShapeError, match=r"permutation must be a floating tensor, got torch\.int64"):
        permutation_cross_entropy(P.long(), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"\(\*batch, n, n\)"):
        permutation_cross_entropy(P[:, :2], torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"target must have the shape \(2, 3\) of values"):
        permutation_cross_entropy(P, torch.ones(3))
    with pytest.raises(ValueError, match=r"form .* is not known"):
        permutation_cross_entropy(P, torch.ones(2, 3), form="rows")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ShapeError, match=r"prediction must have the shape \(2, 3\) of scores or \(2, 3, 3\)"):
        permutation_accuracy(P[0], torch.ones(2, 3))
