"""A network as it is inferred from and checked: in double precision, and at weights without symmetries of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Example", "first_names", "prepared", "probe"]

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def first_names(model: nn.Module) -> dict[str, str]:
    """Name of a weight or buffer → the first name of the same tensor: tied weights are one under several names.

    Args:
        model: the network.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def probe(
    model: nn.Module, example_input: Example, generator: torch.Generator
) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], list[Tensor]]]:
    """Generic weights, and what the network makes of the example with any weights.

    Args:
        model: the network; it is copied.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
        generator: source of randomness, on the CPU.
    """
    model, args, kwargs = prepared(model, example_input)

    def outputs(params: Mapping[str, Tensor]) -> list[Tensor]:
        # A network that draws random numbers draws the same ones each time.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = torch.func.functional_call(model, dict(params), args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    return {name: _generic(value, generator) for name, value in model.state_dict().items()}, outputs


def prepared(model: nn.Module, example_input: Example) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A copy in double precision and evaluation mode, with its positional and keyword arguments.

    Args:
        model: the network.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
    """
    double = pytree.tree_map_only(Tensor, lambda part: part.detach().double() if part.is_floating_point() else part, example_input)
    model = copy.deepcopy(model).double().eval()
    if isinstance(double, Mapping):
        return model, (), dict(double)
    return model, (double,) if isinstance(double, Tensor) else tuple(double), {}


def _generic(value: Tensor, generator: torch.Generator) -> Tensor:
    """Near the value, and no two entries alike; positive ones stay so."""
    if not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    return value * (1 + 0.3 * noise) + 0.05 * noise
