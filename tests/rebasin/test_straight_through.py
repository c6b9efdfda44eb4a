"""Straight-through matching: never worse than its start, and better where the weights mislead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from difflayers.errors import ShapeError
from difflayers.rebasin import MidpointObjective, PermutationSpec, straight_through_matching, weight_matching


def problem() -> tuple[nn.Module, PermutationSpec, dict[str, Tensor], Tensor, MidpointObjective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(100, 3).double()
    y = model(x).detach()
    a = copy.deepcopy(model.state_dict())
    spec = PermutationSpec.from_module(model, x)
    return model, spec, a, x, MidpointObjective(model, a, lambda network, x: (network(x) - y).square().mean() * (len(x) == 100))


def test_a_planted_permutation_is_recovered() -> None:
    _, spec, a, x, objective = problem()
    permutations = spec.random()
    b = spec.apply(a, permutations)
    found = straight_through_matching(spec, a, b, objective, [(x,)], evaluate=lambda params: objective(params, x), steps=3)
    assert all(torch.equal(found.permutations[group], back) for group, back in spec.inverse(permutations).items())
    assert found.step == 0
    assert found.score == found.start_score < 1e-20
    assert len(found.losses) == 3


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_where_the_weights_mislead(seed: int) -> None:
    # The third input is always zero, and its weights say the contrary of the others': weight matching listens to them.
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    spec = PermutationSpec.from_module(model, torch.randn(2, 3).double())
    x = torch.randn(200, 3).double()
    x[:, 2] = 0
    a, b, y = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict()), model(x).detach()
    a["0.weight"][:, 2] = torch.arange(1, 6) / 2
    b["0.weight"][:, 2] = torch.arange(5, 0, -1) / 2
    objective = MidpointObjective(model, a, lambda network, x: (network(x) - y).square().mean())
    seen: list[tuple[int, float]] = []

    def score(params: dict[str, Tensor]) -> Tensor:
        assert not torch.is_grad_enabled()
        return objective(params, x)

    found = straight_through_matching(
        spec, a, b, objective, [x], evaluate=score, learning_rate=0.03, callback=lambda step, loss: seen.append((step, loss))
    )
    with torch.no_grad():
        assert found.start_score == pytest.approx(float(score(spec.apply(b, weight_matching(spec, a, b)))))
        assert found.score == pytest.approx(float(score(spec.apply(b, found.permutations))))
    assert found.score < 0.6 * found.start_score
    assert seen == [(number + 1, loss) for number, loss in enumerate(found.losses)]
    assert found.losses[0] == pytest.approx(found.start_score)
    # Nothing that was given has changed.
    assert torch.equal(b["0.weight"][:, 2], torch.arange(5, 0, -1).double() / 2)
    assert all(torch.equal(b[name], tensor) for name, tensor in model.state_dict().items() if name != "0.weight")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_any_start() -> None:
    _, spec, a, x, objective = problem()
    start = spec.random(generator=torch.Generator().manual_seed(0))
    found = straight_through_matching(spec, a, a, objective, [(x,)], evaluate=lambda params: objective(params, x), init=start, steps=10)
    assert found.start_score == pytest.approx(float(objective(spec.apply(a, start), x)))
    assert found.score <= found.start_score


def test_buffers_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.hidden = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)
            self.decode = nn.Linear(5, 6, bias=False)
            self.decode.weight = nn.Parameter(torch.randn(6, 5))
            self.again = nn.Linear(5, 6, bias=False)
            self.again.weight = self.decode.weight

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.embed(x)))
            return self.decode(h) + self.again(torch.tanh(self.hidden(h)) + h)

    torch.manual_seed(2)
    model, x = Tied().double(), torch.randn(50, 6).double()
    spec = PermutationSpec.from_module(model, x)
    a, y = copy.deepcopy(model.state_dict()), model(x).detach()
    objective = MidpointObjective(model, a, lambda network: (network(x) - y).square().mean())
    permutations = spec.random()
    found = straight_through_matching(
        spec,
        a,
        spec.apply(a, permutations),
        objective,
        evaluate=objective,
        steps=30,
        init=spec.random(generator=torch.Generator().manual_seed(1)),
    )
    assert found.score <= found.start_score


def test_failures() -> None:
    _, spec, a, x, objective = problem()
    with pytest.raises(ShapeError, match="only one of them has"):
        straight_through_matching(spec, a, {"0.bias": a["0.bias"]}, objective, [x], evaluate=lambda params: 0.0)
    with pytest.raises(ValueError, match="batches gave nothing"):
        straight_through_matching(spec, a, a, objective, [], evaluate=lambda params: 0.0)
    # A score that is not a number is never the best.
    found = straight_through_matching(spec, a, a, objective, [x], evaluate=lambda params: torch.tensor(torch.nan), steps=1)
    assert found.score == float("inf")
