"""Solvers stay eager under ``torch.compile``.

Their loops stop when the data say so, and an autograd.Function with a jvp cannot be traced (torch 2.13). A decorated function is one
graph break; what surrounds it compiles. ``torch.compiler.disable`` would import the compiler with this package, a second that
most users do not owe: it is fetched only once somebody else has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["eager"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def eager(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, never traced by ``torch.compile``."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(sys.modules["torch._dynamo"].disable(function))
        return disabled[0](*args, **kwargs)

    vars(call)["_torchdynamo_disable"] = True
    return call
