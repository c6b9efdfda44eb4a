"""Sinkhorn re-basin: the relaxed permutations, what the module holds, and what training it reaches."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from difflayers import SinkhornRebasin
from difflayers.errors import NotConvergedError, ShapeError
from difflayers.rebasin import L2Objective, MidpointObjective, PermutationSpec, RandomPointObjective, barrier
from difflayers.solution import Status

AXES = {
    "0.weight": ("first", None),
    "0.bias": ("first",),
    "2.weight": ("second", "first"),
    "2.bias": ("second",),
    "4.weight": (None, "second"),
}


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def hand(model: nn.Module) -> PermutationSpec:
    return PermutationSpec.from_axes(model.state_dict(), AXES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relaxed_permutations_are_doubly_stochastic(dtype: torch.dtype) -> None:
    model = perceptron(2, 5, 7, 3).to(dtype)
    rebasin = SinkhornRebasin(model, spec=hand(model), epsilon=0.05)
    with torch.no_grad():
        for scores in rebasin.scores.values():
            scores.add_(torch.randn(scores.shape, generator=generator(0), dtype=dtype))
    found = rebasin.solve()
    assert set(found.matrices) == set(found.status) == {"first", "second"}
    for group, size in {"first": 5, "second": 7}.items():
        S = found.matrices[group]
        assert S.shape == (size, size)
        assert S.dtype == dtype
        tolerance = 1e-8 if dtype == torch.float64 else 1e-5
        for dim in (0, 1):
            torch.testing.assert_close(S.sum(dim), torch.ones(size, dtype=dtype), rtol=0, atol=tolerance)
        assert found.status[group] == Status.SOLVED
        assert found.marginal_error[group] <= tolerance
        assert found.iterations[group] > 0


def test_a_relaxed_permutation_maximizes_scores_and_entropy() -> None:
    # S = exp((X − u ⊕ v)/ε): ε log S − X is a sum of a column and a row.
    model = perceptron(2, 5, 5, 3)
    rebasin = SinkhornRebasin(model, spec=hand(model), epsilon=0.7)
    with torch.no_grad():
        rebasin.scores["5"].normal_(generator=generator(1))
        S = torch.stack([rebasin.solve().matrices[group] for group in ("first", "second")])
    rest = 0.7 * S.log() - rebasin.scores["5"]
    torch.testing.assert_close(rest, rest[:, :1] + rest[:, :, :1] - rest[:, :1, :1], rtol=0, atol=1e-8)


def test_it_starts_near_the_identity_or_the_given_permutations() -> None:
    model = perceptron(2, 16, 9, 3)
    spec, weights = hand(model), model.state_dict()
    near = SinkhornRebasin(model, spec=spec, epsilon=0.1)
    assert all(float(S.detach().diagonal().min()) > 0.99 for S in near.solve().matrices.values())
    init = spec.random(generator=generator(2))
    for start, wanted in (
        (None, spec.identity()),
        (init, init),
        ({"second": init["second"]}, {**spec.identity(), "second": init["second"]}),
    ):
        rebasin = SinkhornRebasin(model, spec=spec, init=start)
        for group, permutation in rebasin.permutations().items():
            assert permutation.dtype == torch.int64
            assert torch.equal(permutation, wanted[group])
        for name, tensor in rebasin.harden().items():
            assert torch.equal(tensor, spec.apply(weights, wanted)[name])


def test_the_hard_limit_is_the_hard_permutation() -> None:
    model = perceptron(2, 8, 8, 3)
    spec = hand(model)
    init = spec.random(generator=generator(3))
    exact = spec.apply(model.state_dict(), init)
    errors = []
    for epsilon in (0.1, 0.05, 0.02, 0.001):
        soft = SinkhornRebasin(model, spec=spec, init=init, epsilon=epsilon)()
        errors.append(max(float((soft[name] - exact[name]).detach().abs().max()) for name in exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_permutations_are_the_nearest_to_the_relaxed_ones() -> None:
    model = perceptron(2, 4, 4, 3)
    rebasin = SinkhornRebasin(model, spec=hand(model), epsilon=0.3)
    with torch.no_grad():
        rebasin.scores["4"].normal_(generator=generator(4))
        relaxed = rebasin.solve().matrices
    every = [
        torch.eye(4, dtype=torch.float64)[list(order)]
        for order in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
        if len(set(order)) == 4
    ]
    for group, S in relaxed.items():
        chosen = torch.eye(4, dtype=torch.float64)[rebasin.permutations()[group]]
        assert float((S - chosen).norm()) <= min(float((S - other).norm()) for other in every) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_permutation_is_found_by_the_distance(dtype: torch.dtype) -> None:
    model = perceptron(3, 10, 8, 2).to(dtype)
    spec = hand(model)
    planted = spec.random(generator=generator(5))
    target = spec.apply(model.state_dict(), planted)
    rebasin = SinkhornRebasin(model, spec=spec)
    objective = L2Objective(target)
    found = rebasin.fit(objective, evaluate=objective, steps=60)
    assert found.score == 0.0 < found.start_score
    assert found.losses[-1] < found.losses[0]
    assert 0 < found.step <= len(found.losses) == 60
    for group, permutation in rebasin.permutations().items():
        assert torch.equal(permutation, planted[group])
        assert torch.equal(permutation, found.permutations[group])
    for name, tensor in rebasin.harden().items():
        assert torch.equal(tensor, target[name])


@pytest.mark.parametrize("objective", ["distance", "midpoint", "random"])
def test_the_result_is_never_worse_than_the_start(objective: str) -> None:
    # The objective pulls to one network, the barrier is measured to another: training makes it worse.
    model, other, wrong = (perceptron(2, 6, 6, 3, seed=seed) for seed in range(3))
    x, y = torch.randn(40, 2, dtype=torch.float64, generator=generator(6)), torch.arange(40) % 3

    def loss(network: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
        return cross_entropy(network(x), y)

    def evaluate(params: dict[str, Tensor]) -> float:
        return barrier(model, params, other.state_dict(), loss, points=7)

    target = wrong.state_dict()
    chosen = {
        "distance": L2Objective(target),
        "midpoint": MidpointObjective(model, target, loss),
        "random": RandomPointObjective(model, target, loss, generator=generator(7)),
    }[objective]
    rebasin = SinkhornRebasin(model, spec=hand(model), epsilon=0.5, init=hand(model).random(generator=generator(8)))
    start = evaluate(rebasin.harden())
    found = rebasin.fit(chosen, [(x[:20], y[:20]), (x[20:], y[20:])], evaluate=evaluate, steps=12, every=2, learning_rate=0.5)
    assert found.start_score == start
    assert found.score <= start
    assert evaluate(rebasin.harden()) == found.score


def test_a_hopeless_evaluation_leaves_the_start() -> None:
    model = perceptron(2, 4, 4, 3)
    spec = hand(model)
    target = spec.apply(model.state_dict(), spec.random(generator=generator(9)))
    scores = iter([1.0, *[math.nan] * 50])
    seen: list[tuple[int, float]] = []
    rebasin = SinkhornRebasin(model, spec=spec, epsilon=0.5)
    found = rebasin.fit(
        L2Objective(target), evaluate=lambda params: next(scores), steps=30, every=5, callback=lambda *news: seen.append(news)
    )
    assert found.score == found.start_score == 1.0
    assert found.step == 0
    assert seen == list(enumerate(found.losses, start=1))
    assert all(torch.equal(permutation, torch.arange(4)) for permutation in rebasin.permutations().values())


def test_a_failure_in_training_leaves_the_best() -> None:
    model = perceptron(2, 4, 4, 3)
    rebasin = SinkhornRebasin(model, spec=hand(model))
    before = copy.deepcopy(rebasin.state_dict())

    def spoiled(params: dict[str, Tensor]) -> Tensor:
        return params["0.weight"].sum() * math.nan

    with pytest.raises(NotConvergedError) as caught:
        rebasin.fit(spoiled, evaluate=lambda params: 0.0)
    assert "first, second" in caught.value.__notes__[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in rebasin.state_dict().items())


def test_failed_groups_are_told_apart() -> None:
    model = perceptron(2, 4, 5, 3)
    rebasin = SinkhornRebasin(model, spec=hand(model), on_failure="nan")
    with torch.no_grad():
        rebasin.scores["5"][0, 1, 2] = torch.nan
    found = rebasin.solve()
    assert found.status["first"] == Status.SOLVED
    assert found.status["second"] == Status.NUMERICAL_ERROR
    permuted = rebasin()
    assert permuted["0.weight"].isfinite().all()
    assert permuted["2.weight"].isnan().all()
    rebasin.on_failure = "raise"
    with pytest.raises(NotConvergedError):
        rebasin()


def test_the_model_is_copied_and_constant() -> None:
    model = perceptron(2, 4, 4, 3)
    rebasin = SinkhornRebasin(model, spec=hand(model))
    assert [name for name, _ in rebasin.named_parameters()] == ["scores.4"]
    before = {name: tensor.clone() for name, tensor in rebasin.harden().items()}
    sum(tensor.sum() for tensor in rebasin().values()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
        rebasin.harden()["4.bias"].zero_()
    for name, tensor in rebasin.harden().items():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad
    model.load_state_dict(rebasin.harden())


def test_weights_are_trained_if_asked() -> None:
    model = perceptron(2, 4, 4, 3)
    model[4].bias.requires_grad_(False)
    rebasin = SinkhornRebasin(model, spec=hand(model), train_weights=True)
    assert {name for name, parameter in rebasin.named_parameters() if parameter.requires_grad} == {
        "scores.4",
        *(f"weights.{name.replace('.', '/')}" for name in AXES),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(rebasin.parameters(), lr=0.1)
    sum(tensor.square().sum() for tensor in rebasin().values()).backward()
    optimizer.step()
    moved = SinkhornRebasin(model, spec=hand(model), train_weights=True)
    moved.load_state_dict(rebasin.state_dict())
    for name, tensor in moved.harden().items():
        assert torch.equal(tensor, before[name]) == (name == "4.bias")
        assert torch.equal(model.state_dict()[name], before[name])


class Tied(nn.Module):
    """Two names of one weight, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("train_weights", [False, True])
