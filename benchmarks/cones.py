"""``CvxpyLayer`` beside cvxpylayers with Clarabel: six problems, forward and backward, batch 16, float64, one thread.

Beside each time stands the worst relative error, over the batch, of the derivative of a random loss along a random direction, against
finite differences of order four. The solutions that are differenced satisfy their optimality conditions to 1e-12, so that the reference
depends on no contestant's adjoint. cvxpylayers runs with Clarabel's own tolerances.

Run as ``python -m benchmarks.cones``: ``--short`` for a smoke run.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cone_problems import PROBLEMS, Case
from benchmarks.timing import Table, describe_machine, one_thread, race
from difflayers import CvxpyLayer

__all__ = ["main"]

_STEP = 1e-6


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    describe_machine(["cvxpy", "cvxpylayers", "diffcp", "clarabel"])
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # cvxpylayers' own, on NumPy 2
    columns = [("problem", 20), ("unknowns", -8), ("rows", -5), ("ours ms", -8), ("gradient", -8), ("cvxpylayers ×", -13), ("gradient", -8)]
    table = Table("Forward and backward" + (", batch 2" if short else ", batch 16"), columns)
    ratios = [_row(table, name, make(), 2 if short else 16, 0.1 if short else 4.0) for name, make in PROBLEMS.items()]
    print(f"\ngeometric mean: cvxpylayers takes {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} times as long")


def _row(table: Table, name: str, case: Case, batch: int, budget: float) -> float:
    from cvxpylayers.torch import CvxpyLayer as Theirs

    problem = (case.problem, case.parameters, case.variables)
    ours = CvxpyLayer(*problem)
    layers = {"ours": ours, "theirs": Theirs(*problem, solver_args={"solve_method": "Clarabel"})}
    values = case.draw(batch)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(layers["ours"](*values)[0].shape, generator=generator, dtype=torch.float64)
    directions = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in values]
    for parameter, direction in zip(case.parameters, directions, strict=True):
        if parameter.is_symmetric() and direction.dim() > 2:
            direction.copy_((direction + direction.mT) / 2)
    exact = _differences(ours, values, directions, weights)
    errors = {}
    for who, layer in layers.items():
        slopes = _gradients(layer, values, weights)
        found = sum((slope * direction).reshape(batch, -1).sum(1) for slope, direction in zip(slopes, directions, strict=True))
        errors[who] = float(((found - exact).abs() / exact.abs().clamp(min=1e-3 * float(exact.abs().max()))).max())
    clock = race({who: _run(layer, values, weights) for who, layer in layers.items()}, budget=budget)
    ratio = clock.ratio("theirs", "ours")
    n, m = ours.canonical.A.shape[1], ours.canonical.A.shape[0]
    table.row(name, n, m, 1e3 * clock.seconds("ours"), errors["ours"], ratio, errors["theirs"])
    return ratio


def _run(layer: Callable[..., Any], values: list[Tensor], weights: Tensor) -> Callable[[], Any]:
    return lambda: _gradients(layer, values, weights)


def _gradients(layer: Callable[..., Any], values: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in values]
    return torch.autograd.grad((weights * layer(*leaves)[0]).sum(), leaves)


def _differences(layer: CvxpyLayer, values: list[Tensor], directions: list[Tensor], weights: Tensor) -> Tensor:
    def loss(step: float) -> Tensor:
        moved = [value + step * direction for value, direction in zip(values, directions, strict=True)]
        return (weights * layer(*moved)[0]).reshape(len(weights), -1).sum(1)

    near, far = loss(_STEP) - loss(-_STEP), loss(2 * _STEP) - loss(-2 * _STEP)
    return (8 * near - far) / (12 * _STEP)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
