r"""Proximal operators, batched and differentiable to second order in x and in their parameters.

.. math:: \operatorname{prox}_{λR}(x) = \arg\min_u \; λ R(u) + \tfrac12 \|u - x\|^2.

Operators that act entry by entry (thresholds, Huber's function, log and lp penalties) take x of any shape, and weights that broadcast
against it. The others act on the last dimension (the nuclear norm on the last two), take any leading dimensions as a batch, and weights
of the shape ``(*batch,)``.

>>> import torch
>>> from difflayers.prox.operators import soft_threshold
>>> x, lam = torch.tensor([-2.0, 0.3, 1.5]), torch.tensor(0.5, requires_grad=True)
>>> p = soft_threshold(x, lam)
>>> p.detach()
tensor([-1.5000,  0.0000,  1.0000])
>>> torch.autograd.grad(p[0], lam)[0]
tensor(1.)
"""

from __future__ import annotations

from .calculus import moreau_envelope, prox_affine, prox_conjugate, prox_indicator
from .envelope import group_sparse_envelope, prox_group_sparse
from .groups import prox_group_lasso
from .module import Prox
from .norms import prox_elastic_net, prox_huber, prox_l2, prox_linf, prox_squared_l2
from .penalties import prox_log, prox_lp
from .spectral import prox_nuclear
from .thresholds import firm_threshold, hard_threshold, prox_l0, soft_threshold, top_k_abs
from .total_variation_1d import prox_tv1d
from .total_variation_2d import TotalVariationSolution, prox_tv2d, solve_tv2d

__all__ = [
    "Prox",
    "TotalVariationSolution",
    "firm_threshold",
    "group_sparse_envelope",
    "hard_threshold",
    "moreau_envelope",
    "prox_affine",
    "prox_conjugate",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_group_sparse",
    "prox_huber",
    "prox_indicator",
    "prox_l0",
    "prox_l2",
    "prox_linf",
    "prox_log",
    "prox_lp",
    "prox_nuclear",
    "prox_squared_l2",
    "prox_tv1d",
    "prox_tv2d",
    "soft_threshold",
    "solve_tv2d",
    "top_k_abs",
]
