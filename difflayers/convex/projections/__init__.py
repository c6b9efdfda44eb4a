r"""Euclidean projections on convex sets (and two spheres), batched and differentiable to second order.

.. math:: Π_C(x) = \arg\min_{p \in C} \tfrac12 \|p - x\|^2.

Every function projects over the last dimension of x (sets of matrices: the last two). Leading dimensions are a batch, and
parameters broadcast against them. Derivatives are those of the formula, or implicit where an equation is solved, in x and in the
parameters. Π is smooth except at kinks (the boundaries, where a constraint starts to push), and the derivative returned
there is an element of the generalized Jacobian; each docstring says which.

>>> import torch
>>> from difflayers.convex.projections import projection_simplex
>>> x = torch.tensor([0.8, 0.6, -1.0], requires_grad=True)
>>> p = projection_simplex(x)
>>> p.detach()
tensor([0.6000, 0.4000, 0.0000])
>>> torch.autograd.grad(p[0], x)[0]
tensor([ 0.5000, -0.5000,  0.0000])
"""

from __future__ import annotations

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
from .module import Projection
from .power import projection_power_cone
from .second_order import projection_second_order_cone
from .semidefinite import projection_psd_cone
from .simplex import projection_l1_ball, projection_l1_sphere, projection_simplex
from .transport import projection_birkhoff, projection_transport

__all__ = [
    "Projection",
    "projection_affine_set",
    "projection_birkhoff",
    "projection_box",
    "projection_box_section",
    "projection_exponential_cone",
    "projection_halfspace",
    "projection_hyperplane",
    "projection_isotonic",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_polyhedron",
    "projection_power_cone",
    "projection_psd_cone",
    "projection_second_order_cone",
    "projection_simplex",
    "projection_transport",
]
