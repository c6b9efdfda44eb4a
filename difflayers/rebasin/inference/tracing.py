"""From a network to the axes of its weights: it is run once on an example, and every operation that it calls adds its demands.

The calls are seen as PyTorch makes them, so that branches on sizes, options and types need no care. A branch on the values of a tensor is
refused, as the side that was not taken has not been seen. What no rule covers is an error that names the module and the operation, never
a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...errors import UnsupportedModuleError
from ..axes import Axis, Concatenation, Fixed, Group, Product
from .calls import Call, Rule, Terms, Traced, Unprovable, elementwise, fixed, fixed_all, traced_in
from .modules import MODULES
from .operations import OPERATIONS
from .probe import Example, first_names, prepared
from .terms import Term, Unknown, is_fixed, resolve

__all__ = ["Override", "infer_axes"]

Override = Literal["fixed", "elementwise"] | Rule

# What turns the values of a tensor into something of Python, of which nothing is known any more.
_VALUES = {"bool", "float", "int", "complex", "index", "item", "tolist", "numpy", "array", "nonzero", "unique", "masked_select"}


def infer_axes(model: nn.Module, example_input: Example, overrides: Mapping[Any, Override] | None = None) -> dict[str, tuple[Axis, ...]]:
    """The axes of every weight and buffer of a network.

    Args:
        model: the network; it is copied.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
        overrides: as there.

    Raises:
        UnsupportedModuleError: no rule covers an operation.
    """
    model, args, kwargs = prepared(model, example_input)
    recorder = _Recorder(model, dict(overrides or {}))
    for part in pytree.tree_leaves((args, kwargs)):
        recorder.record(part, fixed_all(part))
    try:
        with torch.no_grad(), recorder:
            output = model(*args, **kwargs)
    except _Refused as error:
        raise UnsupportedModuleError(str(error)) from error
    fixed_all(None, *traced_in(recorder.joined(pytree.tree_leaves(output))))
    return recorder.axes()


class _Refused(Exception):
    """What :func:`infer_axes` raises as an UnsupportedModuleError. That is a TypeError, which an operator like * would take for its own."""


class _Recorder(TorchFunctionMode):
    """While it is entered, the terms of every tensor that the network makes are found from those of what it is made of."""

    def __init__(self, model: nn.Module, overrides: Mapping[Any, Override]) -> None:
        super().__init__()
        self.model, self.overrides = model, overrides
        self.state = model.state_dict(keep_vars=True)
        self.first_name = first_names(model)
        self.weights: dict[str, Terms] = {}
        # By identity; the tensor is kept, so that no other one takes its place in memory.
        self.terms: dict[int, tuple[Tensor, Terms | Callable[[], Terms]]] = {}
        self.path, self.paused = [""], False
        for part in (part for module in model.modules() for part in pytree.tree_leaves(list(vars(module).values()))):
            self.record(part, fixed_all(part))
        for name, value in self.state.items():
            if isinstance(value, Tensor):
                self.terms[id(value)] = value, lambda name=name: self._weight(name)
        for path, module in model.named_modules():
            self._watch(path, module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operation, whose terms are recorded."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__.strip("_")
        if name == "iter":
            return iter(self.__torch_function__(torch.unbind, types, args))
        value = func(*args, **kwargs)
        if name in _VALUES:
            raise self._refusal(func, Unprovable("the values of a tensor decide what comes next"))
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            rule = _overriding(self.overrides.get(func)) or OPERATIONS.get(name)
            self._apply(rule, Call(value, func), args, kwargs, by_fixed=True)
        return value

    def record(self, value: Any, terms: Any) -> None:
        """Keep the terms of a tensor, or of each in a tuple."""
        if isinstance(value, Tensor):
            self.terms[id(value)] = value, terms
        elif isinstance(value, list | tuple):
            for part, term in zip(value, terms, strict=True):
                self.record(part, term)

    def joined(self, arguments: Any) -> Any:
        """Arguments with their terms."""
        if isinstance(arguments, Tensor):
            if id(arguments) not in self.terms:
                if arguments.numel() == 1:
                    return Traced(arguments, fixed(arguments))
                raise Unprovable(
                    f"a tensor {tuple(arguments.shape)} comes from where nothing is seen: it is neither a weight, a buffer nor an "
                    "attribute of a module, nor made by a function of PyTorch"
                )
            terms = self.terms[id(arguments)][1]
            return Traced(arguments, terms if isinstance(terms, tuple) else terms())
        if isinstance(arguments, dict):
            return {name: self.joined(part) for name, part in arguments.items()}
        return tuple(map(self.joined, arguments)) if isinstance(arguments, list | tuple) else arguments

    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of all weights and buffers, groups named after the module where they are met first."""
        names: dict[Unknown, str] = {}

        def frozen(term: Term, owner: str) -> Axis:
            if isinstance(term, Unknown):
                if term not in names:
                    prefix = owner.rpartition(".")[0] or owner
                    taken = sum(name.partition(":")[0] == prefix for name in names.values())
                    names[term] = f"{prefix}:{taken + 1}" if taken else prefix
                return Group(names[term], term.size)
            if isinstance(term, Product | Concatenation):
                return type(term)(tuple(frozen(part, owner) for part in term.parts))
            return term

        met = {owner: tuple(frozen(resolve(term), owner) for term in terms) for owner, terms in self.weights.items()}
        return {
            name: met.get(self.first_name[name], tuple(Fixed(size) for size in value.shape))
            for name, value in self.state.items()
            if isinstance(value, Tensor)
        }

    def _weight(self, name: str) -> Terms:
        return self.weights.setdefault(self.first_name[name], tuple(Unknown(size) for size in self.state[name].shape))

    def _watch(self, path: str, module: nn.Module) -> None:
        """Let calls of a module be known by its path, and follow its rule, if it has one."""
        forward, override = module.forward, self.overrides.get(path, self.overrides.get(type(module)))
        rule = _overriding(override) or MODULES.get(type(module))

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return forward(*args, **kwargs)
            self.path.append(path)
            try:
                if rule is None:
                    return forward(*args, **kwargs)
                self.paused = True
                try:
                    value = forward(*args, **kwargs)
                finally:
                    self.paused = False
                self._apply(rule, self._call(module, value), args, kwargs)
                return value
            finally:
                self.path.pop()

        module.forward = watched

    def _call(self, module: nn.Module, value: Any) -> Call:
        def parameter(name: str) -> Traced | None:
            found = module
            for part in name.split("."):
                found = getattr(found, part, None)
            return self.joined(found) if isinstance(found, Tensor) else None

        return Call(value, type(module), module, parameter, lambda name: self._call(module.get_submodule(name), None))

    def _apply(self, rule: Rule | None, call: Call, args: Any, kwargs: Any, *, by_fixed: bool = False) -> None:
        """Record what a rule says. ``by_fixed``: where nothing moves that goes in, nothing moves that comes out."""
        try:
            args, kwargs = self.joined(args), self.joined(kwargs)
            operands = traced_in([args, kwargs])
            if by_fixed and all(is_fixed(term) for operand in operands for term in operand.terms):
                self.record(call.output, fixed_all(call.output))
                return
            if rule is None:
                raise Unprovable("an operation without a rule")
            self.record(call.output, _fitting(rule(call, *args, **kwargs), call.output))
        except (Unprovable, TypeError, AttributeError, IndexError, KeyError, ValueError) as error:
            raise self._refusal(call.operation, error) from error

    def _refusal(self, operation: Any, error: Exception) -> _Refused:
        path = self.path[-1]
        module = self.model.get_submodule(path)
        where = f"module {path!r} ({type(module).__name__})" if path else type(module).__name__
        what = "" if isinstance(operation, type) else f" calls {getattr(operation, '__qualname__', operation)}"
        why = str(error) if isinstance(error, Unprovable) else f"arguments that its rule does not know ({error})"
        return _Refused(
            f"{where}{what}: {why}. Which renamings it commutes with is not proved. Write it with operations that are known, or say how it "
            f"treats its dimensions: overrides={{{path or operation!r}: 'fixed'}} lets nothing move through it, 'elementwise' is for what "
            "commutes with any renaming; PermutationSpec.from_axes takes a whole spec by hand"
        )


def _overriding(override: Override | None) -> Rule | None:
    if override == "fixed":
        return lambda call, *args, **kwargs: fixed_all(call.output, *traced_in([args, kwargs]), *_weights_of(call))
    return elementwise if override == "elementwise" else override if callable(override) else None


def _weights_of(call: Call) -> list[Traced]:
    names = [] if call.module is None else [*dict(call.module.named_parameters()), *dict(call.module.named_buffers())]
    return [part for part in map(call.parameter, names) if part is not None]


def _fitting(terms: Any, value: Any) -> Any:
    """The terms, if there is one of the right size for each dimension."""
    if isinstance(value, Tensor):
        if terms is None or (not callable(terms) and tuple(term.size for term in terms) != tuple(value.shape)):
            raise Unprovable(f"a result of the shape {tuple(value.shape)}")
        return terms
    if isinstance(value, list | tuple):
        if terms is None or len(terms) != len(value):
            raise Unprovable(f"{len(value)} results")
        return tuple(_fitting(term, part) for term, part in zip(terms, value, strict=True))
    return None