def test_tied_weights_stay_tied(train_weights: bool) -> None:
    model = Tied().double()
    both = {"first.weight": ("units", "units"), "second.weight": ("units", "units")}
    spec = PermutationSpec.from_axes(model.state_dict(), both)
    rebasin = SinkhornRebasin(model, spec=spec, epsilon=0.5, train_weights=train_weights)
    permuted = rebasin()
    assert permuted["first.weight"] is permuted["second.weight"]
    assert permuted["count"] == 7
    assert sum(parameter.requires_grad for parameter in rebasin.parameters()) == 1 + train_weights
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator(10))
    target = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    objective = MidpointObjective(model, target, lambda network, x: network(x).square().mean())
    middle = 0.5 * (permuted["first.weight"] + target["first.weight"])
    torch.testing.assert_close(objective(permuted, x), (torch.relu(x @ middle.mT) @ middle.mT).square().mean())
    assert torch.autograd.grad(objective(permuted, x), rebasin.scores["3"])[0].any()


def test_it_is_copied_pickled_and_loaded() -> None:
    model = perceptron(2, 4, 6, 3)
    spec = hand(model)
    rebasin = SinkhornRebasin(model, spec=spec, init=spec.random(generator=generator(11)), epsilon=0.4)
    fresh = SinkhornRebasin(perceptron(2, 4, 6, 3, seed=1), spec=spec, epsilon=0.4)
    fresh.load_state_dict(rebasin.state_dict())
    for other in (fresh, copy.deepcopy(rebasin), pickle.loads(pickle.dumps(rebasin))):
        assert repr(other) == repr(rebasin)
        for name, tensor in rebasin().items():
            assert torch.equal(other()[name], tensor)
    assert rebasin.float()()["0.weight"].dtype == torch.float32
    assert "epsilon=0.4" in repr(rebasin)


