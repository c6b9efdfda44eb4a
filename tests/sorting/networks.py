"""Sorting networks by their textbook definitions, with a dense matrix for each swap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["comparators", "dense_permutation", "probability"]


def comparators(size: int, network: str) -> list[tuple[int, int]]:
    """Pairs of wires in order; the smaller value goes to the first one."""
    if network == "odd_even":
        return [(i, i + 1) for layer in range(size) for i in range(layer % 2, size - 1, 2)]
    return _bitonic(list(range(size)))


def _bitonic(wires: list[int]) -> list[tuple[int, int]]:
    """Sort the two halves, then merge: the recursion of the textbook, with the first half as long as a power of two allows."""
    if len(wires) < 2:
        return []
    half = 1 << ((len(wires) - 1).bit_length() - 1)
    # Wire i of the first half meets the second half from the end that it would have were it full.
    facing = [(wires[i], wires[2 * half - 1 - i]) for i in range(half) if 2 * half - 1 - i < len(wires)]
    first, second = wires[:half], wires[half:]
    return _bitonic(first) + _bitonic(second) + facing + _merge(first, half) + _merge(second, half)


def _merge(wires: list[int], full: int) -> list[tuple[int, int]]:
    if full < 2:
        return []
    half = full // 2
    pairs = [(wires[i], wires[i + half]) for i in range(half) if i + half < len(wires)]
    return pairs + _merge(wires[:half], half) + _merge(wires[half:], half)


def probability(d: Tensor, distribution: str, steepness: float = 10.0, art_lambda: float = 0.25) -> Tensor:
    """α, the weight with which two values at distance d stay in their places, as the papers print it."""
    v = steepness * d
    if distribution == "logistic":
        return 1 / (1 + torch.exp(-v))
    if distribution == "logistic_phi":
        return 1 / (1 + torch.exp(-v / (d.abs() + 1e-10) ** art_lambda))
    if distribution == "gaussian":
        return torch.distributions.Normal(torch.zeros_like(v), torch.ones_like(v)).cdf(v)
    if distribution == "cauchy":
        return torch.atan(v) / math.pi + 0.5
    if distribution == "reciprocal":
        return 0.5 * (v / (2 + v.abs()) + 1)
    assert distribution == "optimal"
    beyond = torch.where(v.abs() > 0.25, v, 1.0)
    return torch.where(v > 0.25, 1 - 1 / (16 * beyond), torch.where(v < -0.25, -1 / (16 * beyond), v + 0.5))


def dense_permutation(x: Tensor, network: str, distribution: str, **options: float) -> Tensor:
    """P of one row x: ``x @ P`` are the values."""
    size = x.shape[-1]
    P = torch.eye(size, dtype=x.dtype)
    for i, j in comparators(size, network):
        values = x @ P
        q = 1 - probability(values[j] - values[i], distribution, **options)
        pair = torch.zeros(size, dtype=x.dtype)
        pair[i], pair[j] = 1.0, -1.0
        P = P @ (torch.eye(size, dtype=x.dtype) - q * torch.outer(pair, pair))
    return P
