"""Derivatives of networks in their coordinates: against formulas, finite differences and reverse mode; and in the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, vmap

from difflayers.errors import ShapeError
from difflayers.pde import HardConstraint, coordinate_derivatives, dirichlet, finite_difference


def _network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, outputs)).double()


def _points(*shape: int) -> Tensor:
    return torch.rand(*shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_function_with_known_derivatives() -> None:
    tx = _points(5, 4)
    t, x = tx.unbind(-1)
    d = coordinate_derivatives(lambda p: torch.exp(p[..., 0]) * torch.sin(p[..., 1]), tx, [(), (0,), (1, 1), (1, 0), (1, 1, 1, 0)])
    assert list(d) == [(), (0,), (1, 1), (1, 0), (1, 1, 1, 0)]
    value, slope = torch.exp(t) * torch.sin(x), torch.exp(t) * torch.cos(x)
    for path, exact in zip(d, (value, value, -value, slope, -slope), strict=True):
        torch.testing.assert_close(d[path], exact, rtol=1e-12, atol=1e-12)


def test_names() -> None:
    d = coordinate_derivatives(_network(), _points(4), {"u": (), "u_xx": [1, 1], "again": (1, 1)})
    assert list(d) == ["u", "u_xx", "again"]
    assert d["u_xx"].shape == (4, 3)
    assert torch.equal(d["u_xx"], d["again"])


def test_against_reverse_mode() -> None:
    network, tx = _network(), _points(6)
    d = coordinate_derivatives(network, tx, [(0,), (1,), (0, 1), (1, 1)])
    first = vmap(jacrev(network))(tx)
    second = vmap(jacrev(jacrev(network)))(tx)
    for path, exact in (((0,), first[..., 0]), ((1,), first[..., 1]), ((0, 1), second[..., 0, 1]), ((1, 1), second[..., 1, 1])):
        torch.testing.assert_close(d[path], exact, rtol=1e-10, atol=1e-12)


def test_against_finite_differences_on_a_mesh() -> None:
    network = _network()
    x = torch.linspace(0, 1, 40, dtype=torch.float64)
    mesh = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
    with torch.no_grad():  # where the second derivative of SiLU is not there by itself
        d = coordinate_derivatives(network, mesh, [(), (0, 1)])
        mixed = finite_difference(finite_difference(d[()], x, dim=0, accuracy=6), x, dim=1, accuracy=6)
    torch.testing.assert_close(d[0, 1], mixed, rtol=0, atol=1e-7)
    assert not d[()].requires_grad


@pytest.mark.parametrize("keep", [False, True])
def test_reverse_mode_gives_the_same(keep: bool) -> None:
    network = _network(1)
    function = network if keep else lambda p: network(p).squeeze(-1)
    orders = [(), (0,), (1,), (0, 1), (1, 1), (1, 1, 1)]
    with torch.no_grad():
        plain = coordinate_derivatives(function, _points(6), orders)
        other = coordinate_derivatives(function, _points(6), orders, mode="reverse")
    for path in orders:
        assert plain[path].shape == other[path].shape == ((6, 1) if keep else (6,))
        torch.testing.assert_close(other[path], plain[path], rtol=1e-10, atol=1e-12)
        assert not other[path].requires_grad


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_training_reaches_the_parameters(mode: str) -> None:
    network, tx = _network(1), _points(5)
    parameters = dict(network.named_parameters())
    orders = {"u": (), "u_t": (0,), "u_xx": (1, 1)}

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        d = coordinate_derivatives(lambda p: functional_call(network, named, (p,)), tx, orders, mode=mode)
        return (d["u_t"] + d["u"] * d["u_xx"]).square().mean()

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in parameters.values())
    assert gradcheck(loss, values, fast_mode=True)
    assert gradgradcheck(loss, values, fast_mode=True)
    # The parameters of a module that is simply called are reached, too, by backward as by torch.func.
    d = coordinate_derivatives(network, tx, orders, mode=mode)
    slopes = torch.autograd.grad((d["u_t"] + d["u"] * d["u_xx"]).square().mean(), list(parameters.values()))
    for slope, exact in zip(slopes, grad(loss, tuple(range(len(values))))(*values), strict=True):
        torch.testing.assert_close(slope, exact)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives_in_the_coordinates_go_on(mode: str) -> None:
    network, tx, v = _network(3 if mode == "forward" else 1), _points(4), _points(4)
    third = coordinate_derivatives(network, tx, [(0, 1, 1)], mode=mode)[0, 1, 1]
    t = torch.zeros_like(tx).index_fill(-1, torch.tensor(0), 1)
    _, forward = jvp(lambda p: coordinate_derivatives(network, p, [(1, 1)], mode=mode)[1, 1], (tx,), (t,))
    torch.testing.assert_close(forward, third)
    leaf = tx.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(coordinate_derivatives(network, leaf, [(1, 1)], mode=mode)[1, 1][:, 0].sum(), leaf)
    torch.testing.assert_close(reverse[:, 0], third[:, 0])
    mapped = vmap(lambda p: coordinate_derivatives(network, p, [(0, 1, 1)], mode=mode)[0, 1, 1])(tx)
    torch.testing.assert_close(mapped, third)
    assert gradcheck(lambda p: coordinate_derivatives(network, p, [(0,)], mode=mode)[0,], (v.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_lower_derivatives_come_along(mode: str) -> None:
    calls = 0

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(p).prod(-1)

    coordinate_derivatives(counted, _points(3), [(), (1,), (1, 1), (0,), (1, 0)], mode=mode)
    assert calls == 2, "one pass for (0, 1), with u and u_t, and one for (1, 1), with u_x"


def test_float32_and_no_points() -> None:
    network = _network().float()
    d = coordinate_derivatives(network, _points(4).float(), {"u_x": (1,)})
    assert d["u_x"].dtype == torch.float32
    assert coordinate_derivatives(network, torch.empty(0, 2), {"u_x": (1,)})["u_x"].shape == (0, 3)


def test_refusals() -> None:
    for coordinates in (torch.zeros(3, 2, dtype=torch.int64), torch.tensor(1.0), [0.0, 1.0]):
        with pytest.raises(ShapeError, match="coordinates must be a floating tensor"):
            coordinate_derivatives(torch.sin, coordinates, [(0,)])
    for path in ((2,), (-1,)):
        with pytest.raises(ShapeError, match="the coordinates 0 to 1"):
            coordinate_derivatives(torch.sin, torch.zeros(3, 2), [path])
    with pytest.raises(ShapeError, match=r"one output a point; from \(5, 2\) came \(5, 3\)"):
        coordinate_derivatives(_network(), _points(5), [(0,)], mode="reverse")
    with pytest.raises(ValueError, match="mode must be"):
        coordinate_derivatives(torch.sin, torch.zeros(3, 2), [(0,)], mode="both")


def test_as_features_of_a_hard_constraint() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x = torch.linspace(0, 1, 30, dtype=torch.float64).unsqueeze(-1)
    growth = HardConstraint(
        lambda z, _: z["u_x"] - z["u"] * (1 - z["u"]), features=lambda _, d: d, rows=[dirichlet(0.2, dim=0, weight=10.0)]
    )

    def solution(*parameters: Tensor) -> Tensor:
        named = dict(zip(dict(network.named_parameters()), parameters, strict=True))
        d = coordinate_derivatives(lambda p: functional_call(network, named, (p,)), x, {"u": (), "u_x": (0,)})
        return growth(d["u"], d)

    parameters = tuple(network.parameters())
    exact = 1 / (1 + 4 * torch.exp(-x.squeeze(-1)))
    torch.testing.assert_close(solution(*parameters), exact, rtol=0, atol=1e-3)
    assert gradcheck(solution, parameters, fast_mode=True, eps=1e-5, atol=1e-4)