def test_a_relaxed_network_computes_and_learns() -> None:
    model = perceptron(2, 5, 5, 3, seed=1)
    rebasin = SinkhornRebasin(model, spec=hand(model), epsilon=1.0)
    x = torch.randn(7, 2, dtype=torch.float64, generator=generator(12))
    (slope,) = torch.autograd.grad(functional_call(model, rebasin(), (x,)).square().sum(), rebasin.scores["5"])
    assert slope.any()
    # Adding a constant to a row or column of scores changes nothing.
    torch.testing.assert_close(slope.sum(-1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(slope.sum(-2), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    model = perceptron(2, 4, 4, 3)
    spec = hand(model)
    with pytest.raises(ValueError, match="example_input"):
        SinkhornRebasin(model)
    with pytest.raises(ValueError, match="no group"):
        SinkhornRebasin(model, spec=PermutationSpec.from_axes(model.state_dict(), {}))
    with pytest.raises(ShapeError, match="hard permutations"):
        SinkhornRebasin(model, spec=spec, init={"first": torch.eye(4)})
    with pytest.raises(ShapeError, match="third"):
        SinkhornRebasin(model, spec=spec, init={"third": torch.arange(4)})
    rebasin = SinkhornRebasin(model, spec=spec)
    with pytest.raises(ValueError, match="gave nothing"):
        rebasin.fit(L2Objective(model.state_dict()), iter([()]), evaluate=lambda params: 0.0, steps=3)
