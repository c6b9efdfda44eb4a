"""From a network to the axes of its weights: its graph is run once on an example, and every operation adds its demands.

What no rule covers is an error that names the operation, never a guess. The result is then put to the test
(:func:`verify`): weights and buffers are made generic, their units renamed at random, and the outputs compared.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...errors import UnsupportedModuleError
from ..axes import Axis, Concatenation, Fixed, Group, Product
from .calls import Call, Rule, Traced, Unprovable, elementwise, fixed, fixed_all, traced_in
from .modules import MODULES
from .operations import OPERATIONS
from .terms import Term, Unknown, fix, is_fixed, resolve

if TYPE_CHECKING:
    from ..spec import PermutationSpec

__all__ = ["Override", "infer_axes", "verify"]

Override = Literal["fixed", "elementwise"] | Rule

_ADVICE = (
    "Write it with operations of torch.nn that are known, or say how it treats its dimensions: overrides={{{key!r}: 'fixed'}} lets nothing "
    "move through it, 'elementwise' is for what commutes with any renaming; PermutationSpec.from_axes takes a whole spec by hand"
)


def infer_axes(
    model: nn.Module, example_input: Tensor | Sequence[Any], overrides: Mapping[Any, Override] | None = None
) -> dict[str, tuple[Axis, ...]]:
    """The axes of every weight and buffer of a network.

    Args:
        model: the network; it is copied.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
        overrides: as there.

    Raises:
        UnsupportedModuleError: the network can't be traced, or no rule covers an operation.
    """
    model, inputs = _prepared(model, example_input)
    overrides = dict(overrides or {})
    inference = _Inference(model, _traced(model, inputs, overrides), overrides)
    with torch.no_grad():
        inference.run(*inputs)
    return inference.axes()


def verify(
    spec: PermutationSpec, model: nn.Module, example_input: Tensor | Sequence[Any], *, generator: torch.Generator | None = None
) -> None:
    """Check that renaming units does not change the function of a network, at weights without symmetries of their own.

    Args:
        spec: what is to be checked.
        model: the network; it is copied.
        example_input: as in :meth:`~difflayers.rebasin.PermutationSpec.from_module`.
        generator: source of randomness.

    Raises:
        UnsupportedModuleError: the outputs differ; the groups that do it are named.
    """
    model, inputs = _prepared(model, example_input)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    state = {name: _generic(value, generator) for name, value in model.state_dict().items()}

    def outputs(params: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = torch.func.functional_call(model, dict(params), tuple(inputs))
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def differs(permutations: Mapping[str, Tensor]) -> bool:
        renamed = outputs(spec.apply(state, permutations))
        # Rounding grows with the depth of the network; a unit in the wrong place changes the leading digits.
        pairs = zip(expected, renamed, strict=True)
        return any(not torch.allclose(old, new, rtol=1e-7, atol=1e-7 * float(old.abs().max()), equal_nan=True) for old, new in pairs)

    expected = outputs(spec.apply(state, {}))
    permutations = spec.random(generator=generator)
    if differs(permutations):
        guilty = [group for group, permutation in permutations.items() if differs({group: permutation})]
        places = "; ".join(f"{group}: {', '.join(sorted({place.name for place in spec.occurrences(group)}))}" for group in guilty)
        raise UnsupportedModuleError(
            f"renaming units changes the output of {type(model).__name__}. Groups that do: {places or 'only several together'}. "
            "Wrong are the overrides or the axes given by hand, or the network treats some units by their number; hold those with "
            "overrides={...: 'fixed'}"
        )


def _prepared(model: nn.Module, example_input: Tensor | Sequence[Any]) -> tuple[nn.Module, list[Any]]:
    """A copy in double precision and evaluation mode, and its positional arguments."""
    inputs = [example_input] if isinstance(example_input, Tensor) else list(example_input)
    inputs = [part.detach().double() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs]
    return copy.deepcopy(model).double().eval(), inputs


def _generic(value: Tensor, generator: torch.Generator) -> Tensor:
    """Near the value, and no two entries alike; positive ones stay so."""
    if not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    return value * (1 + 0.3 * noise) + 0.05 * noise


def _traced(model: nn.Module, inputs: Sequence[Any], overrides: Mapping[Any, Override]) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in overrides or type(m) in overrides or super().is_leaf_module(m, module_qualified_name)

    if type(model) in MODULES:
        graph = fx.Graph()
        graph.output(graph.call_module("", tuple(graph.placeholder(f"input_{number}") for number in range(len(inputs)))))
        return graph
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
        defaults = {part.name: part.default for part in parameters if part.default is not part.empty}
        return Tracer().trace(model, concrete_args=defaults)
    except Exception as error:
        raise UnsupportedModuleError(
            f"{type(model).__name__} can't be traced by torch.fx: {error} Control flow that depends on tensors has no graph. Put it into a "
            "submodule and name that in overrides, or write the spec by hand with PermutationSpec.from_axes"
        ) from error


class _Inference(fx.Interpreter):
    """Runs the graph on the example, with terms beside the values."""

    def __init__(self, model: nn.Module, graph: fx.Graph, overrides: Mapping[Any, Override]) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.model, self.overrides = model, overrides
        self.terms: dict[fx.Node, Any] = {}
        self.state = model.state_dict(keep_vars=True)
        # Tied weights are one tensor under several names.
        first: dict[int, str] = {}
        self.first_name = {name: first.setdefault(id(value), name) for name, value in self.state.items()}
        self.weights: dict[str, tuple[Term, ...]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The network itself has the empty path."""
        return self.model.get_submodule(target)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; its terms are kept."""
        value = super().run_node(n)
        self.terms[n] = self._terms(n, value)
        return value

    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of all weights and buffers, groups named after the module where they are met first."""
        names: dict[Unknown, str] = {}
        taken: set[str] = set()

        def frozen(term: Term, owner: str) -> Axis:
            if isinstance(term, Unknown):
                if term not in names:
                    prefix = owner.rpartition(".")[0] or owner
                    name, count = prefix, 1
                    while name in taken:
                        count += 1
                        name = f"{prefix}:{count}"
                    taken.add(name)
                    names[term] = name
                return Group(names[term], term.size)
            if isinstance(term, Product | Concatenation):
                return type(term)(tuple(frozen(part, owner) for part in term.parts))
            return term

        met = {owner: tuple(frozen(resolve(term), owner) for term in terms) for owner, terms in self.weights.items()}
        return {name: met.get(self.first_name[name], tuple(Fixed(size) for size in value.shape)) for name, value in self.state.items()}

    def _weight(self, name: str, value: Any) -> Traced | None:
        """A weight or buffer by name. What is not part of the state can't be renamed."""
        if not isinstance(value, Tensor):
            return None
        if name not in self.first_name:
            return Traced(value, fixed(value))
        first = self.first_name[name]
        if first not in self.weights:
            self.weights[first] = tuple(Unknown(size) for size in value.shape)
        return Traced(value, self.weights[first])

    def _terms(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return fixed_all(value)
        if node.op == "get_attr":
            found = self._weight(str(node.target), value)
            return None if found is None else found.terms
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._joined)
        if node.op == "output":
            for operand in traced_in(args):
                for term in operand.terms:
                    fix(term)
            return None
        if node.op == "call_module":
            rule, call = self._module_rule(str(node.target), value, node)
        else:
            rule, call = self._rule(node, value)
        operands = traced_in([args, kwargs])
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return None
        if node.op != "call_module" and all(is_fixed(term) for operand in operands for term in operand.terms):
            return fixed_all(value)
        if node.target in (operator.getitem, getattr) and not isinstance(args[0], Traced):
            source: Any = node.args[0]
            whole, terms = self.env[source], self.terms[source]
            return terms[args[1]] if isinstance(args[1], slice) else terms[[part is value for part in whole].index(True)]
        try:
            if rule is None:
                raise Unprovable("an operation without a rule")
            terms = rule(call, *args, **kwargs)
            return _fitting(terms, value)
        except (Unprovable, TypeError, AssertionError, AttributeError, IndexError, KeyError, ValueError) as error:
            raise self._refusal(node, error) from error

    def _joined(self, node: fx.Node) -> Any:
        return _join(self.env[node], self.terms[node])

    def _module_rule(self, path: str, value: Any, node: fx.Node) -> tuple[Rule | None, Call]:
        module = self.model.get_submodule(path)
        override = self.overrides.get(path, self.overrides.get(type(module)))
        return _overriding(override) or MODULES.get(type(module)), self._call(path, module, value, node)

    def _call(self, path: str, module: nn.Module, value: Any, node: fx.Node | None) -> Call:
        def parameter(name: str) -> Traced | None:
            found = module
            for part in name.split("."):
                found = getattr(found, part, None)
            return self._weight(f"{path}.{name}" if path else name, found)

        def inside(name: str) -> Call:
            return self._call(f"{path}.{name}" if path else name, module.get_submodule(name), None, None)

        return Call(value, type(module), _users(node), module, parameter, inside)

    def _rule(self, node: fx.Node, value: Any) -> tuple[Rule | None, Call]:
        override = self.overrides.get(node.target)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        home = getattr(node.target, "__module__", None) or "torch"
        known = isinstance(node.target, str) or home.partition(".")[0] in ("torch", "_operator", "builtins")
        rule = OPERATIONS.get(name.rstrip("_"), OPERATIONS.get(name)) if known else None
        return _overriding(override) or rule, Call(value, node.target, _users(node))

    def _refusal(self, node: fx.Node, error: Exception) -> UnsupportedModuleError:
        what = (
            f"module {node.target!r} ({type(self.model.get_submodule(str(node.target))).__name__})"
            if node.op == "call_module"
            else f"{node.target}"
        )
        why = str(error) if isinstance(error, Unprovable) else f"arguments that its rule does not know ({error})"
        key = node.target if node.op == "call_module" else "path of the module that calls it"
        return UnsupportedModuleError(
            f"node {node.name!r} calls {what}: {why}. Which renamings it commutes with is not proved. {_ADVICE.format(key=key)}"
        )


