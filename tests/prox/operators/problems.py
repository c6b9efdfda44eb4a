"""Proximal problems as they are defined, solved by CVXPY: what the tests of the operators compare with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

__all__ = ["points", "solved"]


def points(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(penalty: Callable[[cp.Variable], Any], x: Tensor) -> Tensor:
    """argmin_u penalty(u) + ½‖u − x‖².

    Args:
        penalty: of a CVXPY variable with the shape of x; may also return (expression, constraints).
        x: one point.
    """
    u = cp.Variable(tuple(x.shape))
    value = penalty(u)
    value, constraints = value if isinstance(value, tuple) else (value, [])
    problem = cp.Problem(cp.Minimize(value + cp.sum_squares(u - x.numpy()) / 2), constraints)
    with warnings.catch_warnings():
        # The tolerance asks for all that double precision gives, and the solver says so where that is less.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.from_numpy(np.asarray(u.value))
