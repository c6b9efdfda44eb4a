"""Six parametrized CVXPY problems, of the kinds that the examples of cvxpylayers have, each with a way to draw a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

__all__ = ["PROBLEMS", "Case"]


class Case(NamedTuple):
    """A problem of CVXPY and how to draw its parameters: ``draw(batch)`` gives one tensor ``(batch, *shape)`` for each."""

    problem: Any
    parameters: list[Any]
    variables: list[Any]
    draw: Callable[[int], list[Tensor]]


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.as_tensor(array, dtype=torch.float64) for array in arrays]


def elastic_net(samples: int = 60, features: int = 20) -> Case:
    """Least squares with both penalties, in the data and the penalties."""
    rng = np.random.default_rng(0)
    X, y, lam = cp.Parameter((samples, features)), cp.Parameter(samples), cp.Parameter(2, nonneg=True)
    w = cp.Variable(features)
    fit = cp.sum_squares(X @ w - y) / samples
    problem = cp.Problem(cp.Minimize(fit + lam[0] * cp.norm1(w) + lam[1] * cp.sum_squares(w)))

    def draw(batch: int) -> list[Tensor]:
        data = rng.standard_normal((batch, samples, features))
        truth = rng.standard_normal((batch, features, 1)) * (rng.random((batch, features, 1)) < 0.5)
        noise = rng.standard_normal((batch, samples))
        return _tensors(data, (data @ truth)[..., 0] + noise, rng.uniform(0.1, 0.3, (batch, 2)))

    return Case(problem, [X, y, lam], [w], draw)


def portfolio(assets: int = 30, factors: int = 10) -> Case:
    """The largest expected return at a given risk: a second-order cone, in the returns, the factor model and the risk."""
    rng = np.random.default_rng(1)
    returns, loadings, idiosyncratic = cp.Parameter(assets), cp.Parameter((factors, assets)), cp.Parameter(assets, nonneg=True)
    risk = cp.Parameter(nonneg=True)
    w = cp.Variable(assets)
    deviation = cp.hstack([loadings @ w, cp.multiply(idiosyncratic, w)])
    problem = cp.Problem(cp.Maximize(returns @ w), [cp.norm(deviation) <= risk, cp.sum(w) == 1, w >= 0])

    def draw(batch: int) -> list[Tensor]:
        loading = 0.3 * rng.standard_normal((batch, factors, assets))
        return _tensors(
            0.1 * rng.standard_normal((batch, assets)), loading, rng.uniform(0.2, 0.5, (batch, assets)), rng.uniform(0.35, 0.5, batch)
        )

    return Case(problem, [returns, loadings, idiosyncratic, risk], [w], draw)


def sdp(order: int = 10, equations: int = 12) -> Case:
    """A semidefinite program in its costs and right-hand sides."""
    rng = np.random.default_rng(2)
    X = cp.Variable((order, order), symmetric=True)
    C, b = cp.Parameter((order, order), symmetric=True), cp.Parameter(equations)
    measured = [rng.standard_normal((order, order)) for _ in range(equations)]
    measured = [matrix + matrix.T for matrix in measured]
    constraints = [X >> 0, cp.trace(X) == order] + [cp.trace(matrix @ X) == b[i] for i, matrix in enumerate(measured)]
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), constraints)

    def draw(batch: int) -> list[Tensor]:
        cost = rng.standard_normal((batch, order, order))
        inside = rng.standard_normal((batch, order, order))
        inside = inside @ np.swapaxes(inside, -1, -2)
        inside *= order / np.trace(inside, axis1=-2, axis2=-1)[:, None, None]
        return _tensors(cost + np.swapaxes(cost, -1, -2), np.einsum("kij,bij->bk", np.stack(measured), inside))

    return Case(problem, [C, b], [X], draw)


def logistic_regression(samples: int = 40, features: int = 5) -> Case:
    """Regularized maximum likelihood: exponential cones, in the data and the regularization."""
    rng = np.random.default_rng(3)
    w = cp.Variable((features, 1))
    X, lam = cp.Parameter((samples, features)), cp.Parameter(1, nonneg=True)
    labels = (rng.random((samples, 1)) < 0.5).astype(float)
    scores = X @ w
    both = cp.hstack([np.zeros((samples, 1)), scores])
    likelihood = cp.sum(cp.multiply(labels, scores) - cp.log_sum_exp(both, axis=1, keepdims=True))
    problem = cp.Problem(cp.Minimize(-likelihood + lam * cp.sum_squares(w)))

    def draw(batch: int) -> list[Tensor]:
        return _tensors(rng.standard_normal((batch, samples, features)), rng.uniform(0.1, 1.0, (batch, 1)))

    return Case(problem, [X, lam], [w], draw)


def linear_program(unknowns: int = 30, rows: int = 60) -> Case:
    """A linear program in all its data."""
    rng = np.random.default_rng(4)
    x = cp.Variable(unknowns)
    c, G, h = cp.Parameter(unknowns), cp.Parameter((rows, unknowns)), cp.Parameter(rows)
    problem = cp.Problem(cp.Minimize(c @ x), [G @ x <= h])

    def draw(batch: int) -> list[Tensor]:
        matrix = rng.standard_normal((batch, rows, unknowns))
        multipliers = rng.uniform(0.1, 1.0, (batch, rows))
        return _tensors(-np.einsum("bij,bi->bj", matrix, multipliers), matrix, rng.uniform(0.5, 1.5, (batch, rows)))

    return Case(problem, [c, G, h], [x], draw)


def sudoku(size: int = 2, rules: int = 40) -> Case:
    """The layer that learns Sudoku in OptNet: clues in the objective, equations that are learned, all of them parameters."""
    rng = np.random.default_rng(5)
    cells = size**6
    x = cp.Variable(cells)
    clues, A, b = cp.Parameter(cells), cp.Parameter((rules, cells)), cp.Parameter(rules)
    problem = cp.Problem(cp.Minimize(0.05 * cp.sum_squares(x) - clues @ x), [A @ x == b, x >= 0])

    def draw(batch: int) -> list[Tensor]:
        equations = rng.standard_normal((batch, rules, cells)) / cells**0.5
        inside = rng.uniform(0.0, 1.0, (batch, cells)) * (rng.random((batch, cells)) < 0.7)
        return _tensors(1.0 * (rng.random((batch, cells)) < 0.25), equations, np.einsum("bij,bj->bi", equations, inside))

    return Case(problem, [clues, A, b], [x], draw)


PROBLEMS: dict[str, Callable[[], Case]] = {
    "elastic net": elastic_net,
    "portfolio": portfolio,
    "SDP": sdp,
    "logistic regression": logistic_regression,
    "LP": linear_program,
    "Sudoku": sudoku,
}
