"""Convex gradient networks: gradients of their potential, invertible, within their bounds; the deep integral is none of that."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.functional import linear, softplus

from difflayers.errors import NotConvergedError, ShapeError, SolveError
from difflayers.prox import ConvexActivation, ConvexGradientNetwork
from difflayers.solvers import levenberg_marquardt

KINDS = [{"activation": "softmax"}, {"activation": "softmax", "groups": 4}, {"activation": "tanh"}, {"activation": "squareplus", "rank": 2}]


def make(dim: int = 3, hidden: int = 8, *, seed: int = 0, scale: float = 1.0, **options) -> ConvexGradientNetwork:
    """A network in float64 with random parameters; with a scale well away from how it starts."""
    torch.manual_seed(seed)
    network = ConvexGradientNetwork(dim, hidden, **options).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale).add_(scale * 0.3 * torch.randn_like(parameter))
    return network


def points(*shape: int, seed: int = 1, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_is_the_gradient_of_its_potential(options) -> None:
    network, x = make(**options, strong_convexity=0.2), points(20, 3)
    assert network.potential(x).shape == (20,)
    torch.testing.assert_close(network(x), vmap(grad(network.potential))(x), rtol=1e-12, atol=1e-12)
    # Also far out, where exponentials would overflow.
    far = points(20, 3, scale=1e3)
    torch.testing.assert_close(network(far), vmap(grad(network.potential))(far), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(network.potential(far)).all()


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["softmax", "tanh", "squareplus"]),
    st.floats(0.1, 4),
    st.sampled_from([None, 1.0, 2.5]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
)
def test_jacobian_is_symmetric_and_within_its_bounds(dim, groups, size, activation, scale, lipschitz, mu, seed) -> None:
    network = make(
        dim, groups * size, activation=activation, groups=groups, scale=scale, lipschitz=lipschitz, strong_convexity=mu, seed=seed
    )
    jacobian = vmap(jacrev(network))(points(10, dim, seed=seed))
    unit = jacobian.abs().max()
    assert (jacobian - jacobian.mT).abs().max() <= 1e-12 * unit
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    least, largest = network.jacobian_bounds()
    assert least >= mu
    assert eigenvalues.min() >= least - 1e-12 * unit
    assert eigenvalues.max() <= largest + 1e-12 * unit
    if lipschitz is not None:
        assert largest <= lipschitz * (1 + 1e-12)


def test_bounds_are_reached() -> None:
    # One unit, no shift, along the first axis: 4 tanh(2x) + μx has the slope 8 + μ... at zero, and μ far away.
    network = ConvexGradientNetwork(1, 1, activation="tanh", rank=0, strong_convexity=0.25).double()
    with torch.no_grad():
        network.matrix.fill_(2.0)
        network.bias.zero_()
    slope = vmap(jacrev(network))(torch.tensor([[0.0], [50.0]], dtype=torch.float64)).flatten()
    torch.testing.assert_close(slope, torch.tensor([4.25, 0.25], dtype=torch.float64))
    torch.testing.assert_close(torch.stack(network.jacobian_bounds()), torch.tensor([0.25, 4.25], dtype=torch.float64))
    # Two units of a group in softmax are one sigmoid of twice their half difference.
    pair = ConvexGradientNetwork(1, 2, rank=0).double()
    with torch.no_grad():
        pair.matrix.copy_(math.sqrt(0.5) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
        pair.bias.zero_()
    assert pair(torch.tensor([0.7], dtype=torch.float64)).item() == pytest.approx(math.tanh(0.7), rel=1e-14)
    assert pair.jacobian_bounds()[1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("lipschitz", [1.0, 3.0])
def test_no_training_breaks_the_limit(lipschitz: float) -> None:
    network = make(lipschitz=lipschitz, strong_convexity=0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x = points(50, 3)
    for _ in range(20):
        loss = -(network(x) * x).mean()  # wants to be as steep as it can
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    eigenvalues = torch.linalg.eigvalsh(vmap(jacrev(network))(x))
    assert eigenvalues.max() <= lipschitz * (1 + 1e-12)
    assert eigenvalues.min() >= 0.1 - 1e-12
    assert eigenvalues.max() >= 0.9 * lipschitz  # and is

    y = points(50, 3, seed=5)
    if lipschitz == 1.0:
        assert ((network(x) - network(y)).norm(dim=-1) <= (x - y).norm(dim=-1) * (1 + 1e-12)).all()


def test_fits_a_linear_map() -> None:
    A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]], dtype=torch.float64)
    network, x = make(hidden=1), points(40, 3)  # the softmax of one unit is constant: what is left is the quadratic
    found = levenberg_marquardt(lambda parameters: functional_call(network, parameters, x) - x @ A, dict(network.named_parameters()))
    fresh = points(100, 3, seed=9)
    assert (functional_call(network, found.x, fresh) - fresh @ A).abs().max() <= 1e-6


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_inverse(options) -> None:
    network, y = make(**options, strong_convexity=0.05), points(64, 3)
    x = network(y)
    assert (network.inverse(x) - y).abs().max() <= 1e-8
    assert (network(network.inverse(points(64, 3, scale=20.0))) - points(64, 3, scale=20.0)).abs().max() <= 1e-8
    # Batches of any shape, none included, and one loop element by element.
    torch.testing.assert_close(network.inverse(x.reshape(4, 16, 3)).reshape(64, 3), network.inverse(x))
    torch.testing.assert_close(network.inverse(x[0]), y[0])
    assert network.inverse(x[:0]).shape == (0, 3)
    # The inverse's Jacobian is the Jacobian's inverse.
    torch.testing.assert_close(jacrev(network.inverse)(x[0]), torch.linalg.inv(jacrev(network)(y[0])), rtol=1e-9, atol=1e-9)


def test_inverse_in_float32() -> None:
    network = make(strong_convexity=0.2).float()
    y = points(8, 3).float()
    x = network.inverse(network(y))
    assert x.dtype == torch.float32
    assert (x - y).abs().max() < 1e-4


def test_inverse_of_what_is_out_of_range_fails_alone() -> None:
    # tanh without a quadratic part is bounded: only what is near has an inverse.
    network = make(2, 6, activation="tanh", rank=0)
    near = network(points(2, scale=0.3))
    batch = torch.stack([near, torch.full_like(near, 1e3), near])
    with pytest.raises(SolveError) as caught:
        network.inverse(batch)
    assert caught.value.indices == [(1,)]
    network.on_failure = "nan"
    y = network.inverse(batch)
    assert y[1].isnan().all()
    torch.testing.assert_close(network(y[[0, 2]]), batch[[0, 2]])


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_prox_minimizes(gamma: float) -> None:
    network, x = make(strong_convexity=0.1, lipschitz=1.5), points(10, 3)
    u = network.prox(x, gamma=gamma)

    def objective(u: Tensor) -> Tensor:
        return gamma * network.prior(u) + (u - x).square().sum(-1) / 2

    slope = vjp(objective, u)[1](torch.ones(10, dtype=torch.float64))[0]
    assert slope.abs().max() <= 1e-9
    for seed in range(5):
        assert (objective(u + points(10, 3, seed=seed, scale=0.5)) >= objective(u)).all()
    torch.testing.assert_close(network.prox(x, 0.1, gamma=torch.full((10,), gamma, dtype=torch.float64)), u)
    if gamma == 1:
        torch.testing.assert_close(u, network(x))


def test_prox_of_a_nonexpansive_network_for_every_gamma() -> None:
    network, x = make(strong_convexity=0.1, lipschitz=1.0), points(10, 3)
    for gamma in (0.01, 100.0):
        u = network.prox(x, gamma=gamma)
        torch.testing.assert_close(gamma * (network.inverse(u) - u) + u, x, rtol=1e-8, atol=1e-8)
    gamma = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda gamma: network.prox(x[:2], gamma=gamma), (gamma,), check_forward_ad=True)
    assert network.prox(x[0], gamma=gamma.detach()).shape == (2, 3)
    assert copy.deepcopy(network).float().prox(x.float()[:2], gamma=gamma.detach()).dtype == torch.float32


def test_prox_refuses_a_gamma_with_more_than_one_minimum() -> None:
    steep, limited = make(), make(lipschitz=2.0)
    x = points(2, 3)
    for network, gamma in ((steep, 1.5), (limited, 2.0), (limited, -1.0), (limited, math.nan)):
        with pytest.raises(ValueError, match="gamma must be at least 0, and at most"):
            network.prox(x, gamma=gamma)
    with pytest.raises(NotConvergedError) as caught:
        limited.prox(x, gamma=torch.tensor([0.5, 2.5], dtype=torch.float64))
    assert caught.value.indices == [(1,)]


def test_prior() -> None:
    network, x = make(strong_convexity=0.1), points(10, 3)
    y = network.inverse(x)
    torch.testing.assert_close(vmap(grad(network.prior))(x), y - x, rtol=1e-9, atol=1e-9)  # the envelope theorem
    # A nonexpansive g is the proximal operator of a convex function.
    convex = make(strong_convexity=0.1, lipschitz=1.0)
    assert torch.linalg.eigvalsh(vmap(hessian(convex.prior))(x)).min() >= -1e-9


class _Deep(nn.Module):
    """The published form: g(x) = ∫ J_V(tx)ᵀ J_V(tx) x dt, here by forty Gauss–Legendre nodes."""

    def __init__(self, *layers: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        roots = torch.linalg.eigh(self._legendre(40))
        self.nodes, self.weights = (roots.eigenvalues + 1) / 2, roots.eigenvectors[0].square()

    @staticmethod
    def _legendre(count: int) -> Tensor:
        k = torch.arange(1, count, dtype=torch.float64)
        beside = k / (4 * k * k - 1).sqrt()
        return torch.diag(beside, 1) + torch.diag(beside, -1)

    def V(self, x: Tensor) -> Tensor:
        for W, b in self.layers:
            x = torch.sigmoid(linear(x, W, b))
        return x

    def forward(self, x: Tensor) -> Tensor:
        def integrand(t: Tensor) -> Tensor:
            return vjp(self.V, t * x)[1](jvp(self.V, (t * x,), (x,))[1])[0]

        return (self.weights[:, None] * vmap(integrand)(self.nodes)).sum(0)


def _squared_sigmoid() -> ConvexActivation:
    """The activation that makes the published form of one layer: ρ' = σ'², twice integrated by hand, s = σ(z)."""

    def potential(z: Tensor) -> Tensor:
        s = z.sigmoid()
        return ((softplus(z, threshold=1e3) - s + s * s) / 6).sum(-1)

    def gradient(z: Tensor) -> Tensor:
        s = z.sigmoid()
        return s * s / 2 - s**3 / 3

    return ConvexActivation(potential, gradient, 1 / 16)


def test_published_form_of_one_layer_is_this_network() -> None:
    W, b, x = points(6, 4), points(6, seed=2, scale=1.0), points(4, seed=3, scale=1.0)
    network = ConvexGradientNetwork(4, 6, activation=_squared_sigmoid(), rank=0).double()
    with torch.no_grad():
        network.matrix.copy_(W / 4)  # M = √d W
        network.bias.copy_(b)
        network.offset.sub_(network(torch.zeros_like(x)))  # ∫ … x dt is zero at zero
    published = _Deep((W, b))
    torch.testing.assert_close(network(x), published(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad(network.potential)(x), network(x), rtol=1e-12, atol=1e-12)
    J, JV = jacrev(published)(x), jacrev(published.V)(x)
    torch.testing.assert_close(J, JV.mT @ JV, rtol=1e-12, atol=1e-12)


def test_published_form_of_two_layers_is_no_gradient_and_not_monotone() -> None:
    asymmetry, least = 0.0, 0.0
    for seed in range(40):
        W1, b1 = points(5, 3, seed=seed), points(5, seed=100 + seed, scale=1.0)
        W2, b2 = points(5, 5, seed=200 + seed), points(5, seed=300 + seed, scale=1.0)
        J = jacrev(_Deep((W1, b1), (W2, b2)))(points(3, seed=400 + seed, scale=1.0))
        asymmetry = max(asymmetry, float((J - J.mT).norm() / J.norm()))
        least = min(least, float(torch.linalg.eigvalsh((J + J.mT) / 2)[0]))
    assert asymmetry > 0.3
    assert least < -0.01


def test_options_and_shapes() -> None:
    for options in ({"groups": 3}, {"rank": -1}, {"hidden": 0}):
        with pytest.raises(ValueError, match="wanted dim, hidden and groups"):
            ConvexGradientNetwork(3, **{"hidden": 8, **options})
    with pytest.raises(ValueError, match="'relu' is not known; choose one of softmax, tanh, squareplus"):
        ConvexGradientNetwork(3, activation="relu")
    with pytest.raises(ValueError, match="strong_convexity"):
        ConvexGradientNetwork(3, strong_convexity=-1.0)
    with pytest.raises(ValueError, match="larger than strong_convexity=1"):
        ConvexGradientNetwork(3, strong_convexity=1.0, lipschitz=1.0)
    network = make()
    for method in (network, network.potential, network.inverse, network.prox, network.prior):
        with pytest.raises(ShapeError, match=r"\(\*batch, 3\)"):
            method(torch.zeros(2, 4, dtype=torch.float64))
    assert repr(ConvexGradientNetwork(3, 8, groups=2)) == (
        "ConvexGradientNetwork(3, hidden=8, activation='softmax', groups=2, strong_convexity=0, lipschitz=None)"
    )


def test_copies_and_state() -> None:
    network, x = make(lipschitz=1.0), points(5, 3)
    twin = make(seed=7, lipschitz=1.0)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
    assert torch.equal(network(x, 0.1), network(x))
    with torch.no_grad():
        assert network.inverse(x).grad_fn is None
    assert not x.requires_grad
