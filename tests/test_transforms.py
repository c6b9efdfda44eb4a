"""The matrix of ``python -m tests.transforms``: its densest part always, the whole of it under ``-m slow``."""

from __future__ import annotations

import pytest

from tests.transforms import TOLERANCE, TRANSFORMS, Case, cases, error_of

# One solver for each problem sees every transform; the others only change how the same systems are solved.
QUICK = {
    "scalar cubic": "cg",
    "network root": "lu",
    "stationarity": "cholesky",
    "fixed point": "gmres",
    "linear system": "bicgstab",
    "matrix": "lu",
    "pytree": "lu",
    "ridge": "cholesky",
    "kkt": "auto",
}


def slow_unless_quick(case: Case) -> list[pytest.MarkDecorator]:
    return [] if QUICK[case.problem.name] == case.solver else [pytest.mark.slow]


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=slow_unless_quick(case)) for case in cases()])
def test_transforms(case: Case) -> None:
    errors = {transform: error_of(case, transform) for transform in TRANSFORMS}
    assert {transform: error for transform, error in errors.items() if not error <= TOLERANCE} == {}
