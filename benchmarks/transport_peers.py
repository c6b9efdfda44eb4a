"""Losses of point clouds beside geomloss, POT and the published implicit Sinkhorn layer: time, memory, and how wrong the gradient is.

``python -m benchmarks.transport_peers``. Both tables give one row to each contestant. The error is that of the gradient in the points of
one cloud, relative to its largest entry, against Newton's method in NumPy.

geomloss runs its tensorized backend: one sweep at each of a fixed series of temperatures, ``scaling`` apart, so that its accuracy is set
by that; its plan is made of the potentials that it returns. POT solves in the log domain to 1e-6 with at most 1000 sweeps. It is
differentiated by its envelope theorem, by autograd through all sweeps ("unrolled"), or through the last one. The published implicit layer
(Eisenberger et al. 2022, arXiv:2205.06688) is restated from its formulas: sweeps in the log domain, and backward the linear system of
all marginal equations but the last, by LU.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, peak_memory, race
from benchmarks.transport import exact_gradient, exact_plan
from difflayers.transport import sinkhorn, sinkhorn_divergence

# From two clouds to the gradient in the first.
Contestant = Callable[[Tensor, Tensor], Tensor]

_TOL, _SWEEPS, _SCALINGS = 1e-6, 1000, (0.5, 0.9, 0.99)
_COLUMNS = [("clouds", 10), ("ε", -6), ("by", 20), ("ms", -8), ("× ours", -7), ("error", -7), ("MB", -6)]


def main(*, short: bool = False, everything: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["POT", "geomloss"])
    warnings.filterwarnings("ignore", message="Sinkhorn did not converge")
    sizes = [(1, 100, 1e-2)] if short else [(1, 200, 1e-1), (1, 200, 1e-2), (1, 200, 1e-3), (16, 50, 1e-2), (1, 1000, 1e-2)]
    budget = 0.3 if short else 3.0
    table = Table("The Sinkhorn divergence, forward and backward", _COLUMNS)
    for batch, n, epsilon in sizes:
        x, y = _clouds(batch, n)
        _rows(table, x, y, epsilon, _divergences(epsilon, slow=everything or batch * n**2 / epsilon < 1e7), _exact_divergence, budget)
    table = Table("A loss of the plan, forward and backward", _COLUMNS)
    for batch, n, epsilon in sizes:
        if batch == 1:
            x, y = _clouds(batch, n)
            weights = torch.randn(n, n, generator=torch.Generator().manual_seed(1))

            def exact(x: Tensor, y: Tensor, epsilon: float, weights: Tensor = weights) -> Tensor:
                return _to_points(exact_gradient(torch.cdist(x, y).square(), weights, epsilon), x, y)

            _rows(table, x, y, epsilon, _plan_losses(weights, epsilon, slow=everything or n**2 / epsilon < 1e7), exact, budget)


def _clouds(batch: int, n: int) -> tuple[Tensor, Tensor]:
    """Points of a cube, and of a smaller one inside of it."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.rand(batch, n, 3, generator=generator) for _ in range(2))
    return x, 0.8 * y + 0.1


def _rows(
    table: Table,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    contestants: Mapping[str, Contestant],
    exact: Callable[[Tensor, Tensor, float], Tensor],
    budget: float,
) -> None:
    wanted = torch.stack([exact(p, q, epsilon) for p, q in zip(x, y, strict=True)])
    runs = {name: lambda each=each: each(x, y) for name, each in contestants.items()}
    errors = {name: float((run() - wanted).abs().max() / wanted.abs().max()) for name, run in runs.items()}
    memory = {name: peak_memory(run) / 2**20 for name, run in runs.items()}
    times = race(runs, budget=budget, rounds=(1, 20))
    size = f"{len(x)} × {x.shape[1]}" if len(x) > 1 else str(x.shape[1])
    for name in runs:
        table.row(size, epsilon, name, 1e3 * times.seconds(name), times.ratio(name, "ours"), errors[name], memory[name])


def _by_autograd(value: Callable[[Tensor, Tensor], Tensor]) -> Contestant:
    """The gradient of the sum over the batch."""

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(value(leaf, y).sum(), leaf)[0]

    return gradient


