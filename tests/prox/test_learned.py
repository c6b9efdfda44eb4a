"""Learned proximal networks: proximal operators after any training, with an inverse, a prior, and every step size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap

from difflayers.errors import NotConvergedError, SolveError
from difflayers.prox import (
    ConvolutionalInputConvexNN,
    InputConvexNN,
    LearnedProximalNetwork,
    NonexpansiveProximalNetwork,
    ProximalMatchingLoss,
)
from difflayers.prox.proximal_network import ProximalNetwork


def points(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(network: ProximalNetwork, shape: tuple[int, ...], *, steps: int = 60, lr: float = 0.03) -> ProximalNetwork:
    """A short training with large steps, on whatever: what is tested must hold after any."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    loss = ProximalMatchingLoss(2.0)
    for _ in range(steps):
        clean = torch.sign(torch.randn(32, *shape, generator=generator, dtype=torch.float64))
        noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss(network(noisy), clean).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> LearnedProximalNetwork:
    torch.manual_seed(0)
    return trained(LearnedProximalNetwork(InputConvexNN(8, hidden=32, layers=3), 0.05).double(), (8,))


@pytest.fixture(scope="module")
def firm() -> NonexpansiveProximalNetwork:
    torch.manual_seed(0)
    return trained(NonexpansiveProximalNetwork(InputConvexNN(3, hidden=16, layers=2)).double(), (3,), steps=15)


@pytest.mark.parametrize("images", [False, True])
def test_the_jacobian_is_symmetric_with_the_modulus(network: LearnedProximalNetwork, images: bool) -> None:
    shape = (1, 5, 6) if images else (8,)
    if images:
        torch.manual_seed(0)
        network = trained(LearnedProximalNetwork(ConvolutionalInputConvexNN(1, 6, (1, 2), center=0.0), 0.05).double(), shape, steps=20)
    n = torch.Size(shape).numel()
    jacobian = vmap(jacrev(network))(points(10, *shape)).reshape(10, n, n)
    assert (jacobian - jacobian.mT).abs().max() <= 1e-12 * jacobian.abs().max()
    assert torch.linalg.eigvalsh(jacobian).min() >= network.strong_convexity - 1e-12


def test_64_points_are_inverted_at_once(network: LearnedProximalNetwork) -> None:
    y = points(64, 8, scale=2.0)
    x = network(y)
    assert (network(network.inverse(x)) - x).norm(dim=-1).max() <= 1e-8
    torch.testing.assert_close(network.inverse(x), y, rtol=1e-8, atol=1e-8)
    far = points(64, 8, scale=30.0)
    assert (network(network.inverse(far)) - far).norm(dim=-1).max() <= 1e-8


def test_images_of_other_sizes_are_inverted() -> None:
    torch.manual_seed(0)
    network = LearnedProximalNetwork(ConvolutionalInputConvexNN(1, 6, (1, 2), padding_mode="reflect"), 0.1).double()
    for size in ((4, 5), (9, 7)):
        y = torch.rand(3, 1, *size, dtype=torch.float64)
        torch.testing.assert_close(network.inverse(network(y)), y, rtol=1e-8, atol=1e-8)
        assert network.prior(y).shape == (3,)


def test_the_prior_is_that_of_the_operator(network: LearnedProximalNetwork) -> None:
    """f(y) is the minimum of R(u) + ½‖u − y‖², and ∇R = y − x."""
    y = points(6, 8)
    x = network(y).requires_grad_()
    least = network.prior(x) + (x - y).square().sum(-1) / 2
    for seed in range(5):
        other = x.detach() + points(6, 8, seed=seed, scale=0.3)
        assert (network.prior(other) + (other - y).square().sum(-1) / 2 >= least.detach() - 1e-10).all()
    torch.testing.assert_close(torch.autograd.grad(least.sum(), x)[0], torch.zeros_like(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.2])
