"""Equations to learn from: residuals, initial conditions drawn at random, and reference solvers that can be trusted."""

__all__: list[str] = []
