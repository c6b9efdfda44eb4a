"""The objectives of Sinkhorn re-basin: values by hand, derivatives by finite differences, BatchNorm at the interpolated point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from difflayers.errors import ShapeError
from difflayers.rebasin import L2Objective, MidpointObjective, PermutationSpec, RandomPointObjective, SinkhornRebasin, l2_distance

AXES = {"0.weight": ("units", None), "1.weight": ("units",), "1.bias": ("units",), "3.weight": (None, "units")}
AXES |= {"1.running_mean": ("units",), "1.running_var": ("units",)}


def network(seed: int) -> nn.Sequential:
    """With BatchNorm, and statistics that are no one's default."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
        nn.init.normal_(tensor)
    return model


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def objectives(target: dict[str, Tensor]) -> dict[str, L2Objective | MidpointObjective]:
    class Fixed(RandomPointObjective):
        """The same λ at each call, as finite differences need."""

        def __call__(self, params: dict[str, Tensor], *batch: Tensor) -> Tensor:
            self.generator = torch.Generator().manual_seed(3)
            return super().__call__(params, *batch)

    return {
        "distance": L2Objective(target),
        "midpoint": MidpointObjective(network(0), target, loss),
        "random": Fixed(network(0), target, loss),
    }


@pytest.mark.parametrize("name", ["distance", "midpoint", "random"])
def test_derivatives_in_the_scores_are_exact(name: str) -> None:
    model, target = network(1), network(2).state_dict()
    rebasin = SinkhornRebasin(model, spec=PermutationSpec.from_axes(model.state_dict(), AXES), epsilon=0.5, tol=1e-13)
    objective = objectives(target)[name]

    def value(scores: Tensor) -> Tensor:
        return objective(functional_call(rebasin, {"scores.3": scores}), X)

    scores = torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert gradcheck(value, scores.requires_grad_())
    assert gradgradcheck(value, scores)
    several = torch.stack([scores, 2 * scores]).detach()
    mapped = vmap(grad(value), randomness="same")(several)
    torch.testing.assert_close(mapped, torch.stack([grad(value)(part) for part in several]))


@pytest.mark.parametrize("name", ["distance", "midpoint", "random"])
def test_both_ends_receive_gradients(name: str) -> None:
    params = {key: tensor.detach().clone() for key, tensor in network(1).state_dict().items()}
    target = {key: tensor.detach().clone() for key, tensor in network(2).state_dict().items()}
    for ends in (params, target):
        ends["0.weight"].requires_grad_()
    objectives(target)[name](params, X).backward()
    assert all(ends["0.weight"].grad.any() for ends in (params, target))


def test_distance_by_hand() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "norm.running_mean": torch.ones(2), "norm.num_batches_tracked": torch.tensor(3)}
    b = {"w": torch.tensor([0.0, 4.0]), "norm.running_mean": torch.zeros(2), "norm.num_batches_tracked": torch.tensor(5)}
    assert l2_distance(a, b) == 5
    assert L2Objective(b)(a, "a batch that does not matter") == 5
    assert l2_distance({name: tensor.double() if name == "w" else tensor for name, tensor in a.items()}, b).dtype == torch.float64


def test_the_middle_uses_the_statistics_of_its_batch_in_either_mode() -> None:
    params, target = network(1).state_dict(), network(2).state_dict()
    middle = {name: (params[name] + target[name]) / 2 for name in params}
    model = network(0)
    reference = network(0)
    reference.load_state_dict({**middle, "1.num_batches_tracked": torch.tensor(0)})
    wanted = loss(reference.train(), X)
    for mode in (True, False):
        objective = MidpointObjective(model.train(mode), target, loss)
        torch.testing.assert_close(objective(params, X), wanted)
        torch.testing.assert_close(objective.at(params, 0.0, X), loss(functional_call_in_train_mode(params), X))
        torch.testing.assert_close(objective.at(params, torch.tensor(1.0), X), loss(functional_call_in_train_mode(target), X))
    # Nothing was changed: neither the model nor the statistics that were passed.
    for name, tensor in network(0).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for name, tensor in network(1).state_dict().items():
        assert torch.equal(params[name], tensor)


def functional_call_in_train_mode(params: dict[str, Tensor]) -> nn.Module:
    model = network(0)
    model.load_state_dict(params)
    return model.train()


def test_other_layers_stay_in_the_mode_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(1.0)).double()
    params = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        objective = MidpointObjective(model.train(mode), params, lambda network, x: network(x).sum())
        assert (objective(params, torch.ones(1, 2, dtype=torch.float64)) == 0) == mode


def test_random_points_are_drawn_anew_and_by_the_generator() -> None:
    model = nn.Linear(1, 1, bias=False)
    zero, one = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}

    def draws(seed: int) -> list[float]:
        objective = RandomPointObjective(model, one, lambda network, x: network(x).sum(), generator=torch.Generator().manual_seed(seed))
        return [float(objective(zero, torch.ones(1, 1))) for _ in range(100)]

    lambdas = torch.tensor(draws(0))
    assert draws(0) == lambdas.tolist() != draws(1)
    assert 0 <= lambdas.min() < 0.1 < 0.4 < lambdas.mean() < 0.6 < 0.9 < lambdas.max() < 1


def test_networks_that_do_not_fit_are_refused() -> None:
    a = {"w": torch.ones(2)}
    with pytest.raises(ShapeError, match="only one of them has v"):
        l2_distance(a, {"v": torch.ones(2)} | a)
    with pytest.raises(ShapeError, match=r"\(2,\) in one network and \(3,\)"):
        l2_distance(a, {"w": torch.ones(3)})
    with pytest.raises(ShapeError, match="bias"):
        MidpointObjective(nn.Linear(1, 1), {"weight": torch.ones(1, 1)}, loss)(nn.Linear(1, 1).state_dict(), X)
