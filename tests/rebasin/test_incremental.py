"""Incremental learning by re-basin: what it returns, what it keeps, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.rebasin import PermutationSpec, incremental_rebasin, interpolate, l2_distance, repair_batchnorm, weight_matching

X = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)
OLD, NEW = X.sin(), (2 * X).cos()  # what the old task and the new one ask for
BATCHES = [(X[::2], NEW[::2]), (X[1::2], NEW[1::2])]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()


def trained(target: Tensor, seed: int, steps: int = 300) -> nn.Sequential:
    model = perceptron(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(X), target).backward()
        optimizer.step()
    return model


def loss_fn(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(network(x), y)


def error(params: dict[str, Tensor], target: Tensor) -> float:
    with torch.no_grad():
        return float(mse_loss(functional_call(perceptron(), params, (X,)), target))


def spec_of(model: nn.Module) -> PermutationSpec:
    return PermutationSpec.from_module(model, X[:3])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def old() -> nn.Sequential:
    return trained(OLD, 0)


def test_the_network_kept_lies_between_the_old_one_renamed_and_the_new_one(old: nn.Sequential) -> None:
    before, start = weights(old), weights(trained(NEW, 1))
    given = copy.deepcopy(start)
    seen: list[tuple[int, float]] = []
    found = incremental_rebasin(
        old,
        loss_fn,
        BATCHES,
        spec=spec_of(old),
        start=start,
        merge=0.3,
        permutation_steps=4,
        weight_steps=3,
        rounds=2,
        callback=lambda step, loss: seen.append((step, loss)),
    )
    assert same(weights(old), before)
    assert same(start, given)
    expected = interpolate(spec_of(old).apply(before, found.permutations), found.endpoint, 0.3)
    assert same(found.params, expected)
    assert seen == list(enumerate(found.losses, 1))
    assert len(seen) == 2 * (4 + 3)
    assert not any(tensor.requires_grad for tensor in (*found.params.values(), *found.endpoint.values()))
    assert all(parameter.grad is None for parameter in trained(NEW, 1, steps=0).parameters())


def test_without_the_line_it_is_plain_training(old: nn.Sequential) -> None:
    found = incremental_rebasin(old, loss_fn, BATCHES, spec=spec_of(old), merge=1.0, line_weight=0.0, weight_steps=7, learning_rate=1e-2)
    model = copy.deepcopy(old)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(7):
        optimizer.zero_grad()
        loss_fn(model, *BATCHES[step % 2]).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.params[name], tensor, rtol=0, atol=1e-12)
    assert same(found.permutations, spec_of(old).identity())


def test_one_step_follows_the_gradient_of_the_objective(old: nn.Sequential) -> None:
    # The first step of Adam is the sign of the gradient.
    start, init, spec = weights(perceptron(3)), spec_of(old).random(generator=generator(0)), spec_of(old)
    found = incremental_rebasin(
        old,
        loss_fn,
        BATCHES,
        spec=spec,
        start=start,
        init=init,
        permutation_steps=0,
        weight_steps=1,
        learning_rate=1e-3,
        point=0.25,
        line_weight=2.0,
        proximity=0.1,
    )
    assert same(found.permutations, init)
    anchor = spec.apply(weights(old), init)
    theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    x, y = BATCHES[0]
    ends = [functional_call(old, params, (x,)) for params in (theta, interpolate(anchor, theta, 0.25))]
    objective = mse_loss(ends[0], y) + 2 * mse_loss(ends[1], y) + 0.1 * l2_distance(theta, anchor)
    assert found.losses == pytest.approx([float(objective.detach())])
    for (name, tensor), gradient in zip(theta.items(), torch.autograd.grad(objective, list(theta.values())), strict=True):
        torch.testing.assert_close(found.endpoint[name], tensor.detach() - 1e-3 * gradient.sign(), rtol=0, atol=1e-6)


def test_a_network_whose_units_have_other_names_is_brought_to_them(old: nn.Sequential) -> None:
    spec = spec_of(old)
    planted = spec.random(generator=generator(1))
    start = spec.apply(weights(old), planted)
    for batches, steps in ((BATCHES, 0), ([(X, OLD)], 20)):  # by the weights alone, and confirmed by the loss of the old task
        found = incremental_rebasin(old, loss_fn, batches, spec=spec, start=start, permutation_steps=steps, weight_steps=0)
        assert same(found.permutations, planted)
        assert same(found.params, start)


def test_permutations_are_learned_from_the_loss_and_never_worse_than_at_the_start(old: nn.Sequential) -> None:
    # A wrong start: the loss in the middle has to put it right.
    spec, new = spec_of(old), trained(NEW, 5)
    start, init = weights(new), spec.random(generator=generator(2))

    def middle(permutations: dict[str, Tensor]) -> float:
        return error(interpolate(spec.apply(weights(old), permutations), start, 0.5), NEW)

    options: dict[str, Any] = {"spec": spec, "start": start, "weight_steps": 0, "permutation_steps": 25}
    learned = incremental_rebasin(old, loss_fn, BATCHES, init=init, **options)
    assert middle(learned.permutations) < 0.5 * middle(init)
    matched = weight_matching(spec, start, weights(old))
    for epsilon in (0.2, 5.0):
        assert middle(incremental_rebasin(old, loss_fn, BATCHES, epsilon=epsilon, **options).permutations) <= middle(matched) + 1e-12
    nearer = incremental_rebasin(old, loss_fn, BATCHES, init=init, line_weight=0.0, proximity=1.0, **options).permutations
    assert l2_distance(spec.apply(weights(old), nearer), start) < l2_distance(spec.apply(weights(old), init), start)


def test_the_line_makes_the_middle_good_and_proximity_remembers(old: nn.Sequential) -> None:
    # The new task is far from the old one: plain training leaves a middle that is good for neither.
    options: dict[str, Any] = {"spec": spec_of(old), "weight_steps": 300, "learning_rate": 1e-2}
    plain = incremental_rebasin(old, loss_fn, BATCHES, line_weight=0.0, **options)
    line = incremental_rebasin(old, loss_fn, BATCHES, **options)
    near = incremental_rebasin(old, loss_fn, BATCHES, proximity=1.0, **options)
    assert error(line.params, NEW) < 0.5 * error(plain.params, NEW)
    assert error(line.endpoint, NEW) < 0.1 * error(plain.params, NEW)
    assert error(near.params, OLD) < 0.5 * min(error(plain.params, OLD), error(line.params, OLD))


def test_a_random_point_is_drawn_from_the_generator(old: nn.Sequential) -> None:
    def losses(seed: int) -> list[float]:
        options: dict[str, Any] = {"spec": spec_of(old), "start": weights(perceptron(1)), "permutation_steps": 3, "weight_steps": 3}
        return incremental_rebasin(old, loss_fn, BATCHES, point="random", generator=generator(seed), **options).losses

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_batches_may_be_bare_tensors_and_the_spec_is_found() -> None:
    model = perceptron().float()
    found = incremental_rebasin(
        model, lambda network, x: network(x).square().mean(), [X.float()], example_input=X[:3].float(), weight_steps=2
    )
    assert all(tensor.dtype == torch.float32 for tensor in found.params.values())


def test_frozen_weights_stay_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight
            self.out = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.first(x).tanh()).tanh())

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(20, 6)
    model.out.requires_grad_(False)
    found = incremental_rebasin(model, loss_fn, [(x, x[:, :1])], example_input=x, weight_steps=5, learning_rate=1e-2)
    assert torch.equal(found.params["first.weight"], found.params["second.weight"])
    assert not torch.equal(found.params["first.weight"], model.first.weight)
    assert torch.equal(found.params["out.weight"], model.out.weight)


def test_a_network_with_batchnorm_is_repaired_afterwards() -> None:
    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()

    model = network(0).eval()
    before = weights(model)
    found = incremental_rebasin(
        model, loss_fn, [(X, NEW)], example_input=X, start=weights(network(1)), permutation_steps=5, weight_steps=300, learning_rate=2e-2
    )
    assert same(weights(model), before)
    model.load_state_dict(found.params)
    repair_batchnorm(model, [X])
    with torch.no_grad():
        assert float(mse_loss(model(X), NEW)) < 0.2 * float(NEW.var())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"merge": 1.5}, ValueError, "merge must be between 0"),
        ({"point": -0.1}, ValueError, "point must be between 0"),
        ({"proximity": -1.0}, ValueError, "proximity must be finite"),
        ({"line_weight": float("nan")}, ValueError, "line_weight must be finite"),
        ({"rounds": -1}, ValueError, "rounds must not be negative"),
        ({"spec": None}, ValueError, "example_input"),
        ({"start": {"0.weight": torch.zeros(8, 1)}}, ShapeError, "only one of them has"),
        ({"start": weights(perceptron(width=4))}, ShapeError, "in start"),
        ({"init": {"nothing": torch.arange(8)}}, ShapeError, "no group"),
        ({"learning_rate": 1e200}, NotConvergedError, "smaller learning_rate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_refuses(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = perceptron()
    given: dict[str, Any] = {"spec": spec_of(model), "weight_steps": 5, **options}
    with pytest.raises(kind, match=message):
        incremental_rebasin(model, loss_fn, BATCHES, **given)


def test_no_batch_is_an_error(old: nn.Sequential) -> None:
    for steps in (0, 3):
        with pytest.raises(ValueError, match="batches gave nothing"):
            incremental_rebasin(old, loss_fn, [], spec=spec_of(old), start=weights(perceptron(1)), permutation_steps=steps, weight_steps=1)
