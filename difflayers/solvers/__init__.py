"""How a solution is found: batched loops that stop element by element."""

from __future__ import annotations

from . import linear
from .fixed_point import anderson, broyden, picard
from .newton import newton

__all__ = ["anderson", "broyden", "linear", "newton", "picard"]
