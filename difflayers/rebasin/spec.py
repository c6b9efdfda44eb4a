r"""Which weights of a network may be renamed together: its permutation symmetries.

Renaming the hidden units of a layer, :math:`W_ℓ ← P_ℓ W_ℓ P_{ℓ-1}^T`, :math:`b_ℓ ← P_ℓ b_ℓ`, leaves the function of the network unchanged.
A :class:`PermutationSpec` says for each dimension of each weight and buffer which groups of units it is made of
(:mod:`~difflayers.rebasin.axes`). :meth:`PermutationSpec.from_module` finds it by running the network, and proves it: the groups
are what remains of one unknown permutation per dimension when each operation of the network has demanded what it needs to commute with
it (:mod:`~difflayers.rebasin.inference`).

Reference: Ainsworth, Hayase and Srinivasa, Git Re-Basin: merging models modulo permutation symmetries, ICLR 2023, arXiv:2209.04836.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeError, UnsupportedModuleError
from .axes import Axis, Fixed, Group, index, leaves, positions, transform
from .inference import Example, Override, infer_axes
from .inference.probe import first_names, probe

__all__ = ["Occurrence", "PermutationSpec"]


class Occurrence(NamedTuple):
    """A place where a group of units touches a weight.

    Attributes:
        name: of the weight or buffer.
        dim: its dimension.
        positions: int64 ``(n, r)``: row i holds the r entries of that dimension that belong to unit i.
    """

    name: str
    dim: int
    positions: Tensor


class PermutationSpec:
    """The permutation symmetries of a network: for each dimension of each weight, the groups of units that it is made of.

    Made by :meth:`from_module`, or by hand by :meth:`from_axes`. Permutations are a dict: group → int64 ``(n,)``, the new unit i is the old
    unit ``permutation[i]``. A relaxed permutation is a matrix ``(n, n)``, [i, j] the part of the old unit j in the new unit i.

    Attributes:
        axes: name of a weight or buffer → one :data:`~difflayers.rebasin.axes.Axis` a dimension.
        sizes: group → its number of units.
        tied: other name of a weight → its first name.
    """

    def __init__(self, axes: Mapping[str, Sequence[Axis]], tied: Mapping[str, str] | None = None) -> None:
        self.axes: dict[str, tuple[Axis, ...]] = {name: tuple(parts) for name, parts in axes.items()}
        self.tied = dict(tied or {})
        self.sizes: dict[str, int] = {}
        for name, parts in self.axes.items():
            for leaf in (leaf for part in parts for leaf in leaves(part) if isinstance(leaf, Group)):
                if self.sizes.setdefault(leaf.name, leaf.size) != leaf.size:
                    raise ShapeError(f"{name}: group {leaf.name!r} has {leaf.size} units here and {self.sizes[leaf.name]} elsewhere")

    @classmethod
    def from_module(cls, model: nn.Module, example_input: Example, *, overrides: Mapping[Any, Override] | None = None) -> PermutationSpec:
        """The symmetries of a network, found from the operations that it calls, and checked on the example (:meth:`verify`).

        Any architecture of operations that are known: linear maps, convolutions (grouped and depthwise, too), the normalizations,
        recurrent layers, attention (``nn.MultiheadAttention``, the transformer layers, or written by hand), residual sums, views,
        concatenations, tied weights. Everything that is permuted alike in all cases is one group. In attention the heads are one
        group, and the features within a head two, for queries and keys, and for values.

        Args:
            model: the network. It is copied and not changed.
            example_input: its argument, a sequence of its positional arguments, or a dict of its keyword arguments.
            overrides: how to treat what can't be proved: the path of a submodule, a class of modules or a function → ``"fixed"``
                (nothing moves through it, its weights included), ``"elementwise"`` (it commutes with any renaming of any dimension), or a
                rule ``(call, *args) -> terms`` as in ``difflayers.rebasin.inference``.

        Raises:
            UnsupportedModuleError: the rules do not cover an operation (it is named, and the module that calls it), the values of a tensor
                decide what is done, or the check fails.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from difflayers.rebasin import PermutationSpec
            >>> model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
            >>> PermutationSpec.from_module(model, torch.randn(2, 1, 6, 6))
            PermutationSpec(0: 6)
        """
        tied = {name: first for name, first in first_names(model).items() if name != first}
        spec = cls(infer_axes(model, example_input, overrides), tied)
        spec.verify(model, example_input)
        return spec

    @classmethod
    def from_axes(cls, params: Mapping[str, Tensor], axes: Mapping[str, Sequence[Axis | str | None]]) -> PermutationSpec:
        """A spec written by hand. Nothing checks it but :meth:`verify`.

        Args:
            params: name → weight or buffer, for the shapes (``model.state_dict()``).
            axes: name → one entry a dimension: the name of a group, None where nothing may move, or an
                :data:`~difflayers.rebasin.axes.Axis`. Names that are not there stay as they are.

        Raises:
            ShapeError: an entry does not fit its weight.

        Example:
            >>> from torch import nn
            >>> from difflayers.rebasin import PermutationSpec
            >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> hand = {"0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")}
            >>> PermutationSpec.from_axes(model.state_dict(), hand).sizes
            {'hidden': 8}
        """
        unknown = sorted(set(axes) - set(params))
        if unknown:
            raise ShapeError(f"no weight or buffer is called {', '.join(unknown)}; there are {', '.join(params)}")
        found: dict[str, tuple[Axis, ...]] = {}
        for name, tensor in params.items():
            given = axes.get(name, (None,) * tensor.dim())
            if len(given) != tensor.dim():
                raise ShapeError(f"{name} has the shape {tuple(tensor.shape)}, its axes need {tensor.dim()} entries: got {len(given)}")
            parts = []
            for size, part in zip(tensor.shape, given, strict=True):
                axis = Fixed(size) if part is None else Group(part, size) if isinstance(part, str) else part
                if axis.size != size:
                    raise ShapeError(f"{name} has the shape {tuple(tensor.shape)}; an axis of {axis.size} entries does not fit: {axis}")
                parts.append(axis)
            found[name] = tuple(parts)
        return cls(found)

    def identity(self) -> dict[str, Tensor]:
        """The permutations that change nothing."""
        return {group: torch.arange(size) for group, size in self.sizes.items()}

    def random(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Uniformly random permutations.

        Args:
            generator: source of randomness, on the CPU.
        """
        return {group: torch.randperm(size, generator=generator) for group, size in self.sizes.items()}

    def inverse(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The permutations that undo these.

        Args:
            permutations: group → int64 ``(n,)``.
        """
        return {group: torch.argsort(permutation) for group, permutation in self._checked(permutations).items()}

    def completed(self, permutations: Mapping[str, Tensor], name: str = "permutations") -> dict[str, Tensor]:
        """A permutation for every group, on the CPU: the identity where there is none.

        Args:
            permutations: group → int64 ``(n,)``.
            name: what they are called in an error.

        Raises:
            ShapeError: one of them does not fit, or is relaxed.
        """
        for group, value in permutations.items():
            if value.is_floating_point():
                raise ShapeError(f"{name} must be hard permutations, int64 (n,); {group!r} is {value.dtype} {tuple(value.shape)}")
        return {**self.identity(), **{group: value.cpu() for group, value in self._checked(permutations).items()}}

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What applying ``first`` and then ``second`` amounts to.

        Args:
            first: group → int64 ``(n,)``.
            second: group → int64 ``(n,)``.
        """
        first, second = self.completed(first), self.completed(second)
        return {group: first[group][second[group]] for group in self.sizes}

    def apply(self, params: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the network with its units renamed. Differentiable in the weights and in relaxed permutations.

        Args:
            params: name → weight or buffer, all of the network (``model.state_dict()``) or some; none is changed.
            permutations: group → int64 ``(n,)``, or ``(n, n)`` for a relaxed one. Groups that are not there stay.

        Returns:
            A new dict with the same names. A weight that is tied is one tensor there, too.

        Raises:
            ShapeError: a name, a shape or a permutation does not fit the spec.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from difflayers.rebasin import PermutationSpec
            >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(5, 2)
            >>> spec = PermutationSpec.from_module(model, x)
            >>> renamed = spec.apply(model.state_dict(), spec.random())
            >>> torch.allclose(torch.func.functional_call(model, renamed, x), model(x), atol=1e-6)
            True
        """
        permutations = self._checked(permutations)
        hard = {group: value.cpu() for group, value in permutations.items() if value.dim() == 1}
        soft = {group: value for group, value in permutations.items() if value.dim() == 2}
        renamed = {}
        for name, tensor in params.items():
            if name not in self.axes:
                raise ShapeError(f"the spec knows no weight or buffer {name!r}; it was made for {', '.join(self.axes)}")
            if self.tied.get(name) in renamed:
                renamed[name] = renamed[self.tied[name]]
                continue
            axes = self.axes[name]
            if tuple(tensor.shape) != tuple(axis.size for axis in axes):
                raise ShapeError(f"{name}: got the shape {tuple(tensor.shape)}, the spec wants {tuple(axis.size for axis in axes)}")
            for dim, axis in enumerate(axes):
                groups = {leaf.name for leaf in leaves(axis) if isinstance(leaf, Group)}
                if groups & hard.keys():
                    tensor = tensor.index_select(dim, index(axis, hard).to(tensor.device))
                if groups & soft.keys():
                    tensor = transform(tensor, dim, axis, {group: value.to(tensor) for group, value in soft.items()})
            renamed[name] = tensor
        return renamed

    def occurrences(self, group: str) -> list[Occurrence]:
        """All the places of a group, in the order of the weights.

        Args:
            group: a key of :attr:`sizes`.
        """
        if group not in self.sizes:
            raise ShapeError(f"no group is called {group!r}; there are {', '.join(self.sizes)}")
        found = []
        for name, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                found += [Occurrence(name, dim, place) for place in positions(axis, group)]
        return found

    def verify(self, model: nn.Module, example_input: Example, *, generator: torch.Generator | None = None) -> None:
        """Check that renaming units at random leaves the function of the network unchanged, at weights that have no symmetries.

        Args:
            model: the network. It is copied and not changed.
            example_input: as in :meth:`from_module`.
            generator: source of randomness, on the CPU.

        Raises:
            UnsupportedModuleError: the output changes. The error names the groups that do it.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        state, outputs = probe(model, example_input, generator)
        expected, permutations = outputs(self.apply(state, {})), self.random(generator=generator)

        def differs(permutations: Mapping[str, Tensor]) -> bool:
            pairs = zip(expected, outputs(self.apply(state, permutations)), strict=True)
            # Rounding grows with the depth of the network; a unit in the wrong place changes the leading digits.
            return any(not torch.allclose(old, new, rtol=1e-7, atol=1e-7 * float(old.abs().max()), equal_nan=True) for old, new in pairs)

        if differs(permutations):
            guilty = [group for group, permutation in permutations.items() if differs({group: permutation})]
            places = "; ".join(f"{group}: {', '.join(sorted({place.name for place in self.occurrences(group)}))}" for group in guilty)
            raise UnsupportedModuleError(
                f"renaming units changes the output of {type(model).__name__}. Groups that do: {places or 'only several together'}. "
                "Wrong are the overrides or the axes given by hand, or the network treats some units by their number; hold those with "
                "overrides={...: 'fixed'}"
            )

    def __repr__(self) -> str:
        groups = ", ".join(f"{group}: {size}" for group, size in self.sizes.items())
        return f"PermutationSpec({groups})"

    def _checked(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for group, value in permutations.items():
            if group not in self.sizes:
                raise ShapeError(f"no group is called {group!r}; there are {', '.join(self.sizes)}")
            size = self.sizes[group]
            hard = not value.is_floating_point()
            if tuple(value.shape) != ((size,) if hard else (size, size)):
                raise ShapeError(
                    f"{group}: a permutation of {size} units is int64 ({size},) or floating ({size}, {size}), got "
                    f"{value.dtype} {tuple(value.shape)}"
                )
            if hard and not torch.equal(value.sort().values, torch.arange(size, device=value.device)):
                raise ShapeError(f"{group}: {value.tolist()} is not a permutation of 0 … {size - 1}")
        return dict(permutations)
