from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

from difflayers.convex import Cones
from difflayers.convex.canonicalization import AffineMap, Canonical, canonicalize, cones_of
from difflayers.errors import DiffLayersError


def made(problem: cp.Problem, parameters: list, variables: list, **options: Any) -> Canonical:
    settings = {"gp": False, "verbose": False, "canon_backend": None, "quadratic": True, **options}
    return canonicalize(problem, parameters, variables, **settings)


def test_data_are_those_that_cvxpy_gives_to_clarabel() -> None:
    x, X = cp.Variable(3), cp.Variable((2, 2), symmetric=True)
    A, b, C = cp.Parameter((2, 3)), cp.Parameter(2), cp.Parameter((2, 2), symmetric=True)
    constraints = [A @ x <= b, cp.norm(x - b[0]) <= 2 + b[1], X >> C, cp.sum(cp.exp(x)) <= 5, cp.trace(X) == 3]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + cp.trace(C @ X) + x[0]), constraints)
    canonical = made(problem, [A, b, C], [x])
    rng = np.random.default_rng(0)
    A.value, b.value, C.value = rng.standard_normal((2, 3)), rng.standard_normal(2), np.array([[1.0, 0.3], [0.3, -0.5]])
    values = {0: A.value.ravel(order="F"), 1: b.value, 2: C.value[np.triu_indices(2)]}
    row = torch.tensor(np.concatenate([values[i] for i, _ in canonical.order]))
    data, _, _ = problem.get_problem_data(solver="CLARABEL")
    P, q, rows, right = (each(row) for each in canonical.maps)
    for found, exact in (
        (canonical.P.dense(P), data["P"].toarray()),
        (q, data["c"]),
        (canonical.A.dense(rows), data["A"].toarray()),
        (right, data["b"]),
    ):
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-12)
    assert canonical.cones == cones_of(data["dims"])
    assert canonical.cones.psd == (2,)
    assert canonical.cones.exp == 3


def test_affine_maps_are_differentiable_and_batched() -> None:
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    moved = AffineMap(rows, columns, torch.tensor([2.0, 3.0, -1.0]), torch.tensor([1.0, 5.0, 0.0]))
    matrix = torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    p = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    torch.testing.assert_close(moved(p), p @ matrix.mT + moved.constant)
    torch.testing.assert_close(torch.func.jacrev(moved)(p[0]), matrix)
    torch.testing.assert_close(torch.func.vmap(moved)(p), moved(p))


def test_constraints_beside_the_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])
    asked = cp.Problem.get_problem_data

    def beside(self: cp.Problem, **options: Any) -> Any:
        data, *rest = asked(self, **options)
        return ({**data, "dir_cones": [SimpleNamespace(kind="nonneg")]}, *rest)

    monkeypatch.setattr(cp.Problem, "get_problem_data", beside)
    with pytest.raises(DiffLayersError, match="dir_cones"):
        made(problem, [p], [x])


def test_cones_without_a_derivative_are_refused() -> None:
    dims = SimpleNamespace(zero=1, nonneg=2, soc=[3], psd=[2], exp=1, p3d=[0.25], pnd=[])
    assert cones_of(dims) == Cones(1, 2, (3,), (2,), 1, (0.25,))
    dims.pnd = [[0.2, 0.8]]
    with pytest.raises(DiffLayersError, match="three dimensions"):
        cones_of(dims)
