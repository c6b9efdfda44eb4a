r"""Proximal operators, batched and differentiable to second order in x and in their parameters.

.. math:: \operatorname{prox}_{λR}(x) = \arg\min_u \; λ R(u) + \tfrac12 \|u - x\|^2.
"""

from __future__ import annotations

from .total_variation_1d import prox_tv1d

__all__ = ["prox_tv1d"]
