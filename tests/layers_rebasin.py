"""The re-basin layers as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers.rebasin import PermutationSpec, SinkhornRebasin
from tests.layers import Layer, randn
from tests.reference import newton_root

__all__ = ["REBASIN"]

_NETWORK = {
    "0.weight": torch.tensor([[0.3], [-0.8], [0.5]]).double(),
    "0.bias": torch.tensor([0.1, 0.4, -0.2]).double(),
    "2.weight": torch.tensor([[0.7, -0.1, 0.6], [-0.4, 0.9, 0.2], [0.8, 0.3, -0.5]]).double(),
    "2.bias": torch.tensor([0.2, -0.6, 0.3]).double(),
    "4.weight": torch.tensor([[1.0, -0.7, 0.4]]).double(),
    "4.bias": torch.tensor([0.5]).double(),
}
_AXES = {
    "0.weight": ("first", None),
    "0.bias": ("first",),
    "2.weight": ("second", "first"),
    "2.bias": ("second",),
    "4.weight": (None, "second"),
}


def _module(dtype: torch.dtype) -> SinkhornRebasin:
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    model.load_state_dict(_NETWORK)
    spec = PermutationSpec.from_axes(_NETWORK, _AXES)
    return SinkhornRebasin(model, epsilon=0.4, spec=spec, tol=1e-13 if dtype == torch.float64 else None)


# Made once, and here: a module is not converted to another dtype inside a transform.
_MODULES = {dtype: _module(dtype) for dtype in (torch.float32, torch.float64)}


def _flat(permuted: dict[str, Tensor]) -> Tensor:
    # Without the last bias, which no permutation moves.
    return torch.cat([tensor.flatten() for name, tensor in permuted.items() if name != "4.bias"])


def _call(scores: Tensor) -> Tensor:
    """The permuted weights as a function of the scores of both groups, which are one batch inside."""
    return _flat(functional_call(_MODULES[scores.dtype], {"scores.3": scores}))


def _matrix(scores: Tensor) -> Tensor:
    def plan(x: Tensor, scores: Tensor) -> Tensor:
        return torch.exp((scores + x[:3, None] + x[3:]) / 0.4)

    def equations(x: Tensor, scores: Tensor) -> Tensor:
        S = plan(x, scores)
        return torch.cat([S.sum(-1) - 1, (S.sum(-2) - 1)[:-1], x[-1:]])

    return plan(newton_root(equations, scores.new_zeros(6), scores), scores)


def _reference(scores: Tensor) -> Tensor:
    first, second = _matrix(scores[0]), _matrix(scores[1])
    W = _NETWORK
    rest = (second @ W["2.weight"] @ first.mT, second @ W["2.bias"], W["4.weight"] @ second.mT)
    return torch.cat([part.flatten() for part in (first @ W["0.weight"], first @ W["0.bias"], *rest)])


class _Flat(nn.Module):
    """The module with its scores moved by a tensor, and a tensor as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.rebasin = _module(torch.float64)

    def forward(self, moved: Tensor) -> Tensor:
        return _flat(functional_call(self.rebasin, {"scores.3": self.rebasin.scores["3"] + moved})).square()


REBASIN: tuple[Layer, ...] = (
    Layer(
        "SinkhornRebasin",
        _call,
        lambda g: (torch.eye(3, dtype=torch.float64) + randn(g, 2, 3, 3, scale=0.3),),
        leading=False,
        reference=_reference,
        module=_Flat,
        heavy=True,
    ),
)
