"""A user's own solver under any transform: called with plain tensors, one element at a time, and never differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..errors import ShapeError
from .closure import visible_to_modes
from .function import ImplicitFunction, Problem
from .methods import LinearMethod

__all__ = ["call_outside"]


def call_outside(solve: Callable[..., Any], x0: Any, args: tuple[Any, ...]) -> Any:
    """``solve(x0, *args)`` on detached tensors, outside of all transforms; under vmap once for each element.

    Args:
        solve: returns a pytree.
        x0: a pytree, or None.
        args: pytrees.

    Returns:
        What ``solve`` returns, its tensors without any derivative.
    """
    leaves, spec = _pytree.tree_flatten((x0, args))
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Any) -> Any:
        full = list(leaves)
        for i, tensor in zip(moving, tensors, strict=True):
            full[i] = tensor
        start, rest = _pytree.tree_unflatten(full, spec)
        return (start, *rest)

    call = _Call(solve, rebuild)
    plain = [leaves[i].detach() for i in moving]
    empty = plain[0].new_zeros(0, dtype=torch.get_default_dtype()) if plain else torch.zeros(0)
    return call.result(ImplicitFunction.apply(call, empty, *visible_to_modes(plain))[1:])


class _Call(Problem):
    """A solver that is only called, never differentiated: its outputs are the leaves of whatever it returns.

    The first output is an empty tensor, since :class:`ImplicitFunction` differentiates its first output.
    """

    def __init__(self, solve: Callable[..., Any], rebuild: Callable[..., Any]) -> None:
        super().__init__(solve, solve, LinearMethod())
        self.solve, self.rebuild = solve, rebuild
        self.spec: Any = None
        self.constants: list[Any] = []

    def find(self, x0: Tensor, theta: Any) -> Any:
        leaves, self.spec = _pytree.tree_flatten(self.solve(*self.rebuild(theta)))
        if any(type(leaf).__module__ == "numpy" for leaf in leaves):
            raise ShapeError(
                "the solver returned a NumPy array; convert it with torch.as_tensor, in the dtype and on the device of its arguments"
            )
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        # Clones: an output that is an input would be taken for that input by the transforms around it.
        return (x0.clone(), *(leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)))

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        return _CallPerElement(self, in_dims, size)

    def result(self, outputs: Any) -> Any:
        """The structure that the solver returned, around the outputs of the Function."""
        tensors = iter(outputs)
        return _pytree.tree_unflatten([next(tensors) if constant is None else constant[0] for constant in self.constants], self.spec)


class _CallPerElement(_Call):
    def __init__(self, inner: _Call, in_dims: tuple[int | None, ...], size: int) -> None:
        super().__init__(inner.solve, inner.rebuild)
        self.inner, self.in_dims, self.size = inner, in_dims, size

    def find(self, x0: Tensor, theta: Any) -> Any:
        outputs = []
        for i in range(self.size):
            element = [leaf if dim is None else leaf[i] for leaf, dim in zip(theta, self.in_dims, strict=True)]
            outputs.append(self.inner.find(x0[i], element)[1:])
        return (x0.clone(), *(torch.stack(parts) for parts in zip(*outputs, strict=True)))
