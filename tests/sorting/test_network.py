"""SortingNetwork against dense swap matrices, and what holds for any relaxed sort."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.sorting import SortingNetwork
from difflayers.sorting.relaxations import DISTRIBUTIONS
from tests.sorting.networks import dense_permutation

DISTRIBUTION_NAMES = sorted(DISTRIBUTIONS)
NETWORKS = ["bitonic", "odd_even"]
MONOTONE = ["cauchy", "optimal", "reciprocal"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distribution", DISTRIBUTION_NAMES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 11])
def test_values_permutation_and_gradients_of_the_dense_network(network: str, distribution: str, size: int) -> None:
    layer = SortingNetwork(size, network, distribution, steepness=4.0)
    x = rows(size).requires_grad_()
    values, P = layer.sort(x)
    exact = dense_permutation(x, network, distribution, steepness=4.0)
    torch.testing.assert_close(P, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(values, x @ P)
    weights = rows(size, size, seed=1)
    loss, reference = ((weights * P).sum() + (weights[0] * values).sum().sin() for P, values in ((P, values), (exact, x @ exact)))
    if size > 1:
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(reference, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [17, 32, 50])
def test_large_permutations_agree_with_values_ranks_and_payload(network: str, size: int) -> None:
    # From n = 32 on the bitonic permutation has factors with wires inside and outside of them.
    layer = SortingNetwork(size, network)
    x, payload = rows(2, 3, size), rows(2, 3, size, 2, 2, seed=1)
    values, P = layer.sort(x)
    torch.testing.assert_close(values, (x.unsqueeze(-2) @ P).squeeze(-2))
    torch.testing.assert_close(layer.rank(x), P @ torch.arange(1, size + 1, dtype=P.dtype))
    torch.testing.assert_close(layer(x, payload)[1], torch.einsum("bcij,bcixy->bcjxy", P, payload))
    torch.testing.assert_close(layer(x, x)[1], values)
    for dim in (-1, -2):
        torch.testing.assert_close(P.sum(dim), torch.ones_like(values))
    assert P.min() >= 0


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [5, 32, 40])
def test_gradients_of_large_permutations(network: str, size: int) -> None:
    # The permutation and the payload take different ways through the network.
    layer = SortingNetwork(size, network, "logistic", steepness=3.0)
    x, weights = rows(2, size).requires_grad_(), rows(2, size, size, seed=1)
    through_permutation = torch.autograd.grad((layer.sort(x).permutation.mT * weights).sum(), x)
    eye = torch.eye(size, dtype=x.dtype).expand(2, -1, -1)
    through_payload = torch.autograd.grad((layer(x, eye)[1] * weights).sum(), x)
    torch.testing.assert_close(through_permutation, through_payload)


@given(st.integers(1, 20), st.sampled_from(NETWORKS), st.sampled_from(DISTRIBUTION_NAMES), st.floats(0.1, 1e3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_doubly_stochastic(size: int, network: str, distribution: str, steepness: float, seed: int) -> None:
    layer, x = SortingNetwork(size, network, distribution, steepness), rows(size, seed=seed)
    values, P = layer.sort(x)
    assert P.min() >= 0
    for sums in (P.sum(-1), P.sum(-2)):
        torch.testing.assert_close(sums, torch.ones_like(x))
    torch.testing.assert_close(values.sum(), x.sum())
    assert values.min() >= x.min() - 1e-9
    assert values.max() <= x.max() + 1e-9
    assert layer.rank(x).min() >= 1 - 1e-9
    assert layer.rank(x).max() <= size + 1e-9


@pytest.mark.parametrize("distribution", MONOTONE)
@pytest.mark.parametrize("network", NETWORKS)
def test_monotone(network: str, distribution: str) -> None:
    layer = SortingNetwork(8, network, distribution, steepness=2.0)
    for seed in range(20):
        assert torch.func.jacrev(layer)(rows(8, seed=seed)).min() >= -1e-12


@pytest.mark.parametrize("distribution", sorted(set(DISTRIBUTION_NAMES) - set(MONOTONE)))
@pytest.mark.parametrize("network", NETWORKS)
def test_not_monotone(network: str, distribution: str) -> None:
    layer = SortingNetwork(8, network, distribution, steepness=2.0)
    assert min(float(torch.func.jacrev(layer)(rows(8, seed=seed)).min()) for seed in range(20)) < -1e-3


def test_values_are_not_promised_to_be_in_order() -> None:
    out_of_order = [bool((SortingNetwork(8, network, "reciprocal", 1.0)(rows(200, 8)).diff() < 0).any()) for network in NETWORKS]
    assert any(out_of_order)


@pytest.mark.parametrize("distribution", DISTRIBUTION_NAMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_steep_networks_sort(network: str, distribution: str) -> None:
    x = rows(10, 13)
    values, P = SortingNetwork(13, network, distribution, steepness=1e8).sort(x)
    torch.testing.assert_close(values, x.sort(-1).values, rtol=0, atol=1e-5)
    assert torch.equal(P.argmax(-2), x.argsort(-1))


@pytest.mark.parametrize("network", NETWORKS)
def test_descending_is_the_mirror_image(network: str) -> None:
    x = rows(4, 7)
    up, down = (SortingNetwork(7, network, descending=flag) for flag in (False, True))
    values, P = down.sort(x)
    torch.testing.assert_close(values, -up(-x))
    torch.testing.assert_close(values, (x.unsqueeze(-2) @ P).squeeze(-2))
    torch.testing.assert_close(down.rank(x), up.rank(-x))
    torch.testing.assert_close(down(x, x)[1], values)
    hard = SortingNetwork(7, network, steepness=1e8, descending=True)
    assert (hard.rank(x).argmin(-1) == x.argmax(-1)).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_ties_share_their_place(network: str) -> None:
    layer = SortingNetwork(4, network)
    x = torch.tensor([1.0, 5.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    values, P = layer.sort(x)
    assert P.isfinite().all()
    assert torch.autograd.grad(values.square().sum(), x)[0].isfinite().all()
    equal = torch.full((3, 4), 2.0, dtype=torch.float64)
    torch.testing.assert_close(layer(equal), equal)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_nan_alone(bad: float) -> None:
    layer = SortingNetwork(5)
    x = rows(3, 5)
    good = x[[0, 2]].clone()
    x[1, 2] = bad
    x.requires_grad_()
    values, P = layer.sort(x)
    ranks, (_, payload) = layer.rank(x), layer(x, rows(3, 5, 2))
    for output in (values, P, ranks, payload):
        assert output[1].isnan().all()
        assert output[[0, 2]].isfinite().all()
    assert torch.equal(values[[0, 2]], layer(good))
    loss = (values[[0, 2]].square().sum() + P[[0, 2]].square().sum()) + torch.nan_to_num(values[1]).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_one_value_and_empty_batches() -> None:
    one = SortingNetwork(1)
    values, P = one.sort(torch.tensor([[3.0], [4.0]]))
    assert values.tolist() == [[3.0], [4.0]]
    assert P.tolist() == [[[1.0]], [[1.0]]]
    assert one.rank(torch.tensor([3.0])).tolist() == [1.0]
    for network in NETWORKS:
        values, P = SortingNetwork(6, network).sort(torch.empty(0, 2, 6))
        assert values.shape == (0, 2, 6)
        assert P.shape == (0, 2, 6, 6)


def test_second_derivatives_of_ranks_through_a_loss() -> None:
    layer, x, weights = SortingNetwork(6, steepness=2.0), rows(6), rows(6, seed=2)

    def loss(x: Tensor) -> Tensor:
        return (layer.rank(x) * weights).sum() * layer(x)[0]

    hessian = torch.func.hessian(loss)(x)
    step = 1e-5
    slopes = [(torch.func.grad(loss)(x + step * e) - torch.func.grad(loss)(x - step * e)) / (2 * step) for e in torch.eye(6).double()]
    torch.testing.assert_close(hessian, torch.stack(slopes), rtol=1e-6, atol=1e-7)


def test_what_is_kept_for_backward_is_one_number_a_comparator() -> None:
    size = 64
    for output in (lambda layer, x: layer(x), lambda layer, x: layer.rank(x)):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        layer, x = SortingNetwork(size), rows(3, size).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output(layer, x)
        depth = 21
        assert sum(kept.values()) < 8 * 3 * size * depth * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "positive int"),
        ({"size": 2.5}, "positive int"),
        ({"size": 4, "network": "quick"}, "'bitonic', 'odd_even'"),
        ({"size": 4, "distribution": "normal"}, "'cauchy'"),
        ({"size": 4, "steepness": 0.0}, "steepness must be positive"),
        ({"size": 4, "steepness": float("nan")}, "steepness must be positive"),
        ({"size": 4, "distribution": "logistic_phi", "art_lambda": 1.0}, "art_lambda"),
    ],
)
def test_options_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SortingNetwork(**arguments)


def test_inputs_that_do_not_fit() -> None:
    layer = SortingNetwork(4)
    with pytest.raises(ShapeError, match=r"floating tensor, got torch\.int64"):
        layer(torch.arange(4))
    with pytest.raises(ShapeError, match=r"\(\*batch, 4\), got \(2, 5\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match="payload must have the shape"):
        layer(torch.zeros(2, 4), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"dtype torch.float32 of x, got \(2, 4\) of torch.float64"):
        layer(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float64))


def test_shows_its_options_and_copies() -> None:
    layer = SortingNetwork(5, "odd_even", "logistic_phi", steepness=3, descending=True)
    assert repr(layer) == (
        "SortingNetwork(5, network='odd_even', distribution='logistic_phi', steepness=3, art_lambda=0.25, descending=True)"
    )
    x = rows(2, 5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not layer.state_dict()
