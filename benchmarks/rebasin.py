"""Re-basin: how long matching takes, whether a planted renaming comes back, and what is left of the barrier between trained networks.

``python -m benchmarks.rebasin``. The published weight matching (Ainsworth et al. 2023) is JAX code with a specification by hand for each
architecture; its algorithm, coordinate descent from the identity with the groups in random order, is what ``init={}`` and a generator
give here. "Recovered" counts how many of the planted renamings of a network at its initialization came back exactly.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import Table, describe_machine, installed, one_thread
from difflayers.rebasin import (
    MidpointObjective,
    PermutationSpec,
    SinkhornRebasin,
    activation_matching,
    loss_curve,
    straight_through_matching,
    weight_matching,
)
from difflayers.rebasin.assignment import assign

Permutations = Mapping[str, Tensor]


def main(*, short: bool = False) -> None:
    """Print the tables."""
    one_thread()
    describe_machine(["scipy"])
    assign(torch.eye(2))  # imports SciPy's assignment
    _planted(short=short)
    if installed("scikit-learn"):
        _digits(short=short)


def _planted(*, short: bool) -> None:
    columns = [("network", 22), ("weights", -9), ("groups", -6), ("spec s", -7)]
    columns += [("ours s", -7), ("recovered", -9), ("published s", -11), ("recovered", -9), ("independent s", -13)]
    table = Table("A planted renaming: processor seconds, and how often it comes back", columns)
    trials = 2 if short else 3
    networks: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "perceptron 64, 64": (lambda: _perceptron(64, 64, 64, 10), torch.randn(2, 64)),
        "perceptron 512 × 3": (lambda: _perceptron(784, 512, 512, 512, 10), torch.randn(2, 784)),
        "transformer 8 × 64": (lambda: _transformer(64, 4, 8), torch.randn(2, 5, 64)),
    }
    if not short:
        networks["transformer 6 × 256"] = (lambda: _transformer(256, 8, 6), torch.randn(2, 5, 256))
        networks["ResNet-18"] = (lambda: _ResNet(64), torch.randn(1, 3, 32, 32))
    for name, (build, x) in networks.items():
        torch.manual_seed(0)
        model = build().eval()
        spec_seconds, spec = _timed(lambda: PermutationSpec.from_module(model, x))  # noqa: B023
        weights = sum(parameter.numel() for parameter in model.parameters())
        times: dict[str, list[float]] = {"ours": [], "published": [], "independent": []}
        recovered = {"ours": 0, "published": 0}
        for trial in range(trials):
            a, other = build().state_dict(), build().state_dict()
            b = spec.apply(a, spec.random(generator=torch.Generator().manual_seed(trial)))
            order = torch.Generator().manual_seed(trial)
            ways = {"ours": lambda: weight_matching(spec, a, b), "published": lambda: weight_matching(spec, a, b, init={}, generator=order)}  # noqa: B023
            for way, run in ways.items():
                seconds, found = _timed(run)
                times[way].append(seconds)
                recovered[way] += all(torch.equal(tensor, a[key]) for key, tensor in spec.apply(b, found).items())
            times["independent"].append(_timed(lambda: weight_matching(spec, a, other))[0])  # noqa: B023
        medians = {way: statistics.median(seconds) for way, seconds in times.items()}
        shares = {way: f"{count} of {trials}" for way, count in recovered.items()}
        ours, published = (medians["ours"], shares["ours"]), (medians["published"], shares["published"])
        table.row(name, f"{weights / 1e6:.2f} M", len(spec.sizes), spec_seconds, *ours, *published, medians["independent"])


def _digits(*, short: bool) -> None:
    columns = [("pair", 6), ("way", 22), ("seconds", -7), ("train barrier", -13), ("test barrier", -12)]
    table = Table("Perceptrons with two hidden layers of 64, trained on scikit-learn's digits", columns)
    train, test = _data()
    networks = [_trained(seed, train, epochs=3 if short else 30) for seed in range(2 if short else 3)]
    steps = 3 if short else 100
    for i, j in [(0, 1)] if short else [(0, 1), (0, 2), (1, 2)]:
        model = networks[i]
        a, b = (copy.deepcopy(networks[k].state_dict()) for k in (i, j))
        spec = PermutationSpec.from_module(model, train[0][:4])

        def barrier(params: Mapping[str, Tensor], part: tuple[Tensor, Tensor] = train, model: nn.Module = model, a: Any = a) -> float:
            return loss_curve(model, a, params, lambda network: _loss(network, *part)).barrier

        def straight_through(
            model: nn.Module = model, spec: PermutationSpec = spec, a: Any = a, b: Any = b, score: Any = barrier
        ) -> Permutations:
            objective = MidpointObjective(model, a, _loss)
            return straight_through_matching(spec, a, b, objective, [train], evaluate=score, steps=steps).permutations

        def sinkhorn(
            j: int = j, model: nn.Module = model, spec: PermutationSpec = spec, a: Any = a, b: Any = b, score: Any = barrier
        ) -> Permutations:
            rebasin = SinkhornRebasin(networks[j], spec=spec, init=weight_matching(spec, a, b))
            return rebasin.fit(MidpointObjective(model, a, _loss), [train], evaluate=score, steps=steps).permutations

        ways: dict[str, Callable[[], Permutations]] = {
            "naive": spec.identity,
            "weight matching": lambda spec=spec, a=a, b=b: weight_matching(spec, a, b),
            "activation matching": lambda spec=spec, model=model, a=a, b=b: activation_matching(spec, model, a, b, [train]),
            "straight-through": straight_through,
            "Sinkhorn re-basin": sinkhorn,
        }
        for way, run in ways.items():
            seconds, found = _timed(run)
            moved = spec.apply(b, found)
            table.row(f"{i}, {j}", way, seconds, barrier(moved), barrier(moved, test))


def _data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(digits.data).float()[order], torch.from_numpy(digits.target)[order]
    x = (x - x[500:].mean()) / x[500:].std()
    return (x[500:], y[500:]), (x[:500], y[:500])


def _trained(seed: int, part: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    network, batches = _perceptron(64, 64, 64, 10), len(part[0]) // 64
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(part[0])).split(64)[:batches]:
            optimizer.zero_grad()
            _loss(network, part[0][chosen], part[1][chosen]).backward()
            optimizer.step()
            schedule.step()
    return network


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(network(x), y)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def _perceptron(*widths: int) -> nn.Module:
    layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _transformer(width: int, heads: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(width, width), nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 10))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        shortcut = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)] if before != after else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class _ResNet(nn.Module):
    """ResNet-18 for small images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = [
            _Block(before if first else after, after, 2 if first and before != after else 1)
            for before, after in itertools.pairwise(widths)
            for first in (True, False)
        ]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8 * width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
