"""What a user's function sees, remembered: a derivative runs the residual again, perhaps after the names in it have changed.

The pullback of a layer calls the residual at backward time. By then ``functional_call`` has put a module's own parameters
back, and the loop in which a lambda was written has moved its variables on. The function would read other values than the forward
pass did, and nothing would say so. A :class:`Context` remembers the variables that a function reads from outside (closure
cells, globals, parameters and buffers of modules, tensors of the object that a method belongs to) and puts them back while
it runs.
Variables that the function itself assigns, a counter for instance, are left alone.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["Context"]

# Functions call functions; a residual's own code lies within a few steps, libraries beyond.
_DEPTH = 6


class Context:
    """The outside variables of ``function`` as they are now.

    Args:
        function: a function, method, partial, module or callable object.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._cells: list[tuple[CellType, Any]] = []
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._visit(function, _DEPTH)

    @contextmanager
    def restored(self) -> Generator[None]:
        """The variables as they were, for the length of the block."""
        cells = [(cell, cell.cell_contents) for cell, value in self._cells if cell.cell_contents is not value]
        entries = [(home, name, home.get(name)) for home, name, value in self._entries if home.get(name) is not value]
        if not cells and not entries:
            yield
            return
        for cell, value in self._cells:
            cell.cell_contents = value
        for home, name, value in self._entries:
            home[name] = value
        try:
            yield
        finally:
            for cell, value in cells:
                cell.cell_contents = value
            for home, name, value in entries:
                home[name] = value

    def _visit(self, thing: Any, depth: int) -> None:
        if depth == 0 or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                for home in (module._parameters, module._buffers):
                    self._entries += [(home, name, value) for name, value in home.items()]
                self._visit_attributes(vars(module), depth)
        elif isinstance(thing, MethodType):
            self._visit(thing.__self__, depth)
            self._visit(thing.__func__, depth)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._visit(part, depth)
        elif isinstance(thing, FunctionType):
            self._visit_function(thing, depth)
        elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
            self._visit_attributes(vars(thing), depth)
            self._visit(type(thing).__call__, depth)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        code = function.__code__
        assigned = _assigned(code)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
            if name not in assigned:
                self._cells.append((cell, value))
            self._visit(value, depth - 1)
        for name in code.co_names:
            value = function.__globals__.get(name)
            if _is_data(value) and name not in assigned:
                self._entries.append((function.__globals__, name, value))
            elif isinstance(value, FunctionType) and value.__globals__ is not function.__globals__:
                continue  # a library's function reads nothing of the user's
            self._visit(value, depth - 1)

    def _visit_attributes(self, attributes: dict[str, Any], depth: int) -> None:
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                self._entries.append((attributes, name, value))
            elif isinstance(value, nn.Module | FunctionType | MethodType | functools.partial):
                self._visit(value, depth - 1)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor | nn.Module | int | float)


@functools.lru_cache(maxsize=1024)
def _assigned(code: CodeType) -> frozenset[str]:
    """The outside names that the code itself assigns."""
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "STORE_GLOBAL"))
