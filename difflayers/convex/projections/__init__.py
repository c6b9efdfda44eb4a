"""Projections."""

from __future__ import annotations

from .exponential import projection_exponential_cone
from .power import projection_power_cone
from .second_order import projection_second_order_cone
from .semidefinite import projection_psd_cone

__all__ = ["projection_exponential_cone", "projection_power_cone", "projection_psd_cone", "projection_second_order_cone"]
