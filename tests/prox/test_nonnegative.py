"""Layers with nonnegative weights: any parameter gives such a weight, and a weight that is set is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difflayers.prox.nonnegative import NonNegativeConv2d, NonNegativeLinear


@pytest.mark.parametrize("layer", [NonNegativeLinear(4, 3), NonNegativeConv2d(2, 3, 3, stride=2, padding=1)], ids=["linear", "conv"])
def test_the_weight_stays_nonnegative(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        weight: Tensor = layer.weight
        (weight * torch.randn_like(weight)).sum().backward()
        optimizer.step()
        assert (layer.weight >= 0).all()
    assert layer.bias is None


def test_a_weight_can_be_set() -> None:
    layer = NonNegativeLinear(3, 2)
    wanted = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 0.0]])
    layer.weight = wanted
    torch.testing.assert_close(layer.weight, wanted)
    with pytest.raises(ValueError, match="must not be negative, got an entry -1"):
        layer.weight = -torch.ones(2, 3)


def test_a_layer_passes_averages_on() -> None:
    torch.manual_seed(0)
    layer = NonNegativeLinear(200, 500)
    assert layer(torch.ones(200)).mean().item() == pytest.approx(1.0, abs=0.02)