def _overriding(override: Override | None) -> Rule | None:
    if override == "fixed":
        return _held
    return elementwise if override == "elementwise" else override if callable(override) else None


def _held(call: Call, *args: Any, **kwargs: Any) -> Any:
    return fixed_all(call.output, *traced_in([args, kwargs]))


def _users(node: fx.Node | None) -> frozenset[int] | None:
    if node is None:
        return None
    taken = [(user.args[1] if user.target is operator.getitem else None, user) for user in node.users]
    if not all(isinstance(place, int) for place, _ in taken):
        return None
    return frozenset(place for place, user in taken if isinstance(place, int) and user.users)


def _join(value: Any, terms: Any) -> Any:
    """Values with their terms."""
    if isinstance(value, Tensor):
        return Traced(value, terms)
    if isinstance(value, list | tuple) and terms is not None:
        return tuple(_join(part, term) for part, term in zip(value, terms, strict=True))
    return value


def _fitting(terms: Any, value: Any) -> Any:
    """The terms, if there is one of the right size for each dimension."""
    if isinstance(value, Tensor):
        if terms is None or tuple(term.size for term in terms) != tuple(value.shape):
            raise Unprovable(f"a result of the shape {tuple(value.shape)}")
        return terms
    if isinstance(value, list | tuple):
        if terms is None or len(terms) != len(value):
            raise Unprovable(f"{len(value)} results")
        return tuple(_fitting(term, part) for term, part in zip(terms, value, strict=True))
    return None
