"""The proof of a spec put to the test: weights and buffers without symmetries of their own, units renamed at random, outputs compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UnsupportedModuleError

if TYPE_CHECKING:
    from ..spec import PermutationSpec

__all__ = ["Example", "prepared", "verify"]

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def verify(spec: PermutationSpec, model: nn.Module, example_input: Example, *, generator: torch.Generator | None = None) -> None:
    """Check that renaming units does not change the function of a network.

    Args:
        spec: what is to be checked.
        model: the network; it is copied.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
        generator: source of randomness.

    Raises:
        UnsupportedModuleError: the outputs differ; the groups that do it are named.
    """
    model, args, kwargs = prepared(model, example_input)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    state = {name: _generic(value, generator) for name, value in model.state_dict().items()}

    def outputs(params: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = torch.func.functional_call(model, dict(params), args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def differs(permutations: Mapping[str, Tensor]) -> bool:
        pairs = zip(expected, outputs(spec.apply(state, permutations)), strict=True)
        # Rounding grows with the depth of the network; a unit in the wrong place changes the leading digits.
        return any(not torch.allclose(old, new, rtol=1e-7, atol=1e-7 * float(old.abs().max()), equal_nan=True) for old, new in pairs)

    expected = outputs(spec.apply(state, {}))
    permutations = spec.random(generator=generator)
    if differs(permutations):
        guilty = [group for group, permutation in permutations.items() if differs({group: permutation})]
        places = "; ".join(f"{group}: {', '.join(sorted({place.name for place in spec.occurrences(group)}))}" for group in guilty)
        raise UnsupportedModuleError(
            f"renaming units changes the output of {type(model).__name__}. Groups that do: {places or 'only several together'}. "
            "Wrong are the overrides or the axes given by hand, or the network treats some units by their number; hold those with "
            "overrides={...: 'fixed'}"
        )


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
