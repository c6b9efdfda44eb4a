"""Weights and specs, written by hand, of the kinds of networks that matching must cope with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difflayers.rebasin import PermutationSpec
from difflayers.rebasin.axes import Axis, Concatenation, Fixed, Group, Product

Axes = Sequence[Axis | str | None]
Network = tuple[PermutationSpec, dict[str, Tensor]]


def network(shapes: Mapping[str, tuple[tuple[int, ...], Axes]], seed: int = 0) -> Network:
    """Normal weights, scaled by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.prod(shape[1:]) ** 0.5
        for name, (shape, _) in shapes.items()
    }
    return PermutationSpec.from_axes(params, {name: axes for name, (_, axes) in shapes.items()}), params


def mlp(width: int = 16, depth: int = 3, seed: int = 0) -> Network:
    groups = [None, *(f"h{layer}" for layer in range(depth)), None]
    sizes = [5, *[width] * depth, 3]
    shapes: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for layer in range(depth + 1):
        shapes[f"{layer}.weight"] = ((sizes[layer + 1], sizes[layer]), (groups[layer + 1], groups[layer]))
        shapes[f"{layer}.bias"] = ((sizes[layer + 1],), (groups[layer + 1],))
    return network(shapes, seed)


def residual(width: int = 12, hidden: int = 20, blocks: int = 8, seed: int = 0) -> Network:
    """A stream that every block reads and writes; every second block is one weight from the stream to itself."""
    shapes: dict[str, tuple[tuple[int, ...], Axes]] = {"stem": ((width, 4), ("stream", None))}
    for block in range(blocks):
        if block % 2:
            shapes[f"{block}.direct"] = ((width, width), ("stream", "stream"))
        else:
            shapes[f"{block}.in"] = ((hidden, width), (f"h{block}", "stream"))
            shapes[f"{block}.out"] = ((width, hidden), ("stream", f"h{block}"))
    shapes["head"] = ((3, width), (None, "stream"))
    return network(shapes, seed)


def closed(width: int = 12, seed: int = 0) -> Network:
    """A group that touches nothing but itself: no input, no output, only ⟨A, P B Pᵀ⟩."""
    return network({"weight": ((width, width), ("units", "units"))}, seed)


def convolutional(channels: int = 8, seed: int = 0) -> Network:
    """Convolution, BatchNorm, depthwise convolution, flatten, linear."""
    flat = Product((Group("c1", channels), Fixed(9)))
    shapes: dict[str, tuple[tuple[int, ...], Axes]] = {
        "conv0.weight": ((channels, 3, 3, 3), ("c0", None, None, None)),
        "norm.weight": ((channels,), ("c0",)),
        "norm.running_mean": ((channels,), ("c0",)),
        "norm.running_var": ((channels,), ("c0",)),
        "depthwise.weight": ((channels, 1, 3, 3), ("c0", None, None, None)),
        "conv1.weight": ((channels, channels, 1, 1), ("c1", "c0", None, None)),
        "linear.weight": ((10, 9 * channels), (None, flat)),
    }
    return network(shapes, seed)


def attention(heads: int = 3, features: int = 4, width: int = 10, hidden: int = 14, blocks: int = 3, seed: int = 0) -> Network:
    """Transformer blocks: heads × features, queries, keys and values in one weight, and a permutable stream."""
    shapes: dict[str, tuple[tuple[int, ...], Axes]] = {"embed": ((width, 6), ("stream", None))}
    for block in range(blocks):
        keys = Product((Group(f"heads{block}", heads), Group(f"keys{block}", features)))
        values = Product((Group(f"heads{block}", heads), Group(f"values{block}", features)))
        shapes |= {
            f"{block}.norm.weight": ((width,), ("stream",)),
            f"{block}.qkv.weight": ((3 * heads * features, width), (Concatenation((keys, keys, values)), "stream")),
            f"{block}.qkv.bias": ((3 * heads * features,), (Concatenation((keys, keys, values)),)),
            f"{block}.out.weight": ((width, heads * features), ("stream", values)),
            f"{block}.up.weight": ((hidden, width), (f"hidden{block}", "stream")),
            f"{block}.down.weight": ((width, hidden), ("stream", f"hidden{block}")),
        }
    shapes["head"] = ((5, width), (None, "stream"))
    return network(shapes, seed)


def unet(channels: int = 6, seed: int = 0) -> Network:
    """A skip connection: the last convolution reads the concatenation of what went around and what came through."""
    c, d = channels, 2 * channels
    joined = Concatenation((Group("down", c), Group("up", c), Fixed(2)))
    return network(
        {
            "down.weight": ((c, 2, 3, 3), ("down", None, None, None)),
            "bottom.weight": ((d, c, 3, 3), ("bottom", "down", None, None)),
            "up.weight": ((d, c, 2, 2), ("bottom", "up", None, None)),
            "last.weight": ((4, 2 * c + 2, 3, 3), (None, joined, None, None)),
        },
        seed,
    )
