"""All the operations that are known, by the name of the function or method, and those among them that are elementwise."""

from __future__ import annotations

from .calls import Rule, elementwise
from .shapes import SHAPES
from .weights import WEIGHTS

__all__ = ["OPERATIONS"]

# A whole dimension of a softmax, too, may be renamed.
_ELEMENTWISE = """
    relu relu6 gelu silu tanh sigmoid hardsigmoid leaky_relu rrelu elu selu celu softplus softsign tanhshrink hardshrink softshrink
    hardswish hardtanh mish logsigmoid threshold exp exp2 expm1 log log1p log2 sqrt rsqrt abs neg square pow sin cos erf sign clamp
    clamp_min clamp_max nan_to_num reciprocal dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout contiguous clone
    detach to float double half bfloat16 type type_as requires_grad_ add sub mul div rsub truediv floordiv floor_divide true_divide mod
    remainder iadd isub imul itruediv maximum minimum fmax fmin eq ne lt le gt ge logical_and logical_or logical_not and or xor rand ror
    rxor invert pos data real radd rmul rtruediv rdiv rfloordiv rpow rmod idiv ipow where masked_fill lerp addcmul addcdiv atan2 xlogy
    softmax log_softmax softmin normalize as_tensor isnan isinf weight_norm
"""

OPERATIONS: dict[str, Rule] = {**dict.fromkeys(_ELEMENTWISE.split(), elementwise), **SHAPES, **WEIGHTS}
