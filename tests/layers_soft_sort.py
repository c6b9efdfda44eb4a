"""Soft sorting, ranking and choosing as entries of the registry of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers.sorting import soft_argsort, soft_rank, soft_sort, soft_topk
from tests.layers import Function, Inputs, Layer, randn
from tests.sorting.networks import dense_permutation

__all__ = ["SOFT_SORT"]


def _inputs(g: torch.Generator) -> Inputs:
    # In ascending order 1, 2 and 0, 3: with strength 0.7, each pair is one block.
    return torch.tensor([1.0, -1.0, -0.6, 1.3], dtype=torch.float64) + randn(g, 4, scale=0.03), 0.7 + randn(g, scale=0.02).abs()


def _with_strength(function: Function, *before: Any, **options: Any) -> Function:
    def call(x: Tensor, strength: Tensor) -> Tensor:
        return function(x, *before, regularization_strength=strength, **options)

    return call


def _pairs(low: Tensor, high: Tensor) -> Tensor:
    """The places of x of the two blocks."""
    return torch.stack([high[0], low[0], low[1], high[1]])


def _soft_sort(regularization: str) -> Layer:
    def reference(x: Tensor, strength: Tensor) -> Tensor:
        steps = torch.tensor([0.0, 1.0], dtype=x.dtype) / strength

        def block(values: Tensor) -> Tensor:
            if regularization == "l2":
                return values.mean() + steps - steps.mean()
            return -(torch.logsumexp(-values, 0) - steps - torch.logsumexp(-steps, 0))

        return torch.cat([block(x[1:3]), block(x[[0, 3]])])

    call = _with_strength(soft_sort, regularization=regularization)
    return Layer(f"soft_sort, {regularization}", call, _sorting_inputs, reference=reference)


def _sorting_inputs(g: torch.Generator) -> Inputs:
    # The gaps within the pairs 1, 2 and 0, 3 are more than 1 / 0.7, and the one between their means is less than 2 / 0.7.
    return torch.tensor([1.2, -1.0, 0.6, 2.9], dtype=torch.float64) + randn(g, 4, scale=0.03), 0.7 + randn(g, scale=0.02).abs()


def _soft_rank(regularization: str) -> Layer:
    def reference(x: Tensor, strength: Tensor) -> Tensor:
        low, high = x[1:3] / strength, x[[0, 3]] / strength
        if regularization == "l2":
            return _pairs(low - low.mean() + 1.5, high - high.mean() + 3.5)
        return _pairs(3 * torch.softmax(low, 0), 7 * torch.softmax(high, 0))

    call = _with_strength(soft_rank, regularization=regularization)
    return Layer(f"soft_rank, {regularization}", call, _inputs if regularization == "l2" else _near_inputs, reference=reference)


def _near_inputs(g: torch.Generator) -> Inputs:
    # The gap between ranks 3 and 4 is log(4 / 3) for kl.
    return torch.tensor([1.0, -1.0, -0.7, 1.1], dtype=torch.float64) + randn(g, 4, scale=0.02), 0.7 + randn(g, scale=0.02).abs()


def _soft_topk(regularization: str) -> Layer:
    def reference(x: Tensor, strength: Tensor) -> Tensor:
        if regularization == "l2":
            shift = (x[0] + x[3] - strength) / 2
            middle = (x[[0, 3]] - shift) / strength
            return torch.stack([middle[0], torch.ones_like(shift), torch.zeros_like(shift), middle[1]])
        z = x / strength
        nu = torch.zeros_like(strength)
        for _ in range(30):  # unrolled, so that autograd differentiates it to any order
            mask = torch.sigmoid(z + nu)
            nu = nu - (mask.sum() - 2) / (mask * (1 - mask)).sum()
        return torch.sigmoid(z + nu)

    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([0.3, 2.0, -2.0, 0.1], dtype=torch.float64) + randn(g, 4, scale=0.05), 0.8 + randn(g, scale=0.05)

    return Layer(f"soft_topk, {regularization}", _with_strength(soft_topk, 2, regularization=regularization), sample, reference=reference)


def _soft_argsort(method: str) -> Layer:
    def reference(x: Tensor, strength: Tensor) -> Tensor:
        places = range(3)
        ordered = [x[1], x[2], x[0]]
        if method == "softsort":
            columns = [torch.stack([-(x[i] - ordered[j]).abs() for i in places]) for j in places]
        else:
            far = [torch.stack([(x[i] - x[k]).abs() for k in places]).sum() for i in places]
            columns = [torch.stack([(2 * j - 2) * x[i] - far[i] for i in places]) for j in places]
        return torch.stack([torch.softmax(column / strength, 0) for column in columns], -1)

    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([1.0, -1.0, 0.2], dtype=torch.float64) + randn(g, 3, scale=0.1), 0.8 + randn(g, scale=0.05)

    return Layer(f"soft_argsort, {method}", _with_strength(soft_argsort, method=method), sample, reference=reference)


def _transport() -> Layer:
    def reference(x: Tensor, strength: Tensor) -> Tensor:
        logits = x.unsqueeze(-1) * torch.arange(1, 4, dtype=x.dtype) / strength
        for _ in range(100):
            logits = logits - logits.logsumexp(-1, keepdim=True)
            logits = logits - logits.logsumexp(-2, keepdim=True)
        return logits.exp()

    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([0.5, -0.7, 0.2], dtype=torch.float64) + randn(g, 3, scale=0.1), 0.8 + randn(g, scale=0.05)

    return Layer("soft_argsort, sinkhorn", _with_strength(soft_argsort, method="sinkhorn"), sample, reference=reference)


def _network_argsort() -> Layer:
    options = {"network": "odd_even", "distribution": "logistic"}

    def call(x: Tensor) -> Tensor:
        return soft_argsort(x, method="network", regularization_strength=0.25, **options)

    def sample(g: torch.Generator) -> Inputs:
        return (torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64) + randn(g, 3, scale=0.02),)

    return Layer("soft_argsort, network", call, sample, reference=lambda x: dense_permutation(x, "odd_even", "logistic", steepness=4.0))


SOFT_SORT: tuple[Layer, ...] = (
    _soft_sort("l2"),
    _soft_sort("kl"),
    _soft_rank("l2"),
    _soft_rank("kl"),
    _soft_topk("l2"),
    _soft_topk("entropic"),
    _soft_argsort("softsort"),
    _soft_argsort("neuralsort"),
    _transport(),
    _network_argsort(),
)
