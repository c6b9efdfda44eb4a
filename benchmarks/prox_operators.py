"""Proximal operators beside pyproximal's: time, and by how much each misses the minimum of the problem that defines the operator.

``python -m benchmarks.prox_operators``. The excess is that of the objective λR(u) + ½‖u − x‖² of the first row over the best
value known: that of CVXPY's solution for a convex R, of a fine grid for an R that acts entry by entry, and of the contestants themselves.
pyproximal is a NumPy library without derivatives; it takes one vector at a time, so operators of vectors are called in a loop. It is
optional, and needs pylops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, race
from difflayers.prox.operators import (
    group_sparse_envelope,
    prox_group_lasso,
    prox_group_sparse,
    prox_huber,
    prox_l0,
    prox_l2,
    prox_log,
    prox_lp,
    prox_nuclear,
    soft_threshold,
)

LAM = 0.6
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Case:
    """One operator.

    Args:
        name: of our function.
        ours: on a batch of points.
        penalty: R of a batch of points, ``(*batch,)``.
        peer: makes pyproximal's operator, of one point as a flat array; None where it has none.
        flat: the peer acts entry by entry, and takes the whole batch at once.
        convex: R in CVXPY, of one point; None where a grid is the reference.
        shape: of one point.
    """

    name: str
    ours: Callable[[Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor]
    peer: Callable[[Any], Callable[[Array], Array]] | None = None
    flat: bool = False
    convex: Callable[[cp.Variable], cp.Expression] | None = None
    shape: tuple[int, ...] = (200,)


def cases(n: int, side: int) -> list[Case]:
    """The operators, on n entries or matrices of ``side`` rows and columns."""
    groups = torch.arange(n) % (n // 4)
    members = [[j + i * (n // 4) for i in range(4)] for j in range(n // 4)]
    return [
        Case(
            "soft_threshold",
            lambda x: soft_threshold(x, LAM),
            lambda u: u.abs().sum(-1),
            lambda peer: lambda x: peer.L1(sigma=LAM).prox(x, 1.0),
            True,
            cp.norm1,
            (n,),
        ),
        Case(
            "prox_l0",
            lambda x: prox_l0(x, LAM),
            lambda u: (u != 0).double().sum(-1),
            lambda peer: lambda x: peer.L0(sigma=LAM).prox(x, 1.0),
            True,
            shape=(n,),
        ),
        Case(
            "prox_log",
            lambda x: prox_log(x, LAM, 0.5),
            lambda u: torch.log1p(u.abs() / 0.5).sum(-1),
            lambda peer: lambda x: peer.Log(sigma=LAM * np.log(3.0), gamma=2.0).prox(x, 1.0),
            True,
            shape=(n,),
        ),
        Case("prox_lp, p = 0.5", lambda x: prox_lp(x, LAM, 0.5), lambda u: u.abs().sqrt().sum(-1), shape=(n,)),
        Case(
            "prox_huber",
            lambda x: prox_huber(x, LAM / 0.7, 0.7),
            lambda u: torch.where(u.abs() <= 0.7, u.square() / 1.4, u.abs() - 0.35).sum(-1),
            lambda peer: lambda x: peer.Huber(alpha=0.7).prox(x, LAM),
            True,
            lambda u: cp.sum(cp.huber(u, 0.7)) / 1.4,
            (n,),
        ),
        Case(
            "prox_l2",
            lambda x: prox_l2(x, LAM),
            lambda u: torch.linalg.vector_norm(u, dim=-1),
            lambda peer: lambda x: peer.Euclidean(sigma=LAM).prox(x, 1.0),
            convex=cp.norm2,
            shape=(n,),
        ),
        Case(
            "prox_group_lasso",
            lambda x: prox_group_lasso(x, LAM, groups),
            lambda u: torch.linalg.vector_norm(u.unflatten(-1, (4, -1)), dim=-2).sum(-1),
            lambda peer: lambda x: peer.L21(ndim=4, sigma=LAM).prox(x, 1.0),
            convex=lambda u: sum(cp.norm2(u[group]) for group in members),
            shape=(n,),
        ),
        Case(
            "prox_group_sparse",
            lambda x: prox_group_sparse(x, LAM, n // 10),
            lambda u: group_sparse_envelope(u, n // 10),
            shape=(n,),
        ),
        Case(
            "prox_nuclear",
            lambda x: prox_nuclear(x, LAM),
            lambda u: torch.linalg.svdvals(u).sum(-1),
            lambda peer: lambda x: peer.Nuclear((side, side), sigma=LAM).prox(x, 1.0),
            convex=cp.normNuc,
            shape=(side, side),
        ),
    ]


def run(case: Case, batch: int, table: Table, budget: float, peer: Any) -> None:
    """One row of the table."""
    x = torch.randn(batch, *case.shape, generator=torch.Generator().manual_seed(0))
    array = x.numpy()

    def both() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(case.ours(leaf).square().sum(), leaf)[0]

    contestants: dict[str, Callable[[], Any]] = {"ours": lambda: case.ours(x), "both": both}
    if peer is not None and case.peer is not None:
        operator = case.peer(peer)

        def theirs() -> Array:
            if case.flat:
                return operator(array.ravel()).reshape(array.shape)
            return np.stack([operator(row.ravel()).reshape(case.shape) for row in array])

        contestants["peer"] = theirs
    core = tuple(range(1, x.dim()))

    def objective(u: Tensor) -> Tensor:
        return LAM * case.penalty(u) + (u - x[: len(u)]).square().sum(core[: u.dim() - 1]) / 2

    values = {"ours": objective(case.ours(x))[0]}
    if "peer" in contestants:
        values["peer"] = objective(torch.from_numpy(np.asarray(contestants["peer"]())))[0]
    best = min(float(value) for value in [*values.values(), reference(case, x[0], objective)])
    times = race(contestants, budget=budget)
    table.row(
        case.name,
        "×".join(map(str, x.shape)),
        1e3 * times.seconds("ours"),
        times.ratio("both", "ours"),
        times.ratio("peer", "ours") if "peer" in values else None,
        float(values["ours"]) - best,
        float(values["peer"]) - best if "peer" in values else None,
    )


def reference(case: Case, x: Tensor, objective: Callable[[Tensor], Tensor]) -> float:
    """The least value of the objective that is found otherwise, for one point."""
    if case.convex is not None:
        u = cp.Variable(tuple(x.shape))
        problem = cp.Problem(cp.Minimize(LAM * case.convex(u) + cp.sum_squares(u - x.numpy()) / 2))
        problem.solve(solver=cp.CLARABEL)
        return float(objective(torch.from_numpy(np.asarray(u.value)).unsqueeze(0))[0])
    if case.name == "prox_group_sparse":
        # The dual problem: prox and the prox of the conjugate, half the sum of the k largest squares, add up to x.
        y = cp.Variable(tuple(x.shape))
        conjugate = cp.sum_largest(cp.square(y), len(x) // 10) / (2 * LAM)
        cp.Problem(cp.Minimize(conjugate + cp.sum_squares(y - x.numpy()) / 2)).solve(solver=cp.CLARABEL)
        return float(objective((x - torch.from_numpy(np.asarray(y.value))).unsqueeze(0))[0])
    grid = torch.cat([torch.linspace(-6, 6, 120_001), torch.zeros(1)]).unsqueeze(-1)
    penalty = LAM * case.penalty(grid)
    return sum(float((penalty + (grid[:, 0] - entry).square() / 2).min()) for entry in x)


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["cvxpy", "pyproximal"])
    peer = None
    if installed("pyproximal"):
        import pyproximal as peer
    columns = [("operator", 18), ("size", 10), ("ours ms", -8), ("and backward ×", -14), ("pyproximal ×", -12)]
    table = Table("Proximal operators: forward, and excess of the objective", [*columns, ("excess", -8), ("pyproximal's", -12)])
    for case in cases(40, 8) if short else cases(200, 30):
        run(case, 4 if short else 64, table, 0.3 if short else 2.0, peer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
