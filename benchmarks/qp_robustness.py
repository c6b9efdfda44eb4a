"""What QP layers do with problems that have no solution, or one that is hard to find.

Each problem shares a batch with an ordinary one, whose fate is told, too. The solution is planted: x, the active rows and
their multipliers are drawn first, then q and h are chosen so that they satisfy the optimality conditions. The exact gradient in q
follows from the flat directions Z, in which no active row moves: dq = −Z (ZᵀPZ)⁻¹ Zᵀ dx.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.qp_layers import PEERS, QP, Layer, gradients, ours, times
from benchmarks.timing import Table, installed
from difflayers import Status

__all__ = ["robustness"]

_RIGHT = 1e-5  # a larger error of x, or relative error of the gradient, is called wrong


class Planted(NamedTuple):
    """A batch of two: an ordinary problem and a hard one, their solutions ``x`` and active rows of G."""

    name: str
    qp: QP
    x: Tensor
    active: Tensor
    solvable: bool = True


def robustness() -> None:
    """Print what each contestant does with each problem."""
    contestants: dict[str, Layer | None] = {"ours": ours, "ours, on_failure='nan'": functools.partial(ours, on_failure="nan")}
    contestants |= {name: layer if installed(package) else None for name, (package, layer) in PEERS.items() if name != "tight"}
    columns = [("the problem", 21), ("contestant", 22), ("what it does", 67), ("its neighbour in the batch", 28)]
    table = Table("Robustness: a hard problem beside an ordinary one", columns)
    for case in _planted():
        for name, layer in contestants.items():
            table.row(case.name, name, *(("not installed", None) if layer is None else _verdicts(layer, case)))


def _planted() -> Iterator[Planted]:
    n, m, p = 6, 6, 2
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(7))
    root, G, A, x = draw(2, n, n), draw(2, m, n), draw(2, p, n), draw(2, n)
    P = root @ root.mT / n + 0.1 * torch.eye(n)
    three = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]).expand(2, m)

    def plant(name: str, *, P: Tensor = P, G: Tensor = G, A: Tensor = A, z: Tensor = three) -> Planted:
        q = -(times(P, x) + times(A.mT, draw(2, p)) + times(G.mT, z))
        return Planted(name, QP(P, q, G, times(G, x) + (z == 0), A, times(A, x)), x, z > 0)

    def hard(ordinary: Tensor, change: Tensor) -> Tensor:
        return torch.stack((ordinary[0], change))

    clash = plant("infeasible", G=hard(G, torch.cat((G[1, :4], G[1, :1], -G[1, :1]))))
    limits = hard(clash.qp.h, torch.cat((clash.qp.h[1, :4], -torch.ones(2))))  # gᵀx ≤ −1 and −gᵀx ≤ −1
    yield clash._replace(qp=clash.qp._replace(h=limits), solvable=False)
    ray = torch.linalg.svd(A[1]).Vh[-1]
    falling = plant("unbounded", P=hard(P, torch.zeros(n, n)), G=hard(G, -ray.expand(m, n)))
    yield falling._replace(qp=falling.qp._replace(q=hard(falling.qp.q, -ray)), solvable=False)
    yield plant("linear program", P=hard(P, torch.zeros(n, n)), z=hard(three, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])))
    yield plant("singular P", P=hard(P, root[1, :, :2] @ root[1, :, :2].mT))
    yield plant("redundant equality", A=hard(A, A[1, :1].expand(p, n)))
    yield plant("duplicate active rows", G=hard(G, torch.cat((G[1, :2], G[1, 1:2], G[1, 3:]))))


def _verdicts(layer: Layer, case: Planted) -> tuple[str, str | None]:
    """What became of the hard problem, and of the ordinary one."""
    qp = case.qp.differentiable()
    cotangent = torch.randn(qp.q.shape, generator=torch.Generator().manual_seed(0))
    try:
        point, found, said = gradients(layer, qp, cotangent)
    except Exception as error:  # whatever a contestant raises is its result
        detail = f" for {error.indices}" if hasattr(error, "indices") else f": {str(error).strip().splitlines()[-1][:44]}"
        return f"raises {type(error).__name__}{detail}", None
    x, in_q = point.x.detach(), found[1]
    preface = "" if point.status is None else f"{Status(int(point.status[1])).name}, "
    preface += "a warning is printed, " if said else ""
    judge = functools.partial(_judge, case, x, in_q, cotangent)
    if case.solvable:
        return preface + judge(1), judge(0)
    gradient = "zero" if not any(bool(part[1].any()) for part in found) else "finite"
    if not all(bool(torch.isfinite(part[1]).all()) for part in found):
        gradient = "not finite"
    if bool(x[1].isnan().all()):
        return f"{preface}x = NaN, gradient {gradient}", judge(0)
    violation = float((times(case.qp.G, x) - case.qp.h)[1].clamp(min=0).max())
    return f"{preface}x of size {float(x[1].abs().max()):.0e}, violation {violation:.0e}, gradient {gradient}", judge(0)


def _judge(case: Planted, x: Tensor, in_q: Tensor, cotangent: Tensor, i: int) -> str:
    """Element i's x against the planted one, its gradient in q against the formula."""
    P, A, G = case.qp.P[i], case.qp.A[i], case.qp.G[i]
    _, sizes, basis = torch.linalg.svd(torch.cat((A, G[case.active[i]])))
    Z = basis[int((sizes > 1e-10).sum()) :].mT
    exact = -Z @ torch.linalg.solve(Z.mT @ P @ Z, Z.mT @ cotangent[i])
    off = float((x[i] - case.x[i]).abs().max())
    gradient = float((in_q[i] - exact).norm() / exact.norm().clamp(min=1e-3))
    if not off <= _RIGHT:
        return f"WRONG x, off by {off:.0e}"
    if math.isnan(gradient):
        return "right, gradient NaN"
    return f"right, gradient WRONG by {gradient:.0e}" if not gradient <= _RIGHT else f"right ({off:.0e}, gradient {gradient:.0e})"