def test_the_proximal_operator_of_every_step(network: LearnedProximalNetwork, gamma: float) -> None:
    x = points(6, 8)
    u = network.prox(x, "a noise level", gamma=gamma)
    torch.testing.assert_close(gamma * (network.inverse(u) - u) + u, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(network.prox(x, gamma=torch.full((6,), gamma, dtype=torch.float64)), u)


def test_a_step_of_each_point(network: LearnedProximalNetwork) -> None:
    x, gamma = points(3, 8), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    u = network.prox(x, gamma=gamma)
    for i in range(3):
        torch.testing.assert_close(u[i], network.prox(x[i], gamma=gamma[i].item()))
    assert gradcheck(lambda gamma: network.prox(x, gamma=gamma), (gamma,))
    assert network.prox(x[0], gamma=gamma).shape == (3, 8)


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_steps_that_make_no_sense(network: LearnedProximalNetwork, firm: NonexpansiveProximalNetwork, gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        network.prox(points(2, 8), gamma=gamma)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        firm.prox(points(2, 3), gamma=gamma)
    with pytest.raises(NotConvergedError):
        network.prox(points(2, 8), gamma=torch.tensor([0.5, gamma], dtype=torch.float64))


@pytest.mark.parametrize("method", ["inverse", "prior"])
def test_implicit_gradients_in_the_weights(method: str) -> None:
    torch.manual_seed(0)
    network = LearnedProximalNetwork(InputConvexNN(3, hidden=4, layers=2), 0.1).double()
    x = points(5, 3)
    weights = points(*getattr(network, method)(x).shape, seed=3)

    def loss() -> Tensor:
        return (weights * getattr(network, method)(x)).sum()

    for parameter in network.parameters():
        (slope,) = torch.autograd.grad(loss(), parameter)
        direction = points(*parameter.shape, seed=4)
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter += step * direction
                values.append(loss())
            parameter += 1e-6 * direction
        numeric = (values[0] - values[1]) / 2e-6
        assert abs((slope * direction).sum() - numeric) <= 1e-7 * (1 + numeric.abs())


def test_derivatives_of_the_prior_in_the_point() -> None:
    torch.manual_seed(0)
    network = LearnedProximalNetwork(InputConvexNN(2, hidden=4, layers=2), 0.2).double()
    x = points(2, 2).requires_grad_()
    assert gradcheck(network.prior, (x,))
    assert gradgradcheck(network.prior, (x,))


def test_forward_makes_no_graph_and_leaves_the_input_alone(network: LearnedProximalNetwork) -> None:
    y = points(2, 8)
    before = y.clone()
    with torch.no_grad():
        assert network(y).grad_fn is None
        assert network.inverse(y).grad_fn is None
        assert network.prior(y).grad_fn is None
    assert torch.equal(y, before)
    assert not y.requires_grad


def test_any_convex_module_is_a_potential() -> None:
    class LogCosh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logaddexp(x, -x).sum(-1)

    network = LearnedProximalNetwork(LogCosh(), strong_convexity=0.5)
    y = points(4, 3)
    x = network(y)
    torch.testing.assert_close(x, torch.tanh(y) + 0.5 * y)
    torch.testing.assert_close(network.inverse(x), y)
    with torch.no_grad():
        assert network(y).grad_fn is None


def test_without_strong_convexity_what_has_no_inverse_says_so_and_alone() -> None:
    torch.manual_seed(0)
    network = LearnedProximalNetwork(InputConvexNN(2, hidden=4, layers=1, power=1), 0.0, on_failure="nan").double()
    inside = network(points(1, 2))
    batch = torch.cat([inside, torch.full((1, 2), 1e3, dtype=torch.float64)]).requires_grad_()
    y = network.inverse(batch)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[0], points(1, 2)[0], rtol=1e-6, atol=1e-6)
    value = network.prior(batch)
    assert value[1].isnan()
    (slope,) = torch.autograd.grad(value[0], batch)
    assert torch.isfinite(slope).all()
    network.on_failure = "raise"
    with pytest.raises(SolveError):
        network.inverse(batch)
    with pytest.raises(ValueError, match="must not be negative"):
        LearnedProximalNetwork(InputConvexNN(2), -0.1)


def test_the_nonexpansive_network_is_firmly_nonexpansive(firm: NonexpansiveProximalNetwork) -> None:
    x, y = points(2, 40, 3, scale=2.0)
    step = firm(x) - firm(y)
    assert (step.square().sum(-1) <= (step * (x - y)).sum(-1) + 1e-10).all()
    torch.testing.assert_close(firm.inverse(firm(x)), x)
    jacobian = vmap(jacrev(firm))(points(3, 3))
    assert (jacobian - jacobian.mT).abs().max() <= 1e-10
    assert torch.linalg.eigvalsh(jacobian).max() <= 1 + 1e-10


def test_the_nonexpansive_network_is_the_gradient_of_its_potential(firm: NonexpansiveProximalNetwork) -> None:
    x = points(4, 3).requires_grad_()
    (slope,) = torch.autograd.grad(firm.potential(x).sum(), x)
    torch.testing.assert_close(slope, firm(x).detach())
    for gamma in (0.0, 0.5, 3.0):
        u = firm.prox(x.detach(), gamma=gamma).requires_grad_()
        (pull,) = torch.autograd.grad(firm.prior(u).sum(), u)
        torch.testing.assert_close(u + gamma * pull, x)


def test_float32_and_no_points() -> None:
    torch.manual_seed(0)
    network = LearnedProximalNetwork(InputConvexNN(3), 0.1)
    y = points(5, 3).float()
    x = network(y)
    assert x.dtype == network.inverse(x).dtype == network.prior(x).dtype == torch.float32
    torch.testing.assert_close(network.inverse(x), y, rtol=1e-4, atol=1e-4)
    assert network.inverse(x[:0]).shape == (0, 3)
    assert network.prior(x[:0]).shape == (0,)
