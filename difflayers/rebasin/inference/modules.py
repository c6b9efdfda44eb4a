"""Modules of ``torch.nn`` whose forward pass is not made of operations that can be seen, or hides its structure: attention, recurrence."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .calls import Call, Rule, Terms, Traced, Unprovable, fixed
from .terms import Term, Unknown, concatenate, fix, multiply, unify
from .weights import linear, normalization

__all__ = ["MODULES"]


def _multihead_attention(call: Call, query: Traced, key: Traced, value: Traced, *args: Any, **kwargs: Any) -> tuple[Terms, Terms | None]:
    """Heads are renamed as wholes; the features within a head alike in all heads, for queries and keys together, for values alone."""
    module: Any = call.module
    heads = Unknown(module.num_heads)
    compared, carried = multiply([heads, Unknown(module.head_dim)]), multiply([heads, Unknown(module.head_dim)])
    stacked = concatenate([compared, compared, carried])
    weight, bias = call.parameter("in_proj_weight"), call.parameter("in_proj_bias")
    for operand in (query, key, value):
        for term in operand.terms[:-1]:
            fix(term)
    if weight is not None:
        unify(weight.terms[0], stacked)
        for operand in (query, key, value):
            unify(weight.terms[1], operand.terms[-1])
    else:
        for name, operand, rows in (("q", query, compared), ("k", key, compared), ("v", value, carried)):
            part = _weight(call, f"{name}_proj_weight")
            unify(part.terms[0], rows)
            unify(part.terms[1], operand.terms[-1])
    for part, rows in ((bias, stacked), (call.parameter("bias_k"), compared), (call.parameter("bias_v"), carried)):
        if part is not None:
            unify(part.terms[-1], rows)
    mixed = linear(call, Traced(query.value, (*query.terms[:-1], carried)), *_pair(call, "out_proj"))
    outputs = call.output
    return mixed, None if outputs is None or outputs[1] is None else fixed(outputs[1])


def _pair(call: Call, name: str) -> tuple[Traced, Traced | None]:
    return _weight(call, f"{name}.weight"), call.parameter(f"{name}.bias")


def _weight(call: Call, name: str) -> Traced:
    found = call.parameter(name)
    if found is None:
        raise Unprovable(f"a {type(call.module).__name__} without {name}")
    return found


def _block(call: Call, input: Traced, attended: list[tuple[str, Traced]]) -> Terms:
    """A layer of a transformer: attention to each of ``attended``, then two linear maps, all added to the stream."""
    for number, (name, memory) in enumerate(attended, 1):
        mixed, _ = _multihead_attention(call.inside(name), input, memory, memory)
        unify(mixed[-1], input.terms[-1])
        normalization(input.terms[-1], call.parameter(f"norm{number}.weight"), call.parameter(f"norm{number}.bias"))
    last = f"norm{len(attended) + 1}"
    normalization(input.terms[-1], call.parameter(f"{last}.weight"), call.parameter(f"{last}.bias"))
    hidden = linear(call, input, *_pair(call, "linear1"))
    mixed = linear(call, Traced(input.value, hidden), *_pair(call, "linear2"))
    unify(mixed[-1], input.terms[-1])
    return input.terms


def _encoder_layer(call: Call, src: Traced, *args: Any, **kwargs: Any) -> Terms:
    return _block(call, src, [("self_attn", src)])


def _decoder_layer(call: Call, tgt: Traced, memory: Traced, *args: Any, **kwargs: Any) -> Terms:
    return _block(call, tgt, [("self_attn", tgt), ("multihead_attn", memory)])


def _stack(layer: Rule) -> Rule:
    def rule(call: Call, input: Traced, *args: Any, **kwargs: Any) -> Terms:
        module: Any = call.module
        memory = [part for part in (*args, *kwargs.values()) if isinstance(part, Traced)][:1] if layer is _decoder_layer else []
        for number in range(len(module.layers)):
            layer(call.inside(f"layers.{number}"), input, *memory)
        normalization(input.terms[-1], call.parameter("norm.weight"), call.parameter("norm.bias"))
        return input.terms

    return rule


def _recurrent(call: Call, input: Traced, hx: Any = None) -> tuple[Any, Any]:
    module: Any = call.module
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[type(module).__name__]
    ends = ["", "_reverse"] if module.bidirectional else [""]
    for term in input.terms[:-1]:
        fix(term)
    below, states, cells = input.terms[-1], [], []
    for layer in range(module.num_layers):
        outputs: list[Term] = []
        for end in ends:
            cell: Term = Unknown(module.hidden_size)
            projection = call.parameter(f"weight_hr_l{layer}{end}")
            state = cell if projection is None else projection.terms[0]
            if projection is not None:
                unify(projection.terms[1], cell)
            for kind, columns in (("ih", below), ("hh", state)):
                weight, bias = _weight(call, f"weight_{kind}_l{layer}{end}"), call.parameter(f"bias_{kind}_l{layer}{end}")
                normalization(concatenate([cell] * gates), weight, bias)
                unify(weight.terms[1], columns)
            outputs.append(state)
            states.append(state)
            cells.append(cell)
        below = concatenate(outputs)
    kinds = (states, cells) if isinstance(call.output[1], tuple) else (states,)
    given = [] if hx is None else [hx] if isinstance(hx, Traced) else list(hx)

    def shared(terms: list[Term], value: Tensor) -> Terms:
        """The layers share a tensor, and if it is used they are renamed alike."""
        for term in terms[1:]:
            unify(terms[0], term)
        return (*fixed(value)[:-1], terms[0])

    for terms, start in zip(kinds, given, strict=False):
        unify(start.terms[-1], shared(terms, start.value)[-1])
    values = call.output[1] if isinstance(call.output[1], tuple) else (call.output[1],)
    last = tuple(partial(shared, terms, value) for terms, value in zip(kinds, values, strict=True))
    return (*input.terms[:-1], below), last if isinstance(call.output[1], tuple) else last[0]


MODULES: dict[type[nn.Module], Rule] = {
    nn.GRU: _recurrent,
    nn.LSTM: _recurrent,
    nn.MultiheadAttention: _multihead_attention,
    nn.RNN: _recurrent,
    nn.TransformerDecoder: _stack(_decoder_layer),
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerEncoder: _stack(_encoder_layer),
    nn.TransformerEncoderLayer: _encoder_layer,
}
