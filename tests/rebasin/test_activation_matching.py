"""Activation matching: units that answer alike are found, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from difflayers.errors import ShapeError
from difflayers.rebasin import PermutationSpec, activation_matching

from .architectures import ARCHITECTURES


def recovered(found: dict[str, Tensor], permutations: dict[str, Tensor], spec: PermutationSpec) -> bool:
    return all(torch.equal(found[group], back) for group, back in spec.inverse(permutations).items())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_planted_permutation_is_recovered(name: str) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model, batches = architecture.build().double(), [architecture.example() for _ in range(12)]
    batches = [x.double() if x.is_floating_point() else x for x in batches]
    spec = PermutationSpec.from_module(model, batches[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    permutations = spec.random()
    found = activation_matching(spec, model, model.state_dict(), spec.apply(model.state_dict(), permutations), batches)
    assert recovered(found, permutations, spec)


def network() -> tuple[nn.Sequential, PermutationSpec]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    return model.double(), PermutationSpec.from_module(model.double(), torch.randn(4, 3).double())


def test_the_scale_of_a_unit_does_not_matter() -> None:
    # A ReLU unit may be scaled up before and down behind: its weights change, what it says does not.
    model, spec = network()
    scaled = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale = torch.logspace(-2, 2, 8).double()
    scaled["0.weight"] *= scale[:, None]
    scaled["0.bias"] *= scale
    scaled["3.weight"] /= scale
    permutations = spec.random()
    found = activation_matching(spec, model, model.state_dict(), spec.apply(scaled, permutations), [torch.randn(200, 3).double()])
    assert recovered(found, permutations, spec)


def test_against_correlations_by_hand() -> None:
    model, spec = network()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(90, 3).double()
    # In parts, with labels: the same as all at once.
    found = activation_matching(spec, model, model.state_dict(), other.state_dict(), [(part, None) for part in x.split(40)])
    model.eval(), other.eval()
    for group, depth in (("0", 1), ("3", 4)):
        answers = torch.cat([model[:depth](x), other[:depth](x)], 1)
        C = torch.corrcoef(answers.T)[:8, 8:]
        assert torch.equal(found[group], torch.from_numpy(linear_sum_assignment(-C.detach().numpy())[1]))


def test_units_that_never_speak() -> None:
    model, spec = network()
    with torch.no_grad():
        model[0].weight[2:4] = 0.0  # constant: no correlation
    permutations = spec.random()
    found = activation_matching(
        spec, model, model.state_dict(), spec.apply(model.state_dict(), permutations), [torch.randn(50, 3).double()]
    )
    together = spec.compose(permutations, found)["0"]
    assert torch.equal(together[[0, 1, 4, 5, 6, 7]], torch.tensor([0, 1, 4, 5, 6, 7]))
    assert torch.equal(found["3"], spec.inverse(permutations)["3"])


def test_the_model_is_left_as_it_was() -> None:
    model, spec = network()
    model[2].eval()
    modes, before = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    activation_matching(spec, model, model.state_dict(), model.state_dict(), [torch.randn(5, 3).double()])
    with pytest.raises(ValueError, match="no batch"):
        activation_matching(spec, model, model.state_dict(), model.state_dict(), [])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_failures() -> None:
    model, spec = network()
    x = [torch.randn(5, 3).double()]
    with pytest.raises(ValueError, match="an activation is not finite"):
        activation_matching(spec, model, model.state_dict(), model.state_dict(), [x[0] * torch.nan])
    with pytest.raises(ShapeError, match="the spec wants"):
        activation_matching(spec, model, model.state_dict(), {**model.state_dict(), "0.bias": torch.zeros(2)}, x)
