"""The modules of ``torch.nn``, which are not traced into: each names its weights and follows the rule of its operation."""

from __future__ import annotations

from typing import Any

from torch import nn

from .calls import Call, Rule, Terms, Traced, elementwise, fixed, fixed_all
from .operations import OPERATIONS
from .terms import Term, Unknown, concatenate, fix, multiply, reshape, unify
from .weights import linear, normalization

__all__ = ["MODULES"]


def _linear(call: Call, input: Traced) -> Terms:
    weight = call.parameter("weight")
    assert weight is not None
    return linear(call, input, weight, call.parameter("bias"))


def _convolution(call: Call, input: Traced, output_size: Any = None) -> Terms:
    module: Any = call.module
    name = type(module).__name__
    rule = OPERATIONS[("conv_transpose" if "Transpose" in name else "conv") + name[-2:].lower()]
    return rule(call, input, call.parameter("weight"), call.parameter("bias"), groups=module.groups)


def _channel_norm(call: Call, input: Traced) -> Terms:
    normalization(input.terms[1], *(call.parameter(name) for name in ("weight", "bias", "running_mean", "running_var")))
    return input.terms


def _layer_norm(call: Call, input: Traced) -> Terms:
    return OPERATIONS["layer_norm"](call, input, None, call.parameter("weight"), call.parameter("bias"))


def _group_norm(call: Call, input: Traced) -> Terms:
    module: Any = call.module
    return OPERATIONS["group_norm"](call, input, module.num_groups, call.parameter("weight"), call.parameter("bias"))


def _with_weight(operation: str) -> Rule:
    def rule(call: Call, input: Traced) -> Terms:
        return OPERATIONS[operation](call, input, call.parameter("weight"))

    return rule


def _flattened(call: Call, input: Traced) -> Terms:
    return reshape(input.terms, call.output.shape)


def _pool(call: Call, input: Traced) -> Any:
    space = int(type(call.module).__name__[-2])
    return OPERATIONS[f"max_pool{space}d"](call, input)


def _pad(call: Call, input: Traced) -> Terms:
    module: Any = call.module
    name = type(module).__name__
    return OPERATIONS["pad"](call, input, list(module.padding), "constant" if name[:4] in ("Zero", "Cons") else "reflect")


def _upsample(call: Call, input: Traced) -> Terms:
    return OPERATIONS["interpolate"](call, input)


def _glu(call: Call, input: Traced) -> Terms:
    module: Any = call.module
    return OPERATIONS["glu"](call, input, module.dim)


def _pixel_shuffle(call: Call, input: Traced) -> Terms:
    module: Any = call.module
    if isinstance(module, nn.PixelShuffle):
        return OPERATIONS["pixel_shuffle"](call, input, module.upscale_factor)
    return OPERATIONS["pixel_unshuffle"](call, input, module.downscale_factor)


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
            part = call.parameter(f"{name}_proj_weight")
            assert part is not None
            unify(part.terms[0], rows)
            unify(part.terms[1], operand.terms[-1])
    for part, rows in ((bias, stacked), (call.parameter("bias_k"), compared), (call.parameter("bias_v"), carried)):
        if part is not None:
            unify(part.terms[-1], rows)
    mixed = linear(call, Traced(query.value, (*query.terms[:-1], carried)), *_pair(call, "out_proj"))
    outputs = call.output
    return mixed, None if outputs is None or outputs[1] is None else fixed(outputs[1])


def _pair(call: Call, name: str) -> tuple[Traced, Traced | None]:
    weight = call.parameter(f"{name}.weight")
    assert weight is not None
    return weight, call.parameter(f"{name}.bias")


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
                weight, bias = call.parameter(f"weight_{kind}_l{layer}{end}"), call.parameter(f"bias_{kind}_l{layer}{end}")
                assert weight is not None
                normalization(concatenate([cell] * gates), weight, bias)
                unify(weight.terms[1], columns)
            outputs.append(state)
            states.append(state)
            cells.append(cell)
        below = concatenate(outputs)
    lasts = call.output[1] if isinstance(call.output[1], tuple) else (call.output[1],)
    pairs = list(zip(lasts, (states, cells), strict=False))
    given = [] if hx is None else [hx] if isinstance(hx, Traced) else hx
    if call.users is None or 1 in call.users or given:  # the layers' last states share a tensor
        for number, (_, terms) in enumerate(pairs):
            for term in terms[1:]:
                unify(terms[0], term)
            if given:
                unify(given[number].terms[-1], terms[0])
    last = tuple((*fixed(value)[:-1], terms[0]) for value, terms in pairs)
    return (*input.terms[:-1], below), last if isinstance(call.output[1], tuple) else last[0]


def _opaque(call: Call, *args: Any, **kwargs: Any) -> Any:
    return fixed_all(call.output, *(operand for operand in args if isinstance(operand, Traced)))


_ELEMENTWISE = """
    Identity ReLU ReLU6 GELU SiLU Tanh Sigmoid Hardsigmoid LeakyReLU RReLU ELU SELU CELU Softplus Softsign Tanhshrink Hardshrink Softshrink
    Hardswish Hardtanh Mish LogSigmoid Threshold Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Softmax LogSoftmax
    Softmin Softmax2d
"""

_TABLE: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"], _convolution),
    **{f"{kind}Norm{space}d": _channel_norm for kind in ("Batch", "Instance") for space in (1, 2, 3)},
    **dict.fromkeys(["LayerNorm", "RMSNorm"], _layer_norm),
    **dict.fromkeys(["Flatten", "Unflatten"], _flattened),
    **dict.fromkeys(["LSTM", "GRU", "RNN"], _recurrent),
    **dict.fromkeys(["PixelShuffle", "PixelUnshuffle"], _pixel_shuffle),
    **dict.fromkeys(["Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"], _upsample),
    **{f"{kind}Pool{space}d": _pool for kind in ("Max", "Avg", "LP", "AdaptiveMax", "AdaptiveAvg") for space in (1, 2, 3)},
    **{f"{kind}Pad{space}d": _pad for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular") for space in (1, 2, 3)},
    "Embedding": _with_weight("embedding"),
    "GLU": _glu,
    "GroupNorm": _group_norm,
    "Linear": _linear,
    "LocalResponseNorm": _opaque,
    "MultiheadAttention": _multihead_attention,
    "SyncBatchNorm": _channel_norm,
    "PReLU": _with_weight("prelu"),
    "TransformerDecoder": _stack(_decoder_layer),
    "TransformerDecoderLayer": _decoder_layer,
    "TransformerEncoder": _stack(_encoder_layer),
    "TransformerEncoderLayer": _encoder_layer,
}

MODULES: dict[type[nn.Module], Rule] = {getattr(nn, name): rule for name, rule in _TABLE.items() if hasattr(nn, name)}
