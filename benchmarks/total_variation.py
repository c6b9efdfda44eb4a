"""Total variation of sequences and photographs beside ``QPLayer``, scikit-image and cvxpy: time, and how much energy is left.

``python -m benchmarks.total_variation``. The energy is the objective; ``excess`` is what a contestant's is above the best lower bound that
is known, a dual solution of a gap of 1e-8, relative. A smaller excess is nearer; the squared distance to the solution is at most twice it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from skimage import data
from skimage.restoration import denoise_tv_chambolle
from skimage.transform import resize
from torch import Tensor

from benchmarks.timing import Contestant, Table, describe_machine, one_thread, race
from difflayers import QPLayer
from difflayers.prox.operators import prox_tv1d, prox_tv2d, solve_tv2d

NOISE = 0.1


def sequences(rows: int, n: int) -> Tensor:
    """Steps of about ten entries, with noise."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, n // 10 + 1, generator=g).repeat_interleave(10, -1)[:, :n] + NOISE * torch.randn(rows, n, generator=g)


def by_quadratic_program(n: int, lam: float) -> Callable[[Tensor], Tensor]:
    """The dual of the quickstart: a box."""
    D = torch.eye(n).diff(dim=0)
    P, bound, layer = D @ D.T, torch.full((n - 1,), lam), QPLayer()
    return lambda x: x - layer(P, -x @ D.T, lb=-bound, ub=bound) @ D


def violation(x: Tensor, u: Tensor, lam: float) -> float:
    """By how much the multipliers of u miss their bounds, relative to λ."""
    return float((u - x).cumsum(-1).abs().max() / lam - 1)


def with_gradient(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]

    return run


def one_dimension(short: bool) -> None:
    columns = [("rows × length", 14), ("λ", -5), ("forward ms", -10), ("with gradient ms", -16), ("violation", -9)]
    table = Table("Sequences", [*columns, ("QPLayer ×", -9), ("violation", -9)])
    for rows, n in [(64, 64), (64, 1000)] if short else [(64, 64), (64, 256), (64, 1000), (1, 10_000), (1, 100_000)]:
        x = sequences(rows, n)
        for lam in (0.1, 1.0):
            contestants: dict[str, Contestant] = {
                "forward": lambda x=x, lam=lam: prox_tv1d(x, lam),
                "ours": with_gradient(lambda x, lam=lam: prox_tv1d(x, lam), x),
            }
            qp = by_quadratic_program(n, lam) if n <= 256 else None
            if qp is not None:
                contestants["qp"] = with_gradient(qp, x)
            times = race(contestants)
            peer = (None, None) if qp is None else (times.ratio("qp", "ours"), violation(x, qp(x), lam))
            forward, ours = 1e3 * times.seconds("forward"), 1e3 * times.seconds("ours")
            table.row(f"{rows} × {n}", lam, forward, ours, violation(x, prox_tv1d(x, lam), lam), *peer)


def photograph(size: int) -> Tensor:
    """The cameraman, smaller, with noise."""
    clean = torch.as_tensor(resize(data.camera() / 255.0, (size, size), anti_aliasing=True))
    return clean + NOISE * torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def energy(x: Tensor, u: Tensor, lam: float, norm: str) -> float:
    across, down = torch.zeros_like(u), torch.zeros_like(u)
    across[:, :-1], down[:-1] = u.diff(dim=1), u.diff(dim=0)
    total = torch.hypot(across, down) if norm == "isotropic" else across.abs() + down.abs()
    return float((u - x).square().sum() / 2 + lam * total.sum())


def by_cvxpy(x: Tensor, lam: float, norm: str) -> Tensor:
    import cvxpy as cp

    u = cp.Variable(x.shape)
    across = cp.hstack([cp.diff(u, axis=1), np.zeros((x.shape[0], 1))])
    down = cp.vstack([cp.diff(u, axis=0), np.zeros((1, x.shape[1]))])
    pairs = cp.vstack([cp.vec(across, order="C"), cp.vec(down, order="C")])
    total = cp.sum(cp.norm(pairs, 2 if norm == "isotropic" else 1, axis=0))
    cp.Problem(cp.Minimize(cp.sum_squares(u - x.numpy()) / 2 + lam * total)).solve(solver="CLARABEL")
    return torch.as_tensor(u.value)


def two_dimensions(short: bool) -> None:
    columns = [("photograph", 10), ("norm", 11), ("λ", -5), ("contestant", 22), ("ms", -8), ("× ours", -7), ("excess", -7)]
    table = Table("Photographs, to a relative gap of 1e-6", columns)
    for size in (32,) if short else (64, 128, 256):
        x = photograph(size)
        for norm in ("isotropic", "anisotropic"):
            for lam in (0.05, 0.1):
                contestants: dict[str, Callable[[], Tensor]] = {
                    "ours": lambda x=x, lam=lam, norm=norm: prox_tv2d(x, lam, norm=norm),
                    "ours, with gradient": with_gradient(lambda x, lam=lam, norm=norm: prox_tv2d(x, lam, norm=norm), x),
                }
                warm = solve_tv2d(0.999 * x, lam, norm=norm)
                contestants["ours, warm, x 0.1 % off"] = lambda x=x, lam=lam, norm=norm, warm=warm: (
                    solve_tv2d(x, lam, norm=norm, warm_start=warm).u
                )
                if norm == "isotropic":
                    for eps in (2e-4, 1e-6):
                        contestants[f"scikit-image, eps {eps:.0e}"] = lambda x=x, lam=lam, eps=eps: torch.as_tensor(
                            denoise_tv_chambolle(x.numpy(), lam, eps=eps, max_num_iter=5000)
                        )
                if size <= 64:
                    contestants["cvxpy with Clarabel"] = lambda x=x, lam=lam, norm=norm: by_cvxpy(x, lam, norm)
                times = race(contestants, budget=4.0, rounds=(1, 10))
                best = solve_tv2d(x, lam, norm=norm, tol=1e-8, max_iter=100_000, on_failure="warn", polish=True)
                lowest = energy(x, best.u, lam, norm) * (1 - float(best.residual))
                for name, run in contestants.items():
                    u = None if "gradient" in name else energy(x, run(), lam, norm) / lowest - 1
                    table.row(f"{size}²", norm, lam, name, 1e3 * times.seconds(name), times.ratio(name, "ours"), u)


def main(*, short: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["scikit-image", "cvxpy", "clarabel"])
    one_dimension(short)
    two_dimensions(short)
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
