"""Tensors that a user's function closes over, made explicit.

An autograd.Function differentiates its arguments and nothing else: a weight that reaches a residual through a closure
or through an nn.Module would silently get no gradient. ``hoist`` runs the function once, without a graph, under a
TorchFunctionMode that notices every tensor which is neither an argument nor made on the way. They become arguments;
a second mode puts the given values back in their places whenever the function runs again. All tensors are taken, not only those
that require a gradient: dual tensors do not say so, and an integer index may be batched by an outer vmap.

Out of sight, and so to be passed as arguments: tensors that a TorchScript module or a user's own autograd.Function
takes directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import TensorWeakRef

from ..errors import DiffLayersError
from ..solvers.linearize import without_saved_tensor_hooks
from .context import Context

__all__ = ["Explicit", "hoist", "visible_to_modes"]


def hoist(function: Callable[..., Any], *args: Any, of: Callable[..., Any] | None = None) -> tuple[Explicit, list[Tensor], Any]:
    """Turn the tensors that ``function`` closes over into arguments.

    Args:
        function: any function of ``args``; it is called once here, without recording a graph.
        args: pytrees, as in the calls to come.
        of: the user's function that ``function`` wraps; what it sees is remembered for the calls to come.

    Returns:
        ``(explicit, captured, value)`` with ``explicit(captured, *args) == function(*args) == value``.
    """
    # Detached, the arguments are new objects: a tensor that is an argument and closed over, too, is then found in its second role.
    arguments = _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, args)
    context = Context(function if of is None else of)
    collect = _Collect(_tensors(_pytree.tree_leaves(arguments)))
    with torch.no_grad(), without_saved_tensor_hooks(), collect:
        value = function(*arguments)
    captured = collect.captured(value)
    return Explicit(function, captured, context), captured, value


class Explicit:
    """A function whose closed-over tensors are its first argument; made by :func:`hoist`.

    It sees the outside variables that it saw then. After :meth:`watch`, its next call also checks that it reads no tensor that it
    had not read.
    """

    def __init__(self, function: Callable[..., Any], captured: list[Tensor], context: Context) -> None:
        self._function, self._captured, self._context = function, captured, context
        self._lift = self._watched = False

    def watch(self) -> None:
        """Check the next call, which is the first one at the solution."""
        self._watched = True

    def __call__(self, values: Sequence[Tensor], *args: Any) -> Any:
        """Call the function with ``values`` in the places of the captured tensors."""
        with self._context.restored():
            if self._watched:
                self._watched = False
                self._look(values, args)
            if all(new is old for new, old in zip(values, self._captured, strict=True)):
                return self._function(*args)
            return self._call_swapped(values, _views(args))

    def _call_swapped(self, values: Sequence[Tensor], args: Any) -> Any:
        if not self._lift:
            try:
                with _Swap(self._captured, values):
                    return self._function(*args)
            except RuntimeError as error:
                # functorch's own words for a tensor of one transform that meets another out of order.
                if "INTERNAL ASSERT FAILED" not in str(error) or "functorch" not in str(error):
                    raise
                self._lift = True
        return _call_above(self._function, args, self._captured, values)

    def _look(self, values: Sequence[Tensor], args: Any) -> None:
        """Run once without a graph, whose saved tensors would look like tensors from outside, and see what is read."""
        values, args = _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (list(values), args))
        lift = self._lift
        collect = _Collect([*_tensors(_pytree.tree_leaves(args)), *values])
        with torch.no_grad(), without_saved_tensor_hooks(), collect:
            value = self._call_swapped(values, args)
        if self._lift != lift:  # what the first attempt had made may still be alive
            self._look(values, args)
            return
        read = collect.captured(value)
        with torch._C.DisableTorchFunction():
            changed = any(_carries_a_derivative(tensor) for tensor in read)
        if changed:
            raise DiffLayersError(
                _PASS_IT.format("is read at the solution but not at the starting point (a branch, or a changed variable)")
            )


def _views(args: Any) -> Any:
    # Views, so that an argument which is also closed over is not taken for its other role.
    return _pytree.tree_map(lambda leaf: leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf, args)


def visible_to_modes(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors, shown to the modes that are active around this call.

    ``Function.apply`` does not pass through torch-function modes, so an implicit layer inside the residual of another
    one would hide its inputs from the outer ``hoist``. A view is an operation that the modes see.
    """
    if torch._C._len_torch_function_stack() == 0:
        return list(tensors)
    return [tensor.view_as(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def _call_above(function: Callable[..., Any], args: Sequence[Any], captured: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    """Call the function at a transform level above those that its closed-over tensors belong to.

    A layer's solver runs below the transforms around the layer. A transform that the function itself starts there would get the number of
    one of those, and refuse to wrap a closed-over tensor of that or a higher number before the value could be put in its
    place. Empty levels make room; nothing is differentiated at them.
    """
    above = max((_functorch.maybe_get_level(tensor) for tensor in captured), default=0) - max(_current_level(), 0)
    levels = [_functorch._grad_increment_nesting() for _ in range(above)]
    try:
        with _Swap(captured, values):
            result = function(*args)
        for level in reversed(levels):
            result = _pytree.tree_map_only(Tensor, lambda leaf, level=level: _functorch._unwrap_for_grad(leaf, level), result)
    finally:
        for _ in levels:
            _functorch._grad_decrement_nesting()
    return result


class _Collect(TorchFunctionMode):
    """Notes the tensors that operations read and none of them made.

    A torch.func transform inside the function wraps and unwraps tensors out of this mode's sight, so a tensor that no operation made may
    still have been made on the way. It dies with the run; what the function closes over lives on. Hence the weak references.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.made = {id(tensor) for tensor in known}
        # For each tensor read: itself, what it wraps, and so on, each with whether a gradient was asked for at that layer.
        self.read: dict[int, list[tuple[TensorWeakRef, bool]]] = {}
        self.level = _current_level()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = _tensors(args) + _tensors(kwargs)
        for leaf in inputs:
            self._look_at(leaf)
        # An operation in place gives back what it was given; that is not made by it.
        self.made.update({id(leaf) for leaf in _tensors(result)} - {id(leaf) for leaf in inputs})
        return result

    def _look_at(self, tensor: Tensor) -> None:
        if id(tensor) in self.made or id(tensor) in self.read:
            return
        chain = [tensor]
        while _functorch.maybe_get_level(chain[-1]) > self.level:
            chain.append(_functorch.get_unwrapped(chain[-1]))
        if id(chain[-1]) not in self.made:
            with torch._C.DisableTorchFunction():  # the modes around this one must not take a question for an operation
                self.read[id(tensor)] = [(TensorWeakRef(layer), layer.requires_grad) for layer in chain]

    def captured(self, value: Any) -> list[Tensor]:
        """The tensors read from outside, after a run that returned ``value``."""
        with torch._C.DisableTorchFunction():
            return self._captured(value)

    def _captured(self, value: Any) -> list[Tensor]:
        made = self.made | {id(leaf) for leaf in _tensors(_pytree.tree_leaves(value))}
        captured = {}
        for chain in self.read.values():
            differentiated = False
            for reference, requires_grad in chain:
                # The outermost layer that has outlived the run came from outside; those around it are an inner transform's.
                tensor = reference()
                if tensor is not None:
                    break
                differentiated = differentiated or requires_grad
            if tensor is None or id(tensor) in made:
                continue
            constant = not _carries_a_derivative(tensor)
            if constant and (differentiated or tensor.layout != torch.strided):
                continue  # a constant may stay where it is, if it cannot be moved
            if differentiated:
                # A value swapped in its place would be cut off from the transform that differentiates it.
                raise DiffLayersError(_PASS_IT.format("is differentiated by a torch.func transform inside the function"))
            captured[id(tensor)] = tensor
        return list(captured.values())


class _Swap(TorchFunctionMode):
    def __init__(self, captured: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.replacement = {id(old): new for old, new in zip(captured, values, strict=True)}
        self.level = _current_level()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **(self._replace(kwargs) if kwargs else {}))

    def _replace(self, node: Any) -> Any:
        if isinstance(node, Tensor):
            return self._replace_tensor(node)
        if isinstance(node, tuple | list):
            items = [self._replace(item) for item in node]
            return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
        if isinstance(node, dict):
            return {key: self._replace(item) for key, item in node.items()}
        return node

    def _replace_tensor(self, tensor: Tensor) -> Tensor:
        level = _functorch.maybe_get_level(tensor)
        if id(tensor) in self.replacement or level <= self.level:
            return self.replacement.get(id(tensor), tensor)
        # A transform inside the function wraps what it is given out of sight: what it wrapped is replaced, and wrapped again.
        inner = _functorch.get_unwrapped(tensor)
        new = self._replace_tensor(inner)
        if new is inner:
            return tensor
        if _functorch.is_batchedtensor(tensor):
            return _functorch._add_batch_dim(new, _functorch.maybe_get_bdim(tensor), level)
        with torch._C.DisableTorchFunction():
            differentiated = tensor.requires_grad
        if differentiated:
            raise DiffLayersError(_PASS_IT.format("is differentiated by a torch.func transform inside the function"))
        return _functorch._wrap_for_grad(new, level)


_PASS_IT = "a tensor that the function closes over {}; pass it to the layer as an argument instead, so that its gradient is not lost"


def _tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, tuple | list):
        return [tensor for item in node for tensor in _tensors(item)]
    return []


def _carries_a_derivative(tensor: Tensor) -> bool:
    if tensor.requires_grad or _functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None


def _current_level() -> int:
    level = _functorch.maybe_current_level()
    return -1 if level is None else level