def _one_by_one(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loop over the batch, for who takes one pair of clouds."""
    return lambda x, y: torch.stack([value(p, q) for p, q in zip(x, y, strict=True)])


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def _divergences(epsilon: float, *, slow: bool) -> dict[str, Contestant]:
    made = {
        "ours": lambda x, y: sinkhorn_divergence(x, y, epsilon=epsilon).value,
        "ours, tol=1e-4": lambda x, y: sinkhorn_divergence(x, y, epsilon=epsilon, tol=1e-4).value,
    }
    if installed("geomloss"):
        from geomloss import SamplesLoss

        for scaling in _SCALINGS:
            # Its cost is half of the squared distance, and so are its temperature and its value of ours.
            loss = SamplesLoss("sinkhorn", p=2, blur=(epsilon / 2) ** 0.5, scaling=scaling, backend="tensorized")
            made[f"geomloss, {scaling}"] = lambda x, y, loss=loss: 2 * loss(x, y)
    if installed("POT"):
        made["POT, envelope"] = _one_by_one(lambda x, y: _pot_divergence(x, y, epsilon, "envelope"))
        if slow:
            made["POT, unrolled"] = _one_by_one(lambda x, y: _pot_divergence(x, y, epsilon, "autodiff"))
    return {name: _by_autograd(value) for name, value in made.items()}


def _pot_divergence(x: Tensor, y: Tensor, epsilon: float, how: str) -> Tensor:
    import ot

    a = torch.full((len(x),), 1 / len(x))
    parts = [(x, y, 1.0), (x, x, -0.5), (y, y, -0.5)]
    options = {"reg": epsilon, "reg_type": "entropy", "grad": how, "tol": _TOL, "max_iter": _SWEEPS}
    return sum(weight * ot.solve(_squared(p, q), a, a, **options).value for p, q, weight in parts)


def _exact_divergence(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Its gradient in x, by the envelope theorem; both arguments of W(x, x) move."""
    crossed, own = (torch.from_numpy(exact_plan(torch.cdist(x, z).square(), epsilon)[0]) for z in (y, x))
    return _to_points(crossed, x, y) - _to_points((own + own.mT) / 2, x, x)


def _to_points(slope: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """From the gradient in squared distances to that in x."""
    return 2 * (slope.sum(-1, keepdim=True) * x - slope @ y)


def _plan_losses(weights: Tensor, epsilon: float, *, slow: bool) -> dict[str, Contestant]:
    made = {"ours": _by_autograd(lambda x, y: (sinkhorn(_squared(x, y), epsilon=epsilon).plan * weights).sum())}
    made["published implicit"] = lambda x, y: torch.stack(
        [_to_points(_published(_squared(p, q), weights, epsilon), p, q) for p, q in zip(x, y, strict=True)]
    )
    if installed("geomloss"):
        from geomloss import SamplesLoss

        for scaling in _SCALINGS:
            loss = SamplesLoss("sinkhorn", 2, (epsilon / 2) ** 0.5, scaling=scaling, debias=False, potentials=True, backend="tensorized")

            def of_plan(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss) -> Tensor:
                f, g = loss(x, y)
                exponent = (2 * f.unsqueeze(-1) + 2 * g.unsqueeze(-2) - _squared(x, y)) / epsilon
                return (exponent.exp() / (x.shape[-2] * y.shape[-2]) * weights).sum()

            made[f"geomloss, {scaling}"] = _by_autograd(of_plan)
    if installed("POT"):
        ways = {"POT, last step": "last_step"} | ({"POT, unrolled": "autodiff"} if slow else {})
        for name, how in ways.items():
            made[name] = _by_autograd(_one_by_one(lambda x, y, how=how: (_pot_plan(_squared(x, y), epsilon, how) * weights).sum()))
    return made


def _pot_plan(cost: Tensor, epsilon: float, how: str) -> Tensor:
    import ot

    a = torch.full((len(cost),), 1 / len(cost))
    return ot.solve(cost, a, a, reg=epsilon, reg_type="entropy", grad=how, tol=_TOL, max_iter=_SWEEPS).plan


def _published(cost: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """d ⟨plan, weights⟩ / d cost: sweeps, then one dense system of n + m − 1 equations."""
    X, n = cost / -epsilon, len(cost)
    u = v = torch.zeros(n)
    a = torch.full((n,), 1 / n)
    for sweep in range(1, _SWEEPS + 1):
        u = a.log() - torch.logsumexp(X + v, -1)
        v = a.log() - torch.logsumexp(X + u.unsqueeze(-1), -2)
        if sweep % 10 == 0 and ((X + u.unsqueeze(-1) + v).exp().sum(-1) - a).abs().sum() < _TOL:
            break
    P = (X + u.unsqueeze(-1) + v).exp()
    matrix = torch.cat([torch.cat([P.sum(-1).diag(), P[:, :-1]], 1), torch.cat([P.mT[:-1], P.sum(-2)[:-1].diag()], 1)])
    M = P * weights
    dual = torch.linalg.solve(matrix, torch.cat([M.sum(-1), M.sum(-2)[:-1]]))
    dual = torch.cat([dual, dual.new_zeros(1)])
    return -(M - P * (dual[:n, None] + dual[n:])) / epsilon


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    parser.add_argument("--all", action="store_true", help="autograd through all of POT's sweeps on the large problems too")
    options = parser.parse_args()
    main(short=options.short, everything=options.all)
