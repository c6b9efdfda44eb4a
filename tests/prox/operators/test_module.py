"""``Prox``: names, functions, buffers, learned parameters that stay positive, and the calling convention of priors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from difflayers.convex.projections import projection_simplex
from difflayers.prox import operators
from difflayers.prox.operators import Prox, prox_indicator, soft_threshold
from tests.prox.operators.problems import points

EXAMPLES: dict[str, dict[str, object]] = {
    "firm_threshold": {"lam": 0.3, "mu": torch.tensor(1.2)},
    "hard_threshold": {"lam": 0.5},
    "prox_elastic_net": {"lam1": 0.3, "lam2": 0.2},
    "prox_group_lasso": {"lam": 0.5, "groups": torch.tensor([0, 1, 0, 1]), "weights": torch.tensor([1.0, 0.5])},
    "prox_group_sparse": {"lam": 0.5, "k": 2},
    "prox_huber": {"lam": 0.5, "delta": 0.4},
    "prox_l0": {"lam": 0.4},
    "prox_l2": {"lam": 0.4},
    "prox_linf": {"lam": 0.4},
    "prox_log": {"lam": 0.4, "epsilon": 0.5},
    "prox_lp": {"lam": 0.4, "p": 0.5},
    "prox_nuclear": {"lam": 0.4},
    "prox_squared_l2": {"lam": 0.4},
    "prox_tv1d": {"lam": 0.4},
    "prox_tv2d": {"lam": 0.4},
    "soft_threshold": {"lam": torch.full((4,), 0.4)},
    "top_k_abs": {"k": 2},
}
OTHERS = {
    "Prox",
    "TotalVariationSolution",
    "group_sparse_envelope",
    "moreau_envelope",
    "prox_affine",
    "prox_conjugate",
    "prox_indicator",
    "solve_tv2d",
}


def test_every_operator_has_an_example() -> None:
    assert set(operators.__all__) - OTHERS <= set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(set(operators.__all__) - OTHERS))
def test_is_the_function(name: str) -> None:
    module, x = Prox(name, **EXAMPLES[name]), points(3, 4).float()
    function = getattr(operators, name)
    by_function = Prox(function, **EXAMPLES[name])
    assert torch.equal(module(x), by_function(x))
    assert repr(module) == repr(by_function)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    # γ multiplies the penalty.
    options = {key: value for key, value in EXAMPLES[name].items() if not key.startswith("lam")}
    power = 0.5 if name == "hard_threshold" else 1.0
    scaled = {key: value * 0.7**power for key, value in EXAMPLES[name].items() if key.startswith("lam")}
    torch.testing.assert_close(module.prox(x, None, gamma=0.7), function(x, **options, **scaled))
    torch.testing.assert_close(module.prox(x, gamma=torch.tensor(0.7)), module.prox(x, gamma=0.7))


def test_learned_parameters_stay_positive() -> None:
    prox = Prox("elastic_net", learn=("lam1", "lam2"), lam1=0.3, lam2=torch.tensor([1e-6, 1.0, 40.0]))
    torch.testing.assert_close(prox.lam1, torch.tensor(0.3))
    torch.testing.assert_close(prox.lam2, torch.tensor([1e-6, 1.0, 40.0]))
    optimizer = torch.optim.SGD(prox.parameters(), lr=1e3)
    for _ in range(5):
        optimizer.zero_grad()
        (prox.lam1 + prox.lam2.sum()).backward()
        optimizer.step()
    prox(torch.ones(3))
    assert float(prox.lam1.detach()) >= 0
    assert set(prox.state_dict()) == {"raw_lam1", "raw_lam2"}


def test_a_weight_is_learned_in_a_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Identity(), Prox("soft_threshold", learn="lam", lam=0.1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    x = torch.randn(200, 5)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (network(x) - soft_threshold(x, 0.8)).square().mean()
        loss.backward()
        optimizer.step()
    assert abs(float(network[1].lam.detach()) - 0.8) < 1e-3


def test_buffers_parameters_and_numbers() -> None:
    weight = nn.Parameter(torch.tensor(0.2))
    module = Prox("firm_threshold", lam=weight, mu=torch.tensor(2.0))
    assert module.lam is weight
    assert set(module.state_dict()) == {"lam", "mu"}
    assert repr(module) == "Prox('firm_threshold', lam: (), mu: ())"
    assert repr(Prox("l2", lam=0.5)) == "Prox('prox_l2', lam=0.5)"
    assert repr(Prox("l2", learn="lam", lam=torch.ones(3))) == "Prox('prox_l2', lam: (3,) learned)"


def test_functions_of_ones_own() -> None:
    x = points(4)
    shrink = Prox(lambda x, strength: x / (1 + strength), strength=0.5)
    torch.testing.assert_close(shrink(x), x / 1.5)
    with pytest.raises(ValueError, match="which of strength multiplies"):
        shrink.prox(x, gamma=2.0)
    named = Prox(lambda x, strength: x / (1 + strength), scaled=("strength",), strength=0.5)
    torch.testing.assert_close(named.prox(x, gamma=2.0), x / 2)
    simplex = Prox(prox_indicator(projection_simplex))
    assert torch.equal(simplex.prox(x, gamma=3.0), projection_simplex(x))


def test_as_a_prior_is_called() -> None:
    # The convention of deepinv's plug-and-play iterations: prior.prox(x, sigma, gamma=stepsize).
    def proximal_gradient(y: Tensor, prior: Prox) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(60):
            x = prior.prox(x - 0.5 * (x - y), 0.1, gamma=0.5)
        return x

    y = points(2, 4)
    torch.testing.assert_close(proximal_gradient(y, Prox("soft_threshold", lam=0.3)), soft_threshold(y, 0.3))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'cube' is not known"):
        Prox("cube")
    with pytest.raises(ValueError, match="missing: lam"):
        Prox("l2", learn="lam")
    with pytest.raises(ValueError, match="must begin as one"):
        Prox("l2", learn="lam", lam=0.0)
    with pytest.raises(AttributeError, match="nothing"):
        Prox("l2", lam=1.0).nothing  # noqa: B018
