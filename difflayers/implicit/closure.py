"""Tensors that a user's function closes over, made explicit.

An autograd.Function differentiates its arguments and nothing else: a weight that reaches a residual through a closure
or through an nn.Module would silently get no gradient. ``hoist`` runs the function once, without a graph, under a
TorchFunctionMode that notices every tensor which is neither an argument nor made on the way. They become arguments;
a second mode puts the given values back in their places whenever the function runs again. All tensors are taken, not only those
that require a gradient: dual tensors do not say so, and an integer index may be batched by an outer vmap.

Out of sight, and so to be passed as arguments: tensors that a TorchScript module or a user's own autograd.Function
takes directly. A closed-over tensor handed to a torch.func transform inside the function is refused with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ..errors import DiffLayersError
from ..solvers.linearize import without_saved_tensor_hooks

__all__ = ["hoist", "visible_to_modes"]


def hoist(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Tensor], Any]:
    """Turn the tensors that ``function`` closes over into arguments.

    Args:
        function: any function of ``args``; it is called once here, without recording a graph.
        args: pytrees, as in the calls to come.

    Returns:
        ``(explicit, captured, value)`` with ``explicit(captured, *args) == function(*args) == value``.
    """
    # Detached, the arguments are new objects: a tensor that is an argument and closed over, too, is then found in its second role.
    arguments = _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, args)
    collect = _Collect(_tensors(_pytree.tree_leaves(arguments)))
    with torch.no_grad(), without_saved_tensor_hooks(), collect:
        value = function(*arguments)
    captured = collect.captured
    if not captured:
        return (lambda _, *args: function(*args)), [], value

    def explicit(values: Sequence[Tensor], *args: Any) -> Any:
        if all(new is old for new, old in zip(values, captured, strict=True)):
            return function(*args)
        with _Swap(captured, values):
            return function(*args)

    return explicit, captured, value


def visible_to_modes(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors, shown to the modes that are active around this call.

    ``Function.apply`` does not pass through torch-function modes, so an implicit layer inside the residual of another
    one would hide its inputs from the outer ``hoist``. A view is an operation that the modes see.
    """
    if torch._C._len_torch_function_stack() == 0:
        return list(tensors)
    return [tensor.view_as(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


class _Collect(TorchFunctionMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        # Ids are only unique among living tensors, so everything seen is kept alive until the mode is dropped.
        self.seen = {id(tensor): tensor for tensor in known}
        self.captured: list[Tensor] = []
        self.level = _current_level()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in _tensors(args):
            self._look_at(leaf)
        for leaf in _tensors(kwargs):
            self._look_at(leaf)
        result = func(*args, **kwargs)
        for leaf in _tensors(result):
            self.seen[id(leaf)] = leaf
        return result

    def _look_at(self, tensor: Tensor) -> None:
        if id(tensor) in self.seen:
            return
        self.seen[id(tensor)] = tensor
        inner = tensor
        while torch._C._functorch.maybe_get_level(inner) > self.level:
            inner = torch._C._functorch.get_unwrapped(inner)
        if inner is tensor:
            self.captured.append(tensor)
        elif id(inner) not in self.seen and _may_carry_a_derivative(inner):
            # The wrapper belongs to a transform inside the function; a value swapped under it would be cut off from that transform.
            raise DiffLayersError(
                f"a tensor of shape {tuple(inner.shape)} that the function closes over is handed to a torch.func transform inside it; "
                "pass it to the layer as an argument instead, so that its gradient is not lost"
            )


class _Swap(TorchFunctionMode):
    def __init__(self, captured: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.replacement = {id(old): new for old, new in zip(captured, values, strict=True)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **(self._replace(kwargs) if kwargs else {}))

    def _replace(self, node: Any) -> Any:
        if isinstance(node, Tensor):
            return self.replacement.get(id(node), node)
        if isinstance(node, tuple | list):
            items = [self._replace(item) for item in node]
            return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
        if isinstance(node, dict):
            return {key: self._replace(item) for key, item in node.items()}
        return node


def _tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, tuple | list):
        return [tensor for item in node for tensor in _tensors(item)]
    return []


def _current_level() -> int:
    level = torch._C._functorch.maybe_current_level()
    return -1 if level is None else level


def _may_carry_a_derivative(tensor: Tensor) -> bool:
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None
