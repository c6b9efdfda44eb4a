"""Projections with an algorithm of their own beside the same projection by ``solve_qp``: time, and errors of values and gradients.

``python -m benchmarks.projections``. The references are found by bisection, or by the minimax formula of isotonic regression, in
extended precision; their gradients follow from the active set that they show.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, one_thread, race
from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_box_section, projection_isotonic, projection_simplex

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One projection of rows ``(B, n)``, ours, by a quadratic program, and a reference ``x -> (point, Jacobian of one row)``."""

    name: str
    ours: Layer
    qp: Layer
    reference: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def simplex(n: int) -> Case:
    zero, ones, one = torch.zeros(n), torch.ones(1, n), torch.ones(1)
    weights = np.ones(n, np.longdouble)
    return Case(
        "simplex",
        projection_simplex,
        lambda x: solve_qp(torch.eye(n), -x, A=ones, b=one, lb=zero).x,
        lambda x: _box_section(x, 0 * weights, weights * np.inf, weights, 1.0),
    )


def box_section(n: int) -> Case:
    w = torch.randn(n, generator=torch.Generator().manual_seed(1))
    bound = torch.full((n,), 0.5)
    return Case(
        "box section",
        lambda x: projection_box_section(x, (-bound, bound, w, 1.0)),
        lambda x: solve_qp(torch.eye(n), -x, A=w.unsqueeze(0), b=torch.ones(1), lb=-bound, ub=bound).x,
        lambda x: _box_section(
            x, -bound.numpy().astype(np.longdouble), bound.numpy().astype(np.longdouble), w.numpy().astype(np.longdouble), 1.0
        ),
    )


def isotonic(n: int) -> Case:
    G = torch.eye(n - 1, n) - torch.eye(n - 1, n).roll(1, -1)

    def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.concatenate([[0], np.cumsum(x)])
        start, end = np.ogrid[:n, :n]
        means = np.where(end >= start, (sums[None, 1:] - sums[:n, None]) / np.maximum(end - start + 1, 1), np.inf)
        # p_i = max over a ≤ i of min over b ≥ i of the mean of x_a … x_b.
        point = np.array([np.minimum.accumulate(means[:, ::-1], 1)[:, ::-1][: i + 1, i].max() for i in range(n)])
        same = np.abs(point[:, None] - point) <= 1e-12
        return point, same / same.sum(1, keepdims=True)

    return Case("isotonic", projection_isotonic, lambda x: solve_qp(torch.eye(n), -x, G, torch.zeros(n - 1)).x, reference)


def _box_section(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, w: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.longdouble(-1e4), np.longdouble(1e4)
    for _ in range(200):
        tau = (low + high) / 2
        if (w * np.clip(x - tau * w, lower, upper)).sum() > c:
            low = tau
        else:
            high = tau
    point = np.clip(x - tau * w, lower, upper)
    free = np.where((point > lower) & (point < upper), w, 0)
    return point, np.diag((free != 0).astype(np.longdouble)) - np.outer(free, free) / (free**2).sum()


def run(case: Case, batch: int, n: int, table: Table, budget: float) -> None:
    """One row of the table."""
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(0))
    cotangent = torch.linspace(-1, 1, n)
    exact = [case.reference(row.numpy().astype(np.longdouble)) for row in x[:4]]

    def both(layer: Layer) -> Callable[[], tuple[Tensor, Tensor]]:
        def once() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            point = layer(leaf)
            return point, torch.autograd.grad(point, leaf, cotangent.expand_as(point))[0]

        return once

    contestants = {"ours": both(case.ours), "qp": both(case.qp)}
    errors = []
    for contestant in contestants.values():
        point, slope = contestant()
        values = max(float(np.abs(row.detach().numpy() - truth).max()) for row, (truth, _) in zip(point[:4], exact, strict=True))
        slopes = max(float(np.abs(row.numpy() - J.T @ cotangent.numpy()).max()) for row, (_, J) in zip(slope[:4], exact, strict=True))
        errors += [values, slopes]
    times = race(contestants, budget=budget)
    table.row(case.name, batch, n, 1e3 * times.seconds("ours"), times.ratio("qp", "ours"), *errors)


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["scipy"])
    columns = [("set", 12), ("batch", -5), ("n", -5), ("ours ms", -9), ("solve_qp ×", -10)]
    columns += [("error", -8), ("gradient", -8), ("qp error", -8), ("qp grad.", -8)]
    table = Table("Projections, forward and backward", columns)
    for batch, n in ((128, 10),) if short else ((1, 10), (128, 10), (128, 100), (8, 500)):
        for make in (simplex, box_section, isotonic):
            run(make(n), batch, n, table, 0.5 if short else 2.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
