"""Operations that move entries about: views, transpositions, pieces, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Rule, Terms, Traced, Unprovable, broadcast, elementwise, fixed
from .terms import Fixed, Unknown, concatenate, cut, fix, multiply, reshape, split, unify

__all__ = ["SHAPES"]


def _constant(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    # Entries that are all the same may move.
    return tuple(Unknown(size) for size in call.output.shape)


def _reshaped(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    return reshape(input.terms, call.output.shape)


def _permuted(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    # The operation itself says where the dimensions go: their sizes are made their numbers.
    probe = torch.empty([number + 1 for number in range(len(input.terms))], device="meta")
    return tuple(input.terms[size - 1] for size in call.operation(probe, *args, **kwargs).shape)


def _reduced(call: Call, input: Traced, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    if isinstance(dim, Traced):  # the larger of two tensors
        return elementwise(call, input, dim)
    if isinstance(call.output, Tensor):
        return _without(call.output, input, dim)
    for place in _places(dim, input):  # values, and indices, which name entries
        fix(input.terms[place])
    return tuple(_without(part, input, dim) for part in call.output)


def _norm(call: Call, input: Traced, ord: Any = None, dim: Any = None, *args: Any, **kwargs: Any) -> Terms:
    return _without(call.output, input, dim)


def _numbered(call: Call, input: Traced, dim: Any = None, *args: Any, **kwargs: Any) -> Terms:
    for place in _places(dim, input):
        fix(input.terms[place])
    return _without(call.output, input, dim)


def _places(dim: Any, input: Traced) -> set[int]:
    count = len(input.terms)
    places = range(count) if dim is None or dim in ((), []) else [dim] if isinstance(dim, int) else dim
    return {place % count for place in places}


def _without(output: Tensor, input: Traced, dim: Any) -> Terms:
    gone, kept = _places(dim, input), output.dim() == len(input.terms)
    return tuple(Fixed(1) if place in gone else term for place, term in enumerate(input.terms) if kept or place not in gone)


def _ordered_along(number: int, default: Any) -> Rule:
    """The order of the entries matters in the dimensions that argument ``number`` names."""

    def rule(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Any:
        given = args[number:] if len(args) > number else kwargs.get("dim", kwargs.get("dims", default))
        while isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], list | tuple):
            given = given[0]
        places = _places(given, input)
        for place in places:
            fix(input.terms[place])
        outputs = [call.output] if isinstance(call.output, Tensor) else call.output
        found = tuple(
            tuple(Fixed(part.shape[place]) if place in places else term for place, term in enumerate(input.terms)) for part in outputs
        )
        return found[0] if isinstance(call.output, Tensor) else found

    return rule


def _pad(call: Call, input: Traced, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Terms:
    found = list(input.terms)
    for number in range(len(pad) // 2):
        before, after = pad[2 * number : 2 * number + 2]
        place = len(found) - 1 - number
        if mode == "constant" and before >= 0 and after >= 0:
            found[place] = concatenate([Unknown(before), found[place], Unknown(after)])
        elif before or after:
            fix(found[place])
            found[place] = Fixed(call.output.shape[place])
    return tuple(found)


def _concatenated(call: Call, tensors: Sequence[Traced], dim: int = 0, **kwargs: Any) -> Terms:
    dim = kwargs.get("axis", dim) % call.output.dim()
    others = [(*operand.terms[:dim], Fixed(1), *operand.terms[dim + 1 :]) for operand in tensors]
    sizes = [1 if place == dim else size for place, size in enumerate(call.output.shape)]
    joined = list(broadcast(others, sizes))
    joined[dim] = concatenate([operand.terms[dim] for operand in tensors])
    return tuple(joined)


def _stacked(call: Call, tensors: Sequence[Traced], dim: int = 0) -> Terms:
    found = list(elementwise(Call(tensors[0].value, None), tensors))
    found.insert(dim % call.output.dim(), Fixed(len(tensors)))
    return tuple(found)


def _pieces(call: Call, input: Traced, *args: Any, **kwargs: Any) -> tuple[Terms, ...]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(input.terms)
    pieces = cut(input.terms[dim], [part.shape[dim] for part in call.output])
    return tuple((*input.terms[:dim], piece, *input.terms[dim + 1 :]) for piece in pieces)


def _unbound(call: Call, input: Traced, dim: int = 0) -> tuple[Terms, ...]:
    pieces = cut(input.terms[dim], [1] * len(call.output))
    dim %= len(input.terms)
    return tuple((*input.terms[:dim], *input.terms[dim + 1 :]) for _ in pieces)


def _item(call: Call, input: Any, index: Any) -> Any:
    if not isinstance(input, Traced):
        return None
    entries = list(index) if isinstance(index, tuple) and not isinstance(index, Traced) else [index]
    if sum(isinstance(entry, Traced) for entry in entries) > 1:
        raise Unprovable("indexing by several tensors")
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (len(input.terms) - sum(entry is not None for entry in entries) + 1)
    remaining, found = list(input.terms), []
    for entry in entries:
        if entry is None:
            found.append(Fixed(1))
            continue
        term = remaining.pop(0)
        if isinstance(entry, slice):
            start, stop, step = entry.indices(term.size)
            if step != 1:
                fix(term)
                found.append(Fixed(len(range(start, stop, step))))
            else:
                stop = max(start, stop)
                found.append(cut(term, [start, stop - start, term.size - stop])[1])
        elif isinstance(entry, Traced) and entry.value.dtype == torch.int64:
            fix(term)
            found += entry.terms
        elif isinstance(entry, int) and not isinstance(entry, bool):
            entry %= term.size
            cut(term, [entry, 1, term.size - entry - 1])
        else:
            raise Unprovable(f"an index {entry!r}")
    return (*found, *remaining)


def _selected(call: Call, input: Traced, dim: int, index: Traced) -> Terms:
    found = list(input.terms)
    fix(found[dim])
    found[dim] = index.terms[0]
    return tuple(found)


def _expanded(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    return broadcast([input.terms], call.output.shape)


def _repeated(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    terms = (*[Fixed(1)] * (call.output.dim() - len(input.terms)), *input.terms)
    return tuple(multiply([Fixed(size // term.size), term]) for size, term in zip(call.output.shape, terms, strict=True))


def _interleaved(call: Call, input: Traced, repeats: int, dim: int | None = None) -> Terms:
    if not isinstance(repeats, int) or dim is None:
        raise Unprovable("repeats that differ, or of a flattened tensor")
    found = list(input.terms)
    found[dim] = multiply([found[dim], Fixed(repeats)])
    return tuple(found)


def _gated(call: Call, input: Traced, dim: int = -1) -> Terms:
    half = input.terms[dim].size // 2
    first, second = cut(input.terms[dim], [half, half])
    unify(first, second)
    found = list(input.terms)
    found[dim] = first
    return tuple(found)


def _pixel_shuffle(call: Call, input: Traced, upscale_factor: int) -> Terms:
    channels, square = split(input.terms[-3], input.terms[-3].size // upscale_factor**2)
    for term in (square, *input.terms[-2:]):
        fix(term)
    return (*input.terms[:-3], channels, *fixed(call.output)[-2:])


def _pixel_unshuffle(call: Call, input: Traced, downscale_factor: int) -> Terms:
    for term in input.terms[-2:]:
        fix(term)
    return (*input.terms[:-3], multiply([input.terms[-3], Fixed(downscale_factor**2)]), *fixed(call.output)[-2:])


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"], _constant),
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"], _reshaped),
    **dict.fromkeys(
        ["permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "T", "mT", "H", "mH"], _permuted
    ),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "logsumexp", "all", "any", "median"], _reduced),
    **dict.fromkeys(["norm", "vector_norm"], _norm),
    **dict.fromkeys(["argmax", "argmin"], _numbered),
    **dict.fromkeys(["cumsum", "cumprod", "flip"], _ordered_along(0, None)),
    **dict.fromkeys(["sort", "argsort"], _ordered_along(0, -1)),
    **dict.fromkeys(["topk", "roll"], _ordered_along(1, None)),
    **dict.fromkeys(["cat", "concat", "concatenate"], _concatenated),
    **dict.fromkeys(["chunk", "split", "tensor_split", "split_with_sizes"], _pieces),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expanded),
    **dict.fromkeys(["repeat", "tile"], _repeated),
    "getitem": _item,
    "glu": _gated,
    "index_select": _selected,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "repeat_interleave": _interleaved,
    "stack": _stacked,
    "unbind": _unbound,
}
