"""Sparse transport beside POT's ``ot.smooth``: time, how well the marginals and the maximum of the dual are met, and the gradient.

``python -m benchmarks.sparse_transport``. POT maximizes the dual or the semi-dual by L-BFGS-B, in NumPy, at ``stopThr=1e-12`` and as many
iterations as it asks for; it ends at marginal errors of 1e-5 all the same. "loose" is ours at the marginal error of POT's semi-dual, and
times are compared with that. POT's plans have no gradient: what stands beside ours is a central difference of its plan along one direction,
at the best of four steps. The reference is the derivative on the support that was found, by NumPy's pseudo-inverse. "dual gap" is what a
maximum of the dual lacks to the largest value that anyone reached, relative to the cost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, race
from difflayers.solution import Status
from difflayers.transport import sparse_transport

_POT_STEPS, _POT_STOP = 20_000, 1e-12


def main(*, short: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["POT"])
    warnings.filterwarnings("ignore")
    _free(short=short)
    _sparse(short=short)
    _batches(short=short)


def _free(*, short: bool) -> None:
    columns = [("n", -5), ("γ", -6), ("ours ms", -8), ("with gradient ms", -16), ("loose ms", -8), ("dual ×", -8), ("semi-dual ×", -11)]
    columns += [(f"{name} {what}", -14) for what in ("rows", "slope") for name in ("ours", "dual", "semi-dual")]
    table = Table("Quadratic plans: marginal errors (1-norm), and relative errors of the gradient of a plan loss", columns)
    for n, gamma in [(50, 0.5)] if short else [(50, 0.5), (200, 0.05), (200, 1.0), (200, 10.0), (500, 0.5), (500, 5.0)]:
        cost, weights, direction = _problem(n, n)
        peers = {name: _pot(name, gamma) for name in ("dual", "semi-dual")} if installed("POT") else {}

        def ours(cost: Tensor = cost, gamma: float = gamma, tol: float | None = None) -> Tensor:
            return sparse_transport(cost, gamma=gamma, tol=tol).plan

        def gradient(cost: Tensor = cost, weights: Tensor = weights, gamma: float = gamma) -> Tensor:
            leaf = cost.clone().requires_grad_()
            return torch.autograd.grad((sparse_transport(leaf, gamma=gamma).plan * weights).sum(), leaf)[0]

        plan = ours()
        exact = float((_reference(plan, weights, gamma) * direction).sum())
        marginals = {"ours": _error(plan)} | {name: _error(peer(cost)) for name, peer in peers.items()}
        slopes = {"ours": float((gradient() * direction).sum())}
        for name, peer in peers.items():
            tried = [_difference(peer, cost, weights, direction, step * gamma / n) for step in (1e-4, 1e-3, 1e-2, 1e-1)]
            slopes[name] = min(tried, key=lambda slope: abs(slope - exact))
        tol = max(marginals.get("semi-dual", 1e-5), 1e-10)
        contestants = {"ours": ours, "gradient": gradient, "loose": lambda ours=ours, tol=tol: ours(tol=tol)} | {
            name: lambda peer=peer, cost=cost: peer(cost) for name, peer in peers.items()
        }
        times = race(contestants, budget=0.5 if short else 4.0, rounds=(1, 20))
        ratios = [times.ratio(name, "loose") if name in peers else None for name in ("dual", "semi-dual")]
        names = ("ours", "dual", "semi-dual")
        wrong = {name: abs(slope - exact) / abs(exact) for name, slope in slopes.items()}
        seconds = [1e3 * times.seconds(name) for name in ("ours", "gradient", "loose")]
        table.row(n, gamma, *seconds, *ratios, *(marginals.get(name) for name in names), *(wrong.get(name) for name in names))


def _sparse(*, short: bool) -> None:
    columns = [("n", -5), ("m", -5), ("k", -3), ("status", 10), ("ours ms", -8), ("semi-dual ×", -11)]
    columns += [(f"{name} {what}", -18) for what in ("dual gap", "rows missed") for name in ("ours", "semi-dual")]
    table = Table("At most k nonzeros a column; rows are missed where the relaxation is not tight", columns)
    for n, m, k in [(16, 50, 2)] if short else [(16, 200, 1), (16, 200, 2), (16, 200, 4), (50, 60, 2), (200, 200, 2)]:
        cost, gamma = _problem(n, m)[0], 0.02 * m
        found = sparse_transport(cost, gamma=gamma, k=k, on_failure="warn")
        contestants: dict[str, Callable[[], Any]] = {
            "ours": lambda cost=cost, gamma=gamma, k=k: sparse_transport(cost, gamma=gamma, k=k, on_failure="warn")
        }
        values, missed = {"ours": _dual_value(found.f, cost, gamma, k)}, {"ours": _error(found.plan)}
        if installed("POT"):
            peer = _pot("semi-dual", gamma, k)
            contestants["semi-dual"] = lambda peer=peer, cost=cost: peer(cost)
            missed["semi-dual"] = _error(peer(cost))
            values["semi-dual"] = _dual_value(_pot("semi-dual", gamma, k, potentials=True)(cost), cost, gamma, k)
        times = race(contestants, budget=0.5 if short else 4.0, rounds=(1, 20))
        best = max(values.values())
        names = ("ours", "semi-dual")
        gaps = [(best - values[name]) / float(found.value) if name in values else None for name in names]
        ratio = times.ratio("semi-dual", "ours") if "semi-dual" in contestants else None
        table.row(n, m, k, Status(int(found.status)).name, 1e3 * times.seconds("ours"), ratio, *gaps, *(missed.get(name) for name in names))


def _batches(*, short: bool) -> None:
    table = Table(
        "One batch beside a loop, with the gradient", [("problems", 16), ("k", -5), ("batch ms", -9), ("loop ×", -7), ("difference", -10)]
    )
    for count, n, m, k in [(8, 20, 20, None)] if short else [(64, 50, 50, None), (16, 16, 200, 2)]:
        cost, weights = _problem(n, m, count)[:2]

        def gradient(cost: Tensor, weights: Tensor = weights, m: int = m, k: int | None = k) -> Tensor:
            leaf = cost.clone().requires_grad_()
            plan = sparse_transport(leaf, gamma=0.02 * m, k=k, on_failure="warn").plan
            return torch.autograd.grad((plan * weights).sum(), leaf)[0]

        def loop(cost: Tensor = cost, gradient: Callable[[Tensor], Tensor] = gradient) -> Tensor:
            return torch.stack([gradient(one) for one in cost])

        difference = float((gradient(cost) - loop()).abs().max())
        batch = lambda cost=cost, gradient=gradient: gradient(cost)  # noqa: E731
        times = race({"batch": batch, "loop": loop}, budget=1.0 if short else 4.0, rounds=(1, 10))
        table.row(f"{count} × {n} × {m}", k or "-", 1e3 * times.seconds("batch"), times.ratio("loop", "batch"), difference)


def _problem(n: int, m: int, *batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    cost = torch.rand(*batch, n, m, generator=generator)
    return cost, torch.randn(n, m, generator=generator), torch.randn(n, m, generator=generator)


def _pot(name: str, gamma: float, k: int | None = None, *, potentials: bool = False) -> Callable[[Tensor], Tensor]:
    import ot

    solver = ot.smooth.smooth_ot_dual if name == "dual" else ot.smooth.smooth_ot_semi_dual
    kind = {"reg_type": "l2"} if k is None else {"reg_type": "sparsity_constrained", "max_nz": k}

    def solve(cost: Tensor) -> Tensor:
        n, m = cost.shape
        marginals = np.full(n, 1 / n), np.full(m, 1 / m)
        # A projection of POT prints what it works on.
        with contextlib.redirect_stdout(io.StringIO()):
            plan, log = solver(*marginals, cost.numpy(), gamma, numItermax=_POT_STEPS, stopThr=_POT_STOP, log=True, **kind)
        return torch.from_numpy(log["alpha"] if potentials else plan)

    return solve


def _difference(solve: Callable[[Tensor], Tensor], cost: Tensor, weights: Tensor, direction: Tensor, step: float) -> float:
    return float(((solve(cost + step * direction) - solve(cost - step * direction)) * weights).sum()) / (2 * step)


def _error(plan: Tensor) -> float:
    n, m = plan.shape
    return float(torch.maximum((plan.sum(1) - 1 / n).abs().sum(), (plan.sum(0) - 1 / m).abs().sum()))


def _dual_value(alpha: Tensor, cost: Tensor, gamma: float, k: int) -> float:
    """The semi-dual: columns are projections of the k largest entries on the simplex."""
    m = cost.shape[-1]
    v = (alpha.unsqueeze(-1) - cost).topk(k, 0).values
    counts = torch.arange(1, k + 1).unsqueeze(-1)
    thresholds = (v.cumsum(0) - gamma / m) / counts
    last = (v > thresholds).sum(0, keepdim=True) - 1
    columns = (v - thresholds.gather(0, last)).clamp(min=0) / gamma
    return float(alpha.mean() - (columns * v).sum() + gamma / 2 * columns.square().sum())


def _reference(plan: Tensor, weights: Tensor, gamma: float) -> Tensor:
    S = (plan > 0).double().numpy()
    G = weights.numpy()
    K = np.block([[np.diag(S.sum(1)), S], [S.T, np.diag(S.sum(0))]])
    u = np.linalg.pinv(K, hermitian=True) @ np.concatenate([(S * G).sum(1), (S * G).sum(0)])
    n = S.shape[0]
    return torch.from_numpy(-S * (G - u[:n, None] - u[n:]) / gamma)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
