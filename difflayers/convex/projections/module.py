"""Any projection as a module: a constraint for the output of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...holding import hold
from .affine import projection_affine_set, projection_polyhedron
from .balls import (
    projection_box,
    projection_halfspace,
    projection_hyperplane,
    projection_l2_ball,
    projection_l2_sphere,
    projection_linf_ball,
    projection_non_negative,
)
from .box_section import projection_box_section
from .exponential import projection_exponential_cone
from .isotonic import projection_isotonic
from .power import projection_power_cone
from .second_order import projection_second_order_cone
from .semidefinite import projection_psd_cone
from .simplex import projection_l1_ball, projection_l1_sphere, projection_simplex
from .transport import projection_birkhoff, projection_transport

__all__ = ["Projection"]


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__).removeprefix("projection_")


# The names of the parameters that a function takes as one tuple.
_TUPLES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    projection_affine_set: ("A", "b"),
    projection_box: ("lower", "upper"),
    projection_box_section: ("lower", "upper", "w", "c"),
    projection_halfspace: ("a", "b"),
    projection_hyperplane: ("a", "b"),
    projection_polyhedron: ("A", "b", "G", "h"),
    projection_transport: ("a", "b"),
}
_OPTIONAL = {projection_polyhedron}

_SETS: dict[str, Callable[..., Tensor]] = {
    _name(function): function
    for function in (
        *_TUPLES,
        projection_birkhoff,
        projection_exponential_cone,
        projection_isotonic,
        projection_l1_ball,
        projection_l1_sphere,
        projection_l2_ball,
        projection_l2_sphere,
        projection_linf_ball,
        projection_non_negative,
        projection_power_cone,
        projection_psd_cone,
        projection_second_order_cone,
        projection_simplex,
    )
}


class Projection(nn.Module):
    """The projection on one set as a module: ``forward(x)`` is the nearest point of the set.

    Args:
        constraint: the name of a set ("simplex", "l2_ball", "box", …: a function of this package without the prefix ``projection_``),
            or any function ``(x, **parameters) -> x``.
        parameters: what the function takes after x, by name. Those that it takes as a tuple are given one by one: ``lower`` and
            ``upper`` of a box, ``a`` and ``b`` of a hyperplane, half-space or transport polytope, ``A`` and ``b`` of an affine set, ``A``,
            ``b``, ``G`` and ``h`` of a polyhedron, ``lower``, ``upper``, ``w`` and ``c`` of a box section. Tensors become buffers,
            an ``nn.Parameter`` is learned, and anything else is passed on as it is.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import Projection
        >>> Projection("simplex", value=2.0)(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
        tensor([[0., 2.],
                [1., 1.]])
        >>> radius = torch.nn.Parameter(torch.tensor(1.0))
        >>> Projection("l2_ball", max_value=radius)(torch.tensor([3.0, 4.0])).detach()
        tensor([0.6000, 0.8000])
    """

    def __init__(self, constraint: str | Callable[..., Tensor], **parameters: Any) -> None:
        super().__init__()
        if isinstance(constraint, str):
            if constraint not in _SETS:
                raise ValueError(f"the set {constraint!r} is not known; choose one of {', '.join(sorted(_SETS))}, or pass a function")
            constraint = _SETS[constraint]
        self.function = constraint
        names = _TUPLES.get(constraint, ())
        missing = [name for name in names if name not in parameters]
        if missing and constraint not in _OPTIONAL:
            raise ValueError(f"{_name(constraint)} needs {', '.join(names)}; missing: {', '.join(missing)}")
        self.names = tuple(parameters)
        self.options = {}
        for name, value in parameters.items():
            if isinstance(value, Tensor):
                hold(self, name, value)
            else:
                self.options[name] = value

    def forward(self, x: Tensor) -> Tensor:
        """The nearest point of the set, of the shape that the function gives.

        Args:
            x: ``(*batch, n)``, or ``(*batch, m, n)`` for sets of matrices.
        """
        parameters = {name: self.options[name] if name in self.options else getattr(self, name) for name in self.names}
        names = _TUPLES.get(self.function)
        if names is None:
            return self.function(x, **parameters)
        values = tuple(parameters.pop(name, None) for name in names)
        return self.function(x, values, **parameters)

    def extra_repr(self) -> str:
        """The set, the numbers, and the shapes of the tensors."""
        shown = [repr(_name(self.function))]
        for name in self.names:
            value = self.options[name] if name in self.options else tuple(getattr(self, name).shape)
            shown.append(f"{name}={value!r}" if name in self.options else f"{name}: {value}")
        return ", ".join(shown)
