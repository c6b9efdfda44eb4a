"""Our own engines side by side: what ``solver="auto"`` decides by, and what a warm start saves.

Forward and backward, every parameter batched and differentiated. A warm start is given the solution of the same problem with q moved by
a millionth, so that the active set stays.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.qp_layers import QP, Point, gradients
from benchmarks.qp_problems import box_qp, random_qp
from benchmarks.timing import Table, race
from difflayers.convex import QPSolution, solve_qp

__all__ = ["engines"]


def engines(*, short: bool = False) -> None:
    """Print the table."""
    columns = [("case", 31), ("auto ms", -8), ("daqp ×", -7), ("interior ×", -10), ("warm ×", -7), ("difference", -10)]
    table = Table("Our engines and a warm start, as multiples of auto", columns)
    sizes = [(10, 10, 1), (10, 10, 32)] if short else [(10, 10, 1), (10, 10, 128), (50, 50, 1), (50, 50, 32), (50, 50, 128), (100, 100, 1)]
    sizes += [] if short else [(100, 100, 32), (200, 200, 8), (300, 300, 4), (400, 400, 4), (600, 600, 2), (20, 100, 128), (20, 1000, 8)]
    cases = [(f"n {n}, m {m}, batch {batch}", random_qp(n, m, min(n, m) // 4, batch)) for n, m, batch in sizes]
    cases.append(("box n 63, P shared, batch 64", box_qp(64)))
    for label, problem in cases:
        qp, cotangent = problem.differentiable(), torch.randn_like(problem.q)
        with torch.no_grad():
            previous = solve_qp(*qp._replace(q=qp.q * (1 + 1e-6)))
        layers = {
            "auto": functools.partial(_solve),
            "daqp": functools.partial(_solve, solver="daqp"),
            "interior": functools.partial(_solve, solver="interior_point"),
            "warm": functools.partial(_solve, warm_start=previous),
        }
        slopes = [gradients(layer, qp, cotangent)[1] for layer in layers.values()]
        largest = max(float(slope.norm()) for slope in slopes[0])
        apart = max(float((a - b).norm()) / largest for other in slopes[1:] for a, b in zip(other, slopes[0], strict=True))
        clock = race(
            {name: functools.partial(gradients, layer, qp, cotangent) for name, layer in layers.items()}, budget=0.1 if short else 2.0
        )
        table.row(label, 1e3 * clock.seconds("auto"), *(clock.ratio(name, "auto") for name in ("daqp", "interior", "warm")), apart)


def _solve(qp: QP, solver: str = "auto", warm_start: QPSolution | None = None) -> Point:
    found = solve_qp(*qp, solver=solver, warm_start=warm_start)
    return Point(found.x, found.y, found.z, found.z_box)
