"""Input convex networks: convex whatever is done to their parameters, with a gradient in one pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev, vmap

from difflayers.errors import ShapeError
from difflayers.prox import ConvolutionalInputConvexNN, InputConvexNN

NETWORKS = {
    "dense": (lambda: InputConvexNN(5, hidden=8, layers=3), (5,)),
    "one layer": (lambda: InputConvexNN(5, hidden=7, layers=1, center=0.5), (5,)),
    "published readout": (lambda: InputConvexNN(5, hidden=8, layers=4, power=1), (5,)),
    "images": (lambda: ConvolutionalInputConvexNN(2, hidden=4, strides=(1, 2, 1), kernel_size=3), (2, 5, 6)),
    "wide kernels": (
        lambda: ConvolutionalInputConvexNN(1, hidden=4, strides=(2, 3), kernel_size=(5, 3), padding_mode="reflect"),
        (1, 7, 9),
    ),
    "circular": (lambda: ConvolutionalInputConvexNN(1, hidden=4, padding_mode="circular"), (1, 6, 5)),
    "replicate": (lambda: ConvolutionalInputConvexNN(1, hidden=4, strides=(1, 2), padding_mode="replicate", power=1), (1, 4, 6)),
}


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return make().double(), shape


def points(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gradient_is_that_of_the_potential(case) -> None:
    network, shape = case
    x = points(3, 2, *shape).requires_grad_()
    value = network(x)
    assert value.shape == (3, 2)
    exact, *slopes = torch.autograd.grad(value.sum(), [x, *network.parameters()])
    torch.testing.assert_close(network.gradient(x), exact, rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(slope).all() for slope in slopes)


def test_a_batch_is_a_loop(case) -> None:
    network, shape = case
    x = points(4, *shape)
    torch.testing.assert_close(network.gradient(x), torch.stack([network.gradient(part) for part in x]))
    torch.testing.assert_close(network(x), torch.stack([network(part) for part in x]))
    assert network(x[:0]).shape == (0,)
    assert network.gradient(x[:0]).shape == x[:0].shape


def test_the_jacobian_of_the_gradient_is_symmetric_and_positive(case) -> None:
    network, shape = case
    n = torch.Size(shape).numel()
    for scale in (0.1, 1.0, 10.0):
        hessian = vmap(jacrev(network.gradient))(scale * points(2, *shape)).reshape(2, n, n)
        size = hessian.abs().max()
        assert (hessian - hessian.mT).abs().max() <= 1e-13 * size
        assert torch.linalg.eigvalsh(hessian).min() >= -1e-13 * size


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 30.0))
def test_no_optimizer_step_can_break_convexity(seed: int, size: float) -> None:
    """Parameters are replaced by anything, as a diverging training would."""
    torch.manual_seed(seed)
    network = InputConvexNN(3, hidden=6, layers=3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    left, right = 3 * torch.randn(2, 20, 3, dtype=torch.float64)
    weight = torch.rand(20, 1, dtype=torch.float64)
    between = network(weight * left + (1 - weight) * right)
    chord = weight[:, 0] * network(left) + (1 - weight[:, 0]) * network(right)
    assert (between <= chord + 1e-10 * chord.abs().max()).all()
    monotone = ((network.gradient(left) - network.gradient(right)) * (left - right)).sum(-1)
    assert (monotone >= -1e-10 * monotone.abs().max()).all()


def test_a_network_starts_near_the_identity(case) -> None:
    network, shape = case
    x = network.center + points(50, *shape) / 4
    slope = network.gradient(x)
    projected = ((slope - slope.mean(0)) * (x - x.mean(0))).sum() / (x - x.mean(0)).square().sum()
    assert 0.3 <= projected <= 2.3


def test_no_graph_without_gradients_and_no_change_of_the_input(case) -> None:
    network, shape = case
    x = points(2, *shape)
    before = x.clone()
    with torch.no_grad():
        assert network.gradient(x).grad_fn is None
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_copies(case) -> None:
    network, shape = case
    x = points(2, *shape)
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), fresh):
        assert torch.equal(other(x), network(x))
        assert repr(other) == repr(network)
        assert all(parameter.requires_grad for parameter in other.parameters())
    assert pickle.loads(pickle.dumps(network.eval())).training is False


def test_the_potential_of_a_large_image_is_about_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    network = ConvolutionalInputConvexNN(1, hidden=4, padding_mode="circular").double()
    tile = points(1, 1, 8, 8)
    torch.testing.assert_close(network(tile.tile(1, 1, 2, 3)), 6 * network(tile))
    torch.testing.assert_close(network.gradient(tile.tile(1, 1, 2, 3)), network.gradient(tile).tile(1, 1, 2, 3))
    torch.testing.assert_close(network.gradient(tile.roll(3, -1)), network.gradient(tile).roll(3, -1))


def test_a_flat_image_on_a_torus_has_a_flat_gradient() -> None:
    torch.manual_seed(0)
    network = ConvolutionalInputConvexNN(1, hidden=4, strides=(1, 1), kernel_size=5, padding_mode="circular").double()
    flat = network.gradient(torch.full((1, 1, 8, 9), 0.3, dtype=torch.float64))
    assert (flat - flat.mean()).abs().max() <= 1e-13 * flat.abs().max()


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_are_torchs(mode: str) -> None:
    torch.manual_seed(0)
    network = ConvolutionalInputConvexNN(1, hidden=3, strides=(1,), kernel_size=5, center=0.0, padding_mode=mode).double()
    plain = ConvolutionalInputConvexNN(1, hidden=3, strides=(1,), kernel_size=5, center=0.0).double()
    plain.load_state_dict(network.state_dict())
    x = points(1, 1, 6, 7)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode=mode)
    inside = plain._softplus(torch.nn.functional.conv2d(padded, network.skips[0].weight, network.skips[0].bias))
    torch.testing.assert_close(network._softplus(network._arguments(x)[-1]), inside)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InputConvexNN(0), "must be positive"),
        (lambda: InputConvexNN(3, layers=0), "must be positive"),
        (lambda: InputConvexNN(3, beta=0.0), "beta must be positive"),
        (lambda: InputConvexNN(3, power=3), "power must be 1 or 2"),
        (lambda: ConvolutionalInputConvexNN(1, strides=()), "must be positive"),
        (lambda: ConvolutionalInputConvexNN(1, kernel_size=4), "odd"),
        (lambda: ConvolutionalInputConvexNN(1, kernel_size=(3, 3)), "one for each of the 3 layers"),
        (lambda: ConvolutionalInputConvexNN(1, padding_mode="mirror"), "not known"),
    ],
)
def test_options_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(\*batch, 3\)"):
        InputConvexNN(3)(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\(\*batch, 1, height, width\)"):
        ConvolutionalInputConvexNN(1).gradient(torch.zeros(3, 8, 8))
