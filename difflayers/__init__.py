"""Layers that solve: drop-in ``nn.Module`` layers whose forward pass solves a problem and whose backward pass is exact.

A layer is a solver, a residual F(x, θ) = 0 that its solution x satisfies, and the implicit function theorem,
∂x/∂θ = −(∂F/∂x)⁻¹ ∂F/∂θ. Nothing of the solver's iterations is kept, and derivatives of any order, forward or
reverse, in any nest of ``torch.func`` transforms, come from one core.

>>> import torch
>>> from difflayers import QPLayer
>>> project = QPLayer()                                     # min ½‖x − y‖² on the probability simplex
>>> y = torch.tensor([[0.8, 0.6, -1.0]], requires_grad=True)
>>> x = project(torch.eye(3), -y, A=torch.ones(1, 3), b=torch.ones(1), lb=torch.zeros(3))
>>> x.detach()
tensor([[0.6000, 0.4000, 0.0000]])
>>> torch.autograd.grad(x[0, 0], y)[0]
tensor([[ 0.5000, -0.5000,  0.0000]])

========================= ==========================================================================
``difflayers.convex``     quadratic programs: :class:`QPLayer`, ``solve_qp``; conic programs: ``solve_cone``; problems
                          written in CVXPY: :class:`CvxpyLayer`; ``projections`` on convex sets: :class:`Projection`
``difflayers.sorting``    sorting, ranking and top-k that gradients pass through: :class:`SortingNetwork`
``difflayers.transport``  optimal transport plans at any temperature: :class:`SinkhornLayer`, ``sinkhorn``; sparse ones:
                          :class:`SparseTransportLayer`, ``sparse_transport``
``difflayers.rebasin``    trained networks brought together modulo permutations of hidden units: :class:`SinkhornRebasin`
``difflayers.prox``       proximal ``operators``: :class:`Prox`; networks that are proximal operators: :class:`LearnedProximalNetwork`;
                          plug-and-play reconstruction: :class:`PlugAndPlay`
``difflayers.morphology`` skeletons that gradients can pass through: :class:`Skeletonize`; soft clDice, Betti numbers
``difflayers.pde``        physics as a hard constraint inside a network: :class:`HardConstraint`, a mixture of experts that are:
                          :class:`MixtureOfConstraints`; conservation laws
``difflayers.implicit``   the core: ``implicit_root``, ``implicit_fixed_point``, ``custom_root``,
                          ``linear_solve``, ``conditions``
``difflayers.solvers``    how a solution is found: batched loops that stop element by element
``difflayers.errors``     what can go wrong, and what each error carries
========================= ==========================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .solution import Solution, Status

if TYPE_CHECKING:
    from . import convex, implicit, morphology, pde, prox, rebasin, solvers, sorting, transport
    from .convex import CvxpyLayer, Projection, QPLayer
    from .morphology import Skeletonize
    from .pde import ConservationProjection, HardConstraint, LinearConstraint, MixtureOfConstraints
    from .prox import (
        ConvexGradientNetwork,
        ConvolutionalInputConvexNN,
        InputConvexNN,
        LearnedProximalNetwork,
        NonexpansiveProximalNetwork,
        PlugAndPlay,
        Prox,
        ProximalMatchingLoss,
    )
    from .rebasin import SinkhornRebasin
    from .sorting import SortingNetwork
    from .transport import SinkhornLayer, SparseTransportLayer

__version__ = "0.1.0"

__all__ = [
    "ConservationProjection",
    "ConvexGradientNetwork",
    "ConvolutionalInputConvexNN",
    "CvxpyLayer",
    "HardConstraint",
    "InputConvexNN",
    "LearnedProximalNetwork",
    "LinearConstraint",
    "MixtureOfConstraints",
    "NonexpansiveProximalNetwork",
    "PlugAndPlay",
    "Projection",
    "Prox",
    "ProximalMatchingLoss",
    "QPLayer",
    "SinkhornLayer",
    "SinkhornRebasin",
    "Skeletonize",
    "Solution",
    "SortingNetwork",
    "SparseTransportLayer",
    "Status",
    "__version__",
    "convex",
    "errors",
    "implicit",
    "morphology",
    "pde",
    "prox",
    "rebasin",
    "solvers",
    "sorting",
    "transport",
]

# Where the layers are: a family is imported when it is first used.
_FAMILY = {
    "ConservationProjection": "pde",
    "ConvexGradientNetwork": "prox",
    "ConvolutionalInputConvexNN": "prox",
    "CvxpyLayer": "convex",
    "HardConstraint": "pde",
    "InputConvexNN": "prox",
    "LinearConstraint": "pde",
    "MixtureOfConstraints": "pde",
    "LearnedProximalNetwork": "prox",
    "NonexpansiveProximalNetwork": "prox",
    "PlugAndPlay": "prox",
    "Projection": "convex",
    "Prox": "prox",
    "ProximalMatchingLoss": "prox",
    "QPLayer": "convex",
    "SinkhornLayer": "transport",
    "SinkhornRebasin": "rebasin",
    "Skeletonize": "morphology",
    "SortingNetwork": "sorting",
    "SparseTransportLayer": "transport",
}


def __getattr__(name: str) -> Any:
    if name in _FAMILY:
        value = globals()[name] = getattr(import_module(f".{_FAMILY[name]}", __name__), name)
        return value
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
