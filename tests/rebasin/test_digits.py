"""Networks trained on real digits from different seeds: how much of the barrier between them alignment takes away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from difflayers.rebasin import MidpointObjective, PermutationSpec, SinkhornRebasin, barrier, weight_matching

pytestmark = pytest.mark.slow

Digits = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    """1,297 digits to learn from, 500 held out."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels, classes = torch.from_numpy(data.data / 16).float()[order].unflatten(1, (1, 8, 8)), torch.from_numpy(data.target)[order]
    return (pixels[500:], classes[500:]), (pixels[:500], classes[:500])


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(network(x), y)


def batches(data: Digits) -> list[Digits]:
    order = torch.randperm(len(data[0]))
    return [(data[0][chosen], data[1][chosen]) for chosen in order.split(64) if len(chosen) == 64]


def trained(network: nn.Module, data: Digits, epochs: int) -> nn.Module:
    """By AdamW with a rising and falling learning rate, as in examples/align_networks.py."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(data[0]) // 64))
    for _ in range(epochs):
        for batch in batches(data):
            optimizer.zero_grad()
            loss(network, *batch).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_perceptrons(digits: tuple[Digits, Digits], seed: int) -> None:
    training, test = digits
    networks = []
    for each in (2 * seed, 2 * seed + 1):
        torch.manual_seed(each)
        layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        networks.append(trained(nn.Sequential(*layers), training, epochs=60))
        assert (networks[-1](test[0]).argmax(-1) == test[1]).float().mean() > 0.96
    a, b = (network.state_dict() for network in networks)

    def height(params: dict[str, Tensor], data: Digits) -> float:
        return barrier(networks[1], a, params, lambda network: loss(network, *data))

    spec = PermutationSpec.from_module(networks[1], test[0][:2])
    matched = weight_matching(spec, a, b)
    rebasin = SinkhornRebasin(networks[1], spec=spec, init=matched)
    found = rebasin.fit(
        MidpointObjective(networks[1], a, loss), batches(training), evaluate=lambda params: height(params, training), steps=100
    )
    aligned = spec.apply(b, matched)
    assert height(b, test) > 0.5
    assert height(aligned, test) <= 0.06
    assert height(rebasin.harden(), test) <= 0.06
    assert height(rebasin.harden(), training) == found.score <= found.start_score == height(aligned, training)
    # The hardened network is the network: it computes what it computed.
    renamed = nn.Sequential(*(type(layer)() if not list(layer.parameters()) else nn.Linear(64, len(layer.bias)) for layer in networks[1]))
    renamed.load_state_dict(rebasin.harden())
    torch.testing.assert_close(renamed(test[0]), networks[1](test[0]), rtol=1e-4, atol=1e-4)


def test_convolutional_networks(digits: tuple[Digits, Digits]) -> None:
    training, test = digits
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        networks.append(trained(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)), training, epochs=10))
        assert (networks[-1](test[0]).argmax(-1) == test[1]).float().mean() > 0.97
    a, b = (network.state_dict() for network in networks)
    loader = [training[0][:648], training[0][648:1296]]

    def height(params: dict[str, Tensor], data: Digits) -> float:
        return barrier(networks[1], a, params, lambda network: loss(network, *data), 11, repair=loader)

    spec = PermutationSpec.from_module(networks[1], test[0][:2])
    matched = weight_matching(spec, a, b)
    rebasin = SinkhornRebasin(networks[1], spec=spec, init=matched)
    found = rebasin.fit(
        MidpointObjective(networks[1], a, loss), batches(training), evaluate=lambda params: height(params, training), steps=60, every=20
    )
    naive = height(b, test)
    assert height(spec.apply(b, matched), test) <= 0.5 * naive
    assert height(rebasin.harden(), test) <= 0.5 * naive
    assert found.score <= found.start_score == height(spec.apply(b, matched), training)
