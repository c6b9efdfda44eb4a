"""``Projection``: names, functions, buffers and parameters, in a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import difflayers
from difflayers.convex import projections
from difflayers.convex.projections import Projection, projection_l2_ball
from difflayers.implicit import conditions, implicit_fixed_point
from tests.convex.projections.checks import rows

ONES = torch.ones(3)
EXAMPLES: dict[str, dict[str, object]] = {
    "affine_set": {"A": ONES.unsqueeze(0), "b": torch.ones(1)},
    "birkhoff": {},
    "box": {"lower": -1.0, "upper": ONES},
    "box_section": {"lower": 0.0, "upper": ONES, "w": ONES, "c": 2.0},
    "exponential_cone": {},
    "halfspace": {"a": ONES, "b": 1.0},
    "hyperplane": {"a": ONES, "b": torch.tensor(1.0)},
    "isotonic": {"increasing": False},
    "l1_ball": {"max_value": 0.5},
    "l1_sphere": {"value": 0.5},
    "l2_ball": {"max_value": torch.tensor(0.5)},
    "l2_sphere": {},
    "linf_ball": {"max_value": 0.5},
    "non_negative": {},
    "polyhedron": {"G": ONES.unsqueeze(0), "h": torch.ones(1)},
    "power_cone": {"alpha": torch.tensor(0.3)},
    "psd_cone": {},
    "second_order_cone": {},
    "simplex": {"value": 2.0},
    "transport": {"a": ONES, "b": ONES, "on_failure": "nan"},
}


def test_every_projection_has_a_name() -> None:
    functions = {name.removeprefix("projection_") for name in projections.__all__ if name.startswith("projection_")}
    assert functions == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_the_function(name: str) -> None:
    module = Projection(name, **EXAMPLES[name])
    x = rows(2, 3, 3, seed=0).float()
    p = module(x)
    assert p.shape == x.shape
    torch.testing.assert_close(module(p), p, rtol=0, atol=1e-5)
    by_function = Projection(getattr(projections, f"projection_{name}"), **EXAMPLES[name])
    assert torch.equal(by_function(x), p)
    assert repr(by_function) == repr(module)
    tensors = {key for key, value in EXAMPLES[name].items() if isinstance(value, Tensor)}
    assert set(module.state_dict()) == tensors


def test_a_learned_radius_in_a_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), Projection("l2_ball", max_value=nn.Parameter(torch.tensor(0.1))))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    target = torch.tensor([[2.0, 0.0, 0.0]])
    for _ in range(50):
        optimizer.zero_grad()
        loss = ((network(torch.ones(1, 2)) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    assert abs(float(network[1].max_value.detach()) - 2) < 0.05


def test_a_function_of_ones_own_and_repr() -> None:
    module = Projection(lambda x, floor: torch.maximum(x, floor), floor=torch.tensor(1.0))
    assert module(torch.tensor([0.0, 2.0])).tolist() == [1.0, 2.0]
    assert repr(Projection("box", lower=-1.0, upper=ONES)) == "Projection('box', lower=-1.0, upper: (3,))"
    assert difflayers.Projection is Projection


def test_as_the_constraint_of_a_fixed_point() -> None:
    step = conditions.projected_gradient(lambda x, target: ((x - target) ** 2).sum() / 2, projection_l2_ball, 0.5)
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    radius = torch.tensor(1.0, dtype=torch.float64)
    found = implicit_fixed_point(step)(torch.zeros(2, dtype=torch.float64), radius, target)
    torch.testing.assert_close(found, target / 5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="simplex"):
        Projection("cube")
    with pytest.raises(ValueError, match="missing: upper"):
        Projection("box", lower=0.0)
