"""Soft sort and soft rank beside torchsort, soft top-k masks beside ``torch.topk``: time, and errors of values and gradients.

``python -m benchmarks.soft_sort``. torchsort is compiled while it is installed: ``pip install --no-build-isolation torchsort``, with a
C++ compiler. The references pool adjacent violators one by one, and bisect for masks, in extended precision.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, race
from difflayers.sorting import soft_rank, soft_sort, soft_topk

Rows = tuple[np.ndarray, np.ndarray]


def reference(name: str, regularization: str, x: np.ndarray, cotangent: np.ndarray) -> Rows:
    """The value for one row, and the gradient."""
    x, g = x.astype(np.longdouble), cotangent.astype(np.longdouble)
    n, kl = len(x), regularization == "kl"
    rho = np.arange(1, n + 1).astype(np.longdouble)
    order = np.argsort(x if name == "soft_rank" else -x, kind="stable")
    z = x[order] if name == "soft_rank" else -x[order]
    y, weights = (z - rho, np.ones_like(z)) if name == "soft_rank" else (rho - z, np.ones_like(z))
    if kl:
        y, weights = (np.exp(z) / rho, rho) if name == "soft_rank" else (np.exp(rho - z), np.exp(z))
    value, slope = np.empty_like(x), np.empty_like(x)
    for begin, end in itertools.pairwise(blocks(y, weights)):
        part, places = order[begin:end], slice(n - end, n - begin)
        share = np.exp(z[begin:end] - z[begin:end].max()) if kl else np.ones_like(z[begin:end])
        share /= share.sum()
        if name == "soft_rank":
            value[part] = rho[begin:end].sum() * share if kl else z[begin:end] - z[begin:end].mean() + rho[begin:end].mean()
            mean = (share * g[part]).sum()
            slope[part] = value[part] * (g[part] - mean) if kl else g[part] - mean
        else:
            level = _log_sum(z[begin:end]) - _log_sum(rho[begin:end]) if kl else z[begin:end].mean() - rho[begin:end].mean()
            value[places] = -(rho[begin:end] + level)[::-1]
            slope[part] = share * g[places].sum()
    return value, slope


def blocks(y: np.ndarray, weights: np.ndarray) -> list[int]:
    """Where the blocks of an increasing regression begin, and n."""
    begins: list[int] = []
    sums: list[tuple[Any, Any]] = []
    for i in range(len(y)):
        begin, mass, weight = i, weights[i] * y[i], weights[i]
        while begins and sums[-1][0] * weight >= mass * sums[-1][1]:
            begin, (more, heavier) = begins.pop(), sums.pop()
            mass, weight = mass + more, weight + heavier
        begins.append(begin)
        sums.append((mass, weight))
    return [*begins, len(y)]


def _log_sum(values: np.ndarray) -> Any:
    return values.max() + np.log(np.exp(values - values.max()).sum())


def run(name: str, regularization: str, batch: int, n: int, dtype: torch.dtype, table: Table, budget: float) -> None:
    """One row of the table."""
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    cotangent = torch.linspace(-1, 1, n, dtype=dtype).expand(batch, n)
    exact = [reference(name, regularization, row.double().numpy(), cotangent[0].double().numpy()) for row in x[:2]]

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def once() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            y = function(leaf, regularization=regularization)
            return y.detach(), torch.autograd.grad(y, leaf, cotangent)[0]

        return once

    contestants = {"ours": both(soft_sort if name == "soft_sort" else soft_rank)}
    if installed("torchsort"):
        import torchsort

        contestants["torchsort"] = both(getattr(torchsort, name))
    errors = []
    for contestant in contestants.values():
        for found, truths in zip(contestant(), zip(*exact, strict=True), strict=True):
            errors.append(max(_error(row, truth) for row, truth in zip(found[:2], truths, strict=True)))
    times = race(contestants, budget=budget)
    ratio = times.ratio("torchsort", "ours") if "torchsort" in contestants else None
    table.row(name, regularization, str(dtype)[6:], batch, n, 1e3 * times.seconds("ours"), ratio, *errors)


def masks(regularization: str, x: np.ndarray, k: int, cotangent: np.ndarray) -> Rows:
    """The mask of one row, and the gradient."""
    x, g = x.astype(np.longdouble), cotangent.astype(np.longdouble)

    def mask(nu: Any) -> np.ndarray:
        return np.clip(x + nu, 0, 1) if regularization == "l2" else 1 / (1 + np.exp(-(x + nu)))

    low, high = -x.max() - 50, -x.min() + 50
    for _ in range(120):
        nu = (low + high) / 2
        low, high = (nu, high) if mask(nu).sum() < k else (low, nu)
    value = mask((low + high) / 2)
    d = ((value > 0) & (value < 1)).astype(x.dtype) if regularization == "l2" else value * (1 - value)
    return value, d * (g - (d * g).sum() / d.sum())


def run_topk(regularization: str, batch: int, n: int, k: int, table: Table, budget: float) -> None:
    """One row of the table of masks."""
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cotangent = torch.linspace(-1, 1, n, dtype=torch.float64).expand(batch, n)

    def both() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = soft_topk(leaf, k, regularization=regularization)
        return y.detach(), torch.autograd.grad(y, leaf, cotangent)[0]

    exact = zip(*(masks(regularization, row.numpy(), k, cotangent[0].numpy()) for row in x[:2]), strict=True)
    errors = [max(map(_error, found[:2], truths)) for found, truths in zip(both(), exact, strict=True)]
    contestants = {"ours": both, "topk": lambda: x.topk(k), "forward": lambda: soft_topk(x, k, regularization=regularization)}
    times = race(contestants, budget=budget)
    table.row(
        regularization, batch, n, k, 1e3 * times.seconds("ours"), times.ratio("forward", "topk"), times.ratio("ours", "topk"), *errors
    )


def _error(found: Tensor, exact: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - exact).max() / max(np.abs(exact).max(), 1))


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    describe_machine(["numpy", "scipy", "torchsort"])
    if not installed("torchsort"):
        print("Without torchsort there are no ratios: pip install --no-build-isolation torchsort, with a C++ compiler.")
    columns = [("function", 9), ("reg.", 4), ("dtype", 7), ("batch", -5), ("n", -5), ("ours ms", -9), ("torchsort ×", -11)]
    columns += [("error", -8), ("gradient", -8), ("ts error", -8), ("ts grad.", -8)]
    table = Table("Soft sort and soft rank, forward and backward, strength 1; a ratio above 1: torchsort takes longer", columns)
    sizes = ((512, 100),) if short else ((1, 1024), (128, 1024), (512, 100), (4096, 10))
    for dtype in (torch.float64,) if short else (torch.float64, torch.float32):
        for batch, n in sizes:
            for name, regularization in itertools.product(("soft_sort", "soft_rank"), ("l2", "kl")):
                run(name, regularization, batch, n, dtype, table, 0.2 if short else 1.0)
    columns = [("reg.", 9), ("batch", -5), ("n", -5), ("k", -3), ("ours ms", -9), ("fw / topk", -9), ("fw + bw / topk", -14)]
    table = Table("soft_topk, strength 1, in units of torch.topk without a backward", [*columns, ("error", -8), ("gradient", -8)])
    for batch, n in sizes:
        for regularization in ("l2", "entropic"):
            run_topk(regularization, batch, n, max(n // 32, 3), table, 0.2 if short else 1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
