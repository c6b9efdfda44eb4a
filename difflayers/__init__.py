"""Differentiable optimization layers."""
__version__ = "0.1.0"
