"""Operations that sum over a dimension or look at a neighbourhood: linear maps, convolutions, normalizations, pooling, attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .calls import Call, Rule, Terms, Traced, Unprovable, broadcast, fixed, fixed_all, traced_in
from .terms import Term, Unknown, cut, fix, multiply, resolve, split, unify

__all__ = ["WEIGHTS", "linear", "normalization"]


def linear(call: Call, input: Traced, weight: Traced, bias: Traced | None = None) -> Terms:
    """x Wᵀ + b.

    Args:
        call: the call.
        input: ``(*batch, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.
    """
    unify(input.terms[-1], weight.terms[-1])
    if bias is not None:
        unify(bias.terms[0], weight.terms[0])
    return (*input.terms[:-1], *weight.terms[:-1])


def _convolution(call: Call, input: Traced, weight: Traced, bias: Traced | None = None, *args: Any, **kwargs: Any) -> Terms:
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    space = weight.value.dim() - 2
    _in_groups(input.terms[-space - 1], weight.terms[0], weight.terms[1], groups)
    return _convolved(call, input, weight, bias, weight.terms[0], space)


def _transposed_convolution(call: Call, input: Traced, weight: Traced, bias: Traced | None = None, *args: Any, **kwargs: Any) -> Terms:
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    space = weight.value.dim() - 2
    unify(input.terms[-space - 1], weight.terms[0])
    channels = multiply([split(weight.terms[0], groups)[0], weight.terms[1]])
    return _convolved(call, input, weight, bias, channels, space)


def _in_groups(channels: Term, rows: Term, columns: Term, groups: int) -> None:
    (outer, inner), (row_outer, _) = split(channels, groups), split(rows, groups)
    unify(outer, row_outer)
    unify(inner, columns)


def _convolved(call: Call, input: Traced, weight: Traced, bias: Traced | None, channels: Term, space: int) -> Terms:
    for term in (*input.terms[-space:], *weight.terms[2:]):
        fix(term)
    if bias is not None:
        unify(bias.terms[0], channels)
    return (*input.terms[: -space - 1], channels, *fixed(call.output)[-space:])


def _matmul(call: Call, input: Traced, other: Traced) -> Terms:
    left, right = input.terms, other.terms
    unify(left[-1], right[-2] if len(right) > 1 else right[-1])
    kept = (*left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    batch = call.output.dim() - len(kept)
    return (*broadcast([left[:-2], right[:-2]], call.output.shape[:batch]), *kept)


def _reversed_matmul(call: Call, input: Traced, other: Traced) -> Terms:
    return _matmul(call, other, input)


def _added_matmul(call: Call, input: Traced, mat1: Traced, mat2: Traced, **kwargs: Any) -> Terms:
    return broadcast([_matmul(call, mat1, mat2), input.terms], call.output.shape)


def _einsum(call: Call, equation: str, *operands: Any) -> Terms:
    parts = (
        list(operands[0]) if operands and isinstance(operands[0], list | tuple) and not isinstance(operands[0], Traced) else list(operands)
    )
    left, arrow, right = equation.replace(" ", "").partition("->")
    if "." in equation or not arrow:
        raise Unprovable("an einsum with an ellipsis or without an arrow")
    letters: dict[str, Term] = {}
    for labels, operand in zip(left.split(","), parts, strict=True):
        for letter, term in zip(labels, operand.terms, strict=True):
            if letter in letters and letters[letter].size == term.size:
                unify(letters[letter], term)
            elif letter not in letters or term.size != 1:
                letters[letter] = term
    return tuple(letters[letter] for letter in right)


def normalization(channels: Term, *operands: Traced | None) -> None:
    """Weights, biases and statistics are renamed as the channels are."""
    for operand in operands:
        if operand is not None:
            unify(operand.terms[0], channels)


def _batch_norm(
    call: Call,
    input: Traced,
    running_mean: Traced | None = None,
    running_var: Traced | None = None,
    weight: Traced | None = None,
    bias: Traced | None = None,
    *args: Any,
    **kwargs: Any,
) -> Terms:
    normalization(input.terms[1], running_mean, running_var, weight, bias)
    return input.terms


def _layer_norm(
    call: Call, input: Traced, normalized_shape: Any, weight: Traced | None = None, bias: Traced | None = None, *args: Any, **kwargs: Any
) -> Terms:
    for operand in (weight, bias):
        if operand is not None:
            broadcast([operand.terms, input.terms[-len(operand.terms) :]], operand.value.shape)
    return input.terms


def _group_norm(
    call: Call, input: Traced, num_groups: int, weight: Traced | None = None, bias: Traced | None = None, *args: Any, **kwargs: Any
) -> Terms:
    channels = resolve(input.terms[1])
    sizes = [channels.size // num_groups] * num_groups
    if isinstance(channels, Unknown) or num_groups == 1:
        split(channels, num_groups)
    else:  # groups that do not fall together with the parts of the channels: each keeps its place
        cut(channels, sizes)
    normalization(input.terms[1], weight, bias)
    return input.terms


def _opaque(call: Call, *args: Any, **kwargs: Any) -> Any:
    return fixed_all(call.output, *traced_in([args, kwargs]))


def _prelu(call: Call, input: Traced, weight: Traced) -> Terms:
    if weight.value.numel() > 1:
        unify(weight.terms[0], input.terms[1 if len(input.terms) > 1 else 0])
    return input.terms


def _embedding(call: Call, input: Traced, weight: Traced, *args: Any, **kwargs: Any) -> Terms:
    fix(weight.terms[0])
    return (*input.terms, weight.terms[1])


def _in_space(space: int) -> Rule:
    """Pooling over the last ``space`` dimensions."""

    def rule(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
        if not isinstance(call.output, Tensor):
            raise Unprovable("the indices of a pooling")
        for term in input.terms[-space:]:
            fix(term)
        return (*input.terms[:-space], *fixed(call.output)[-space:])

    return rule


def _interpolate(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
    return _in_space(len(input.terms) - 2)(call, input)


def _attention(
    call: Call,
    query: Traced,
    key: Traced,
    value: Traced,
    attn_mask: Traced | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Terms:
    if enable_gqa:
        raise Unprovable("grouped queries")
    unify(query.terms[-1], key.terms[-1])
    unify(key.terms[-2], value.terms[-2])
    batch = call.output.shape[:-2]
    leading = broadcast([part.terms[:-2] for part in (query, key, value)], batch)
    scores = (*leading, query.terms[-2], key.terms[-2])
    if is_causal:
        fix(scores[-1]), fix(scores[-2])
    if attn_mask is not None:
        broadcast([scores, attn_mask.terms], [term.size for term in scores])
    return (*leading, query.terms[-2], value.terms[-1])


WEIGHTS: dict[str, Rule] = {
    **{f"conv{space}d": _convolution for space in (1, 2, 3)},
    **{f"conv_transpose{space}d": _transposed_convolution for space in (1, 2, 3)},
    **{f"{kind}_pool{space}d": _in_space(space) for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg") for space in (1, 2, 3)},
    **dict.fromkeys(["matmul", "bmm", "mm", "mv", "dot", "vdot", "imatmul"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm"], _added_matmul),
    **dict.fromkeys(["batch_norm", "instance_norm"], _batch_norm),
    **dict.fromkeys(["layer_norm", "rms_norm"], _layer_norm),
    **dict.fromkeys(["interpolate", "upsample"], _interpolate),
    "einsum": _einsum,
    "embedding": _embedding,
    "group_norm": _group_norm,
    "linear": linear,
    "local_response_norm": _opaque,
    "prelu": _prelu,
    "rmatmul": _reversed_matmul,
    "scaled_dot_product_attention": _attention,
}
