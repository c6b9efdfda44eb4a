"""The QP layer beside qpth, moreau and proxsuite's QPLayer: forward and backward, float64, one thread.

Random problems with every parameter batched and differentiated, the same with P, G and A shared by the batch, five times as
many rows as unknowns, and the box problem of total variation. Beside each time stand two errors, the worst over the batch:

* KKT: the largest entry of the optimality conditions at the returned primal and dual point, in the data as given;
* gradient: relative, of each element in each parameter, against an exact reference.

The reference owes nothing to a contestant but the guess of an active set. One LU factorization per element solves the linear KKT
system of that set, the signs of its multipliers and slacks prove that the solution is the optimum, and torch differentiates through the LU.

Run as ``python -m benchmarks.qp``: ``--all`` for larger sizes, ``--short`` for a smoke run.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

from benchmarks.qp_engines import engines
from benchmarks.qp_layers import PEERS, QP, Layer, Point, gradients, ours, times
from benchmarks.qp_problems import box_qp, random_qp
from benchmarks.qp_robustness import robustness
from benchmarks.timing import Table, describe_machine, installed, one_thread, race

__all__ = ["main"]


def main(*, short: bool = False, everything: bool = False) -> None:
    """Print all the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)  # proxsuite's layer makes its gradients in the default dtype, whatever came in
    describe_machine(["qpth", "proxsuite", "moreau", "daqp"])
    sizes, batches = ((10,), (1, 8)) if short else ((10, 50, 100), (1, 32, 128))
    if everything:
        sizes, batches = (10, 50, 100, 200), (1, 32, 128, 512)
    last, budget = batches[-1], 0.1 if short else 3.0
    grid = [(n, batch) for n in sizes for batch in batches if n * n * batch <= 6e6]
    batched = [(f"n {n}, batch {batch}", random_qp(n, n, n // 4, batch)) for n, batch in grid]
    speed("m = n rows, p = n/4 equations, all parameters batched", batched, budget)
    others = [(f"shared P, G, A, n {n}, batch {last}", random_qp(n, n, n // 4, last, shared=True)) for n in sizes[1:] or sizes]
    others += [(f"n 20, m 100, batch {batch}", random_qp(20, 100, 5, batch)) for batch in batches]
    others += [(f"box n 63, P shared, batch {batch}", box_qp(batch)) for batch in batches]
    speed("Other shapes", others, budget)
    engines(short=short)
    robustness()


def speed(title: str, cases: list[tuple[str, QP]], budget: float) -> None:
    """Time ours and the peers on each case; a peer's time is printed as a multiple of ours."""
    columns = [("case", 31), ("ours ms", -7), ("KKT", -6), ("gradient", -8)]
    for name in PEERS:
        columns += [(f"{name} ×", -13), ("KKT", -6), ("gradient", -8)]
    table = Table(title, columns)
    layers: dict[str, Layer | None] = {"ours": ours}
    layers |= {name: layer if installed(package) else None for name, (package, layer) in PEERS.items()}
    for label, qp in cases:
        qp = qp.differentiable()
        cotangent = torch.randn(qp.q.shape, generator=torch.Generator().manual_seed(0))
        results = {name: _attempt(layer, qp, cotangent) for name, layer in layers.items()}
        points = [result[0] for result in results.values() if not isinstance(result, str)]
        exact = next((found for point in points if (found := reference(qp, cotangent, point)) is not None), None)
        runs = {
            name: functools.partial(gradients, layers[name], qp, cotangent)
            for name, result in results.items()
            if not isinstance(result, str)
        }
        clock = race(runs, budget=budget)
        cells: list[object] = [label]
        for name, result in results.items():
            if isinstance(result, str):
                cells += [result, None, None]
                continue
            cells.append(1e3 * clock.seconds(name) if name == "ours" else clock.ratio(name, "ours") if "ours" in runs else "?")
            cells += [kkt_residual(qp, result[0]), "no proof" if exact is None else gradient_error(qp, result[1], exact)]
        table.row(*cells)


def _attempt(layer: Layer | None, qp: QP, cotangent: Tensor) -> tuple[Point, tuple[Tensor, ...]] | str:
    if layer is None:
        return "not installed"
    try:
        return gradients(layer, qp, cotangent)[:2]
    except Exception as error:  # whatever a contestant raises is its result
        return type(error).__name__


def kkt_residual(qp: QP, point: Point) -> float:
    """The largest entry of the optimality conditions over the batch."""
    x, rows = point.x, []
    gradient = times(qp.P, x) + qp.q
    if qp.A is not None:
        gradient = gradient + times(qp.A.mT, point.y)
        rows.append(times(qp.A, x) - qp.b)
    if qp.G is not None:
        gradient = gradient + times(qp.G.mT, point.z)
        rows.append(torch.minimum(point.z, qp.h - times(qp.G, x)))
    if qp.lb is not None:
        gradient = gradient + point.z_box
        rows += [torch.minimum(point.z_box.clamp(min=0), qp.ub - x), torch.minimum((-point.z_box).clamp(min=0), x - qp.lb)]
    return float(torch.cat([gradient, *rows], -1).detach().abs().max())


def reference(qp: QP, cotangent: Tensor, guess: Point) -> tuple[Tensor, ...] | None:
    """The exact gradients, or None if no active set near the guess can be proved optimal, or the optimum is degenerate."""
    batch, n = qp.q.shape
    if qp.lb is None:
        C, d, z = qp.G.expand(batch, -1, n), qp.h, guess.z
    else:
        C, d = torch.cat((-torch.eye(n), torch.eye(n))).expand(batch, -1, n), torch.cat((-qp.lb, qp.ub), -1)
        z = torch.cat((-guess.z_box, guess.z_box), -1).clamp(min=0)
    P = ((qp.P + qp.P.mT) / 2).expand(batch, n, n)
    A, b = (C[:, :0], d[:, :0]) if qp.A is None else (qp.A.expand(batch, -1, n), qp.b)
    active = z > d - times(C, guess.x)
    solutions = [_on_active_set(*(part[i] for part in (P, qp.q, A, b, C, d, active))) for i in range(batch)]
    if any(x is None for x in solutions):
        return None
    return torch.autograd.grad(torch.stack(solutions), qp.leaves, cotangent)


def _on_active_set(P: Tensor, q: Tensor, A: Tensor, b: Tensor, C: Tensor, d: Tensor, active: Tensor) -> Tensor | None:
    n, p = len(q), len(b)
    for _ in range(20):
        rows = torch.cat((A, C[active]))
        corner = rows.new_zeros(len(rows), len(rows))
        K = torch.cat((torch.cat((P, rows.mT), 1), torch.cat((rows, corner), 1)))
        w, singular = torch.linalg.solve_ex(K, torch.cat((-q, b, d[active])))
        if singular:
            return None
        z = torch.zeros_like(d).masked_scatter(active, w[n + p :]).detach()
        slack = torch.where(active, 0, d - C @ w[:n]).detach()
        if bool((torch.maximum(z, slack) > 1e-7).all()):
            return w[:n]  # proved: P is definite and every row has a multiplier or a slack of the right sign, with a margin
        active = z > slack
    return None


def gradient_error(qp: QP, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The worst relative error of any element in any parameter; where a gradient is tiny, relative to a thousandth of the largest one."""
    errors, sizes = [], []
    for new, old, shared in zip(found, exact, qp.shared, strict=True):
        rows = 1 if shared else len(old)
        errors.append((new - old).reshape(rows, -1).norm(dim=-1))
        sizes.append(old.reshape(rows, -1).norm(dim=-1))
    error, size = torch.cat(errors), torch.cat(sizes)
    return float((error / size.clamp(min=1e-3 * float(size.max()))).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also n = 200 and batches of 512: several minutes more")
    parser.add_argument("--short", action="store_true", help="a smoke run")
    options = parser.parse_args()
    main(short=options.short, everything=options.all)
