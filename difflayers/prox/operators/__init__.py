r"""Proximal operators, batched and differentiable to second order in x and in their parameters.

.. math:: \operatorname{prox}_{λR}(x) = \arg\min_u \; λ R(u) + \tfrac12 \|u - x\|^2.
"""

from __future__ import annotations

from .total_variation_1d import prox_tv1d
from .total_variation_2d import TotalVariationSolution, prox_tv2d, solve_tv2d

__all__ = ["TotalVariationSolution", "prox_tv1d", "prox_tv2d", "solve_tv2d"]
