from __future__ import annotations

import pytest
import torch

from difflayers.convex import cone_factor
from difflayers.convex.cone import _pattern
from difflayers.convex.cone_factor import ConeFactor
from difflayers.convex.cone_geometry import spectrum
from difflayers.convex.cone_structure import Structure
from tests.convex.cone_programs import KINDS, Known, known


def structure(program: Known, kind: str) -> tuple[Structure, list[torch.Tensor]]:
    cones, n = KINDS[kind]
    (P, P_values), (A, A_values) = _pattern("P", program.P, (n, n)), _pattern("A", program.A, (cones.rows, n))
    return Structure((len(program.q),), cones, P, A), [P_values, program.q, A_values, program.b]


def jacobian(program: Known, factor: ConeFactor, i: int) -> torch.Tensor:
    eigenvalues = factor.spectrum.eigenvalues[i]
    columns = torch.eye(len(eigenvalues), dtype=torch.float64).unsqueeze(1).expand(-1, len(program.q), -1)
    Q = factor.spectrum.rotate(columns)[:, i].clone()  # its rows are those of Q
    D = Q @ torch.diag(eigenvalues) @ Q.mT
    P, A = program.P[i], program.A[i]
    return torch.cat([torch.cat([P, A.mT @ (D - torch.eye(len(D)))], 1), torch.cat([A, D], 1)])


@pytest.fixture(params=["dense", "sparse", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sparse":
        monkeypatch.setattr(cone_factor, "_DENSE_LIMIT", 0)
        monkeypatch.setattr(cone_factor, "_DENSE_FROM", 10.0)
    if request.param == "one by one":
        monkeypatch.setattr(cone_factor, "_CHUNK", 1)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_both_systems_are_solved(kind: str, way: str) -> None:
    program = known(*KINDS[kind], 3, seed=1)
    shape, theta = structure(program, kind)
    factor = ConeFactor(shape, program.s - program.y, program.s, theta)
    rhs = torch.randn(2, 3, shape.n + shape.m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for transpose in (False, True):
        solved, residual = factor.solve(rhs, transpose=transpose)
        assert float(residual.max()) < 1e-12
        for i in range(3):
            J = jacobian(program, factor, i)
            torch.testing.assert_close(solved[:, i] @ (J if transpose else J.mT), rhs[:, i], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_against_a_point_nearby(kind: str) -> None:
    program = known(*KINDS[kind], 2, seed=1)
    shape, theta = structure(program, kind)
    v = program.s - program.y
    old = ConeFactor(shape, v, program.s, theta)
    near = known(*KINDS[kind], 2, seed=1)
    moved = v + 1e-6 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    from difflayers.convex.cone_geometry import project

    s = project(shape.cones, moved)
    exact = ConeFactor(shape, moved, s, theta)
    rhs = torch.randn(2, shape.n + shape.m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for transpose in (False, True):
        solved, residual = old.solve_nearby(spectrum(shape.cones, moved, s), rhs, transpose=transpose)
        assert float(residual.max()) < 1e-11
        torch.testing.assert_close(solved, exact.solve(rhs, transpose=transpose)[0], atol=1e-7, rtol=1e-7)
    assert near.q.shape == program.q.shape


def test_a_singular_system_has_the_solution_of_least_norm_or_none(way: str) -> None:
    # Two rows that say the same: the multipliers are free along (1, −1).
    program = known(*KINDS["linear"], 1)
    A = program.A.clone()
    A[:, 1] = A[:, 0]
    shape, theta = structure(program._replace(A=A), "linear")
    factor = ConeFactor(shape, program.s - program.y, program.s, theta)
    rhs = torch.zeros(1, shape.n + shape.m, dtype=torch.float64)
    rhs[0, : shape.n] = torch.arange(shape.n)
    solved, residual = factor.solve(rhs, transpose=False)
    assert float(residual) < 1e-8
    torch.testing.assert_close(solved[0, shape.n], solved[0, shape.n + 1], atol=1e-6, rtol=1e-6)
    rhs[0, shape.n] = 1  # now they contradict each other
    solved, residual = factor.solve(rhs, transpose=False)
    assert 0.01 < float(residual) < 1
    assert float(solved.abs().max()) < 1e3
