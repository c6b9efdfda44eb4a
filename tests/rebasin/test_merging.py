"""Merging several networks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from difflayers.errors import ConvergenceWarning, ShapeError
from difflayers.rebasin import PermutationSpec, merge_models, weight_matching

from .test_matching import distance, noisy
from .weights import attention, convolutional, mlp, residual


def spread(spec: PermutationSpec, networks: list[dict[str, Tensor]], permutations: list[dict[str, Tensor]]) -> float:
    placed = [spec.apply(params, each) for params, each in zip(networks, permutations, strict=True)]
    return sum(distance(a, b) for a, b in itertools.combinations(placed, 2))


@pytest.mark.parametrize("architecture", [mlp, residual, convolutional, attention])
def test_renamed_copies_merge_into_the_first(architecture) -> None:
    spec, a = architecture()
    generator = torch.Generator().manual_seed(0)
    renamings = [spec.random(generator=generator) for _ in range(4)]
    networks = [spec.apply(a, each) for each in renamings]
    merged = merge_models(spec, networks)
    for name, tensor in merged.params.items():
        torch.testing.assert_close(tensor, networks[0][name], rtol=1e-12, atol=1e-12)
    for params, each in zip(networks, merged.permutations, strict=True):
        assert all(torch.equal(tensor, networks[0][name]) for name, tensor in spec.apply(params, each).items())
    assert all(torch.equal(merged.permutations[0][group], stays) for group, stays in spec.identity().items())


def test_the_mean_is_nearer_than_any_of_them() -> None:
    # Noise of several networks averages out: the merged one is near the network they all come from.
    spec, a = mlp()
    generator = torch.Generator().manual_seed(0)
    renamings = [spec.identity(), *(spec.random(generator=generator) for _ in range(4))]
    networks = [noisy(spec.apply(a, each), 0.3, seed) for seed, each in enumerate(renamings)]
    merged = merge_models(spec, networks, generator=torch.Generator().manual_seed(1))
    assert distance(merged.params, a) < 0.25 * distance(networks[0], a)


def test_nothing_more_to_gain() -> None:
    spec, _ = mlp()
    networks = [mlp(seed=seed)[1] for seed in range(4)]
    merged = merge_models(spec, networks)
    reached = spread(spec, networks, merged.permutations)
    stays = [spec.identity()] * 4
    to_first = [spec.identity(), *(weight_matching(spec, networks[0], network) for network in networks[1:])]
    assert reached < spread(spec, networks, stays)
    assert reached < spread(spec, networks, to_first)
    for i in range(1, 4):
        others = [spec.apply(params, each) for j, (params, each) in enumerate(zip(networks, merged.permutations, strict=True)) if j != i]
        mean = {name: torch.stack([params[name] for params in others]).mean(0) for name in others[0]}
        again = weight_matching(spec, mean, networks[i], init=merged.permutations[i])
        assert all(torch.equal(again[group], permutation) for group, permutation in merged.permutations[i].items())


def test_one_and_two_networks() -> None:
    spec, a = convolutional(seed=0)
    _, b = convolutional(seed=1)
    counter = {"counter": torch.tensor(3)}
    spec = PermutationSpec({**spec.axes, "counter": ()})
    alone = merge_models(spec, [{**a, **counter}])
    assert all(torch.equal(tensor, alone.params[name]) for name, tensor in a.items())
    merged = merge_models(spec, [{**a, **counter}, {**b, "counter": torch.tensor(5)}])
    moved = spec.apply(b, weight_matching(spec, a, b))
    for name, tensor in a.items():
        torch.testing.assert_close(merged.params[name], (tensor + moved[name]) / 2)
    assert merged.params["counter"] == 3


def test_failures() -> None:
    spec, a = mlp()
    with pytest.raises(ShapeError, match="params_list is empty"):
        merge_models(spec, [])
    with pytest.raises(ShapeError, match=r"0\.bias"):
        merge_models(spec, [a, {name: tensor for name, tensor in a.items() if name != "0.bias"}])
    with pytest.warns(ConvergenceWarning, match="merge_models"):
        merge_models(spec, [mlp(seed=seed)[1] for seed in range(4)], max_iter=1)
