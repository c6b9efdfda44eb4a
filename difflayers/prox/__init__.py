"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators

__all__ = ["operators"]
