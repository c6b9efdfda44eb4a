"""The loss along the line, and BatchNorm statistics measured anew."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from difflayers.errors import ShapeError
from difflayers.rebasin import LossCurve, barrier, interpolate, loss_curve, repair_batchnorm


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def network(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()


def other(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}


def test_the_barrier_of_a_known_loss() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    a, b = {"weight": torch.tensor([[0.0]]).double()}, {"weight": torch.tensor([[2.0]]).double()}
    # L = w(3 − w) on [0, 2]: above its chord by (1 − (λ − ½)²·4)... at most 1, where w = 1.
    curve = loss_curve(model, a, b, lambda model: (model.weight * (3 - model.weight)).sum(), 5)
    torch.testing.assert_close(curve.lambdas, torch.linspace(0, 1, 5).double())
    torch.testing.assert_close(curve.losses, torch.tensor([0, 1.25, 2.0, 2.25, 2.0]).double())
    assert curve.barrier == pytest.approx(1.0)
    assert barrier(model, a, b, lambda model: float((model.weight * (3 - model.weight)).sum()), 5) == curve.barrier
    # A convex loss has none, and the number is not negative.
    assert barrier(model, a, b, lambda model: model.weight.square().sum()) == 0
    assert math.isnan(LossCurve(torch.tensor([0, 0.5, 1.0]), torch.tensor([0, torch.nan, 0])).barrier)


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model[2].eval()
    before, modes, own = state(model), [module.training for module in model.modules()], model.state_dict()
    seen: list[bool] = []

    def loss(model: nn.Module) -> Tensor:
        seen.append(model.training)
        assert not torch.is_grad_enabled()
        value = model(torch.randn(8, 3).double()).sum()  # in training mode: running statistics change
        model.eval()
        return value

    curve = loss_curve(model, own, other(model), loss, 3)  # `own` shares the memory of the model
    assert seen == [True, False, False]
    assert curve.losses.isfinite().all()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes

    def failing(model: nn.Module) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        loss_curve(model, own, other(model), failing)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_weights_alone_leave_buffers() -> None:
    model = network()
    model[1].running_mean.fill_(3.0)
    a = dict(model.named_parameters())
    means: list[Tensor] = []
    loss_curve(
        model, a, {name: 2 * tensor for name, tensor in a.items()}, lambda model: means.append(model[1].running_mean.clone()) or 0, 2
    )
    assert all((mean == 3).all() for mean in means)


def test_interpolate() -> None:
    model = network()
    a, b = model.state_dict(), other(model)
    for lam, end in ((0.0, a), (1.0, b)):
        for name, tensor in interpolate(a, b, lam).items():
            torch.testing.assert_close(tensor, end[name], rtol=0, atol=0)
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b, lam: interpolate({"w": a}, {"w": b}, lam)["w"], (a, b, lam))


def test_repair_measures_the_statistics() -> None:
    torch.manual_seed(0)
    model = network()
    model[1].momentum = 0.25
    model[1].train()
    model[2].train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    batches = [3 + 2 * torch.randn(32, 3).double() for _ in range(4)]
    model[1].running_mean.fill_(torch.nan)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    repair_batchnorm(model, [(batch, "label") for batch in batches])
    hidden = torch.stack([model[0](batch) for batch in batches]).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0))
    assert model[1].momentum == 0.25
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
        assert tensor.grad is None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_repair_of_any_dimension(dims: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    # The second BatchNorm must see what the first one gives with the statistics of the batch, not with stale ones.
    model = nn.Sequential(convolution(2, 3, 1), norm(3, affine=False), nn.ReLU(), convolution(3, 2, 1), norm(2)).eval()
    model[1].running_mean.fill_(100.0)
    x = torch.randn(200, 2, *(3,) * dims)
    repair_batchnorm(model, [x])
    axes = (0, *range(2, dims + 2))
    out = model(x).detach()
    torch.testing.assert_close(out.mean(axes), torch.zeros(2), rtol=0, atol=0.01)
    torch.testing.assert_close(out.var(axes, correction=0), torch.ones(2), rtol=0.03, atol=0)


def test_repair_along_the_line() -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 3).double()
    model = network().eval()
    repair_batchnorm(model, [x])
    a = state(model)
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        flipped[0].weight.neg_()
        flipped[0].bias.neg_()
    repair_batchnorm(flipped, [x])

    def variance(model: nn.Module) -> Tensor:
        model.eval()
        return model[1](model[0](x)).var(0, correction=0).mean()

    # Units that point in opposite ways cancel: at λ = ¼ half of their standard deviation is left, and only repair sees it.
    naive = loss_curve(model, a, flipped.state_dict(), variance, 5)
    mended = loss_curve(model, a, flipped.state_dict(), variance, 5, repair=[x])
    assert naive.losses[1] < 0.3
    torch.testing.assert_close(mended.losses[[0, 1, 3, 4]], torch.ones(4).double(), rtol=0.05, atol=0)


def test_errors() -> None:
    model = network()
    a = state(model)
    with pytest.raises(ShapeError, match=r"only one of them has 3\.bias"):
        interpolate(a, {name: tensor for name, tensor in a.items() if name != "3.bias"}, 0.5)
    with pytest.raises(ShapeError, match=r"0\.bias has the shape \(4,\) in one network and \(5,\)"):
        interpolate(a, {**a, "0.bias": torch.zeros(5)}, 0.5)
    with pytest.raises(ShapeError, match="no weight or buffer 'w'"):
        barrier(model, {"w": torch.zeros(2)}, {"w": torch.zeros(2)}, lambda model: 0)
    with pytest.raises(ShapeError, match=r"0\.bias has the shape \(4,\) in the model"):
        barrier(model, {"0.bias": torch.zeros(2)}, {"0.bias": torch.zeros(2)}, lambda model: 0)
    with pytest.raises(ValueError, match="points must be 2 or more"):
        barrier(model, a, a, lambda model: 0, 1)
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        repair_batchnorm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), [torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="no batch"):
        repair_batchnorm(model, [])
    # An iterator is read once: the second point of the line finds it empty.
    with pytest.raises(ValueError, match="no batch"):
        barrier(model, a, a, lambda model: 0, repair=iter([torch.randn(4, 3).double()]))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, a[name], rtol=0, atol=0)
    assert model[1].momentum == 0.1
