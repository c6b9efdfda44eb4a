"""Every status has words, every failure its error, and nothing of it couples the elements."""

from __future__ import annotations

import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from difflayers import errors
from difflayers.errors import (
    ConvergenceWarning,
    DiffLayersError,
    InfeasibleError,
    NotConvergedError,
    SingularError,
    SolveError,
    UnboundedError,
)
from difflayers.solution import Solution, Status, report_failures


def solution(*codes: int, shape: tuple[int, ...] | None = None) -> Solution:
    status = torch.tensor(codes, dtype=torch.int64)
    if shape is not None:
        status = status.reshape(shape)
    return Solution(torch.zeros(*status.shape, 2), status, torch.full(status.shape, 0.25), torch.zeros_like(status))


@pytest.mark.parametrize("status", Status)
def test_every_status_says_what_happened(status: Status) -> None:
    assert len(status.message) > 10
    assert status.message[0].islower()
    assert not status.message.endswith(".")
    if status not in (Status.SOLVED, Status.NOT_TIGHT):
        assert ";" in status.message  # ... and what to try


def test_codes_are_stable() -> None:
    # They are stored in tensors, which outlive a release.
    assert [status.name for status in sorted(Status)] == [
        "SOLVED",
        "MAX_ITER",
        "PRIMAL_INFEASIBLE",
        "DUAL_INFEASIBLE",
        "SINGULAR",
        "NUMERICAL_ERROR",
        "NOT_TIGHT",
    ]


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
@pytest.mark.parametrize("shape", [(3,), (), (0,), (1, 3)])
def test_silent_if_all_are_solved(on_failure: str, shape: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_failures(solution(*[0] * torch.zeros(shape).numel(), shape=shape), "solve", on_failure)


@pytest.mark.parametrize(
    ("status", "error", "builtin"),
    [
        (Status.MAX_ITER, NotConvergedError, RuntimeError),
        (Status.NUMERICAL_ERROR, NotConvergedError, RuntimeError),
        (Status.NOT_TIGHT, NotConvergedError, RuntimeError),
        (Status.PRIMAL_INFEASIBLE, InfeasibleError, ValueError),
        (Status.DUAL_INFEASIBLE, UnboundedError, ValueError),
        (Status.SINGULAR, SingularError, RuntimeError),
    ],
)
def test_each_failure_raises_its_error(status: Status, error: type[SolveError], builtin: type[Exception]) -> None:
    found = solution(0, status, 0)
    with pytest.raises(error, match="test: 1 of 3") as caught:
        report_failures(found, "test", "raise")
    assert isinstance(caught.value, builtin)
    assert isinstance(caught.value, DiffLayersError)
    assert caught.value.solution is found
    assert caught.value.indices == [(1,)]
    for part in (status.name, status.message, "2.5e-01", "first failed index (1,)", "on_failure"):
        assert part in str(caught.value)


def test_the_commonest_failure_names_the_error_and_all_are_listed() -> None:
    found = solution(Status.SINGULAR, 0, Status.PRIMAL_INFEASIBLE, Status.PRIMAL_INFEASIBLE, shape=(2, 2))
    with pytest.raises(InfeasibleError) as caught:
        report_failures(found, "test", "raise")
    assert caught.value.indices == [(0, 0), (1, 0), (1, 1)]
    assert "2 × PRIMAL_INFEASIBLE" in str(caught.value)
    assert "1 × SINGULAR" in str(caught.value)


def test_one_problem_has_one_empty_index() -> None:
    with pytest.raises(NotConvergedError, match="1 of 1") as caught:
        report_failures(solution(Status.MAX_ITER, shape=()), "test", "raise")
    assert caught.value.indices == [()]


def test_warning_and_nan() -> None:
    with pytest.warns(ConvergenceWarning, match="1 × MAX_ITER") as caught:
        report_failures(solution(0, Status.MAX_ITER), "test", "warn")
    assert "on_failure" not in str(caught[0].message)
    report_failures(solution(0, Status.MAX_ITER), "test", "nan")


@pytest.mark.parametrize("code", [0, 1])
def test_unknown_on_failure_is_refused_even_if_solved(code: int) -> None:
    with pytest.raises(ValueError, match=r"'ignore'.*'raise', 'nan' or 'warn'"):
        report_failures(solution(code), "test", "ignore")


def test_a_solution_without_a_residual_is_reported_too() -> None:
    class Bare(NamedTuple):
        status: Tensor

    with pytest.raises(NotConvergedError, match="MAX_ITER"):
        report_failures(Bare(torch.tensor([1])), "test", "raise")


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_has_one_parent_and_a_docstring(name: str) -> None:
    error = getattr(errors, name)
    assert error.__doc__
    if name != "ConvergenceWarning":
        assert issubclass(error, DiffLayersError)


def test_errors_pickle() -> None:
    # Raised in a worker of a data loader or a process pool, an error travels.
    with pytest.raises(SingularError) as caught:
        report_failures(solution(0, Status.SINGULAR), "test", "raise")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.indices == [(1,)]
    assert torch.equal(copy.solution.status, caught.value.solution.status)


def test_vmap_returns_a_solution() -> None:
    found = torch.func.vmap(lambda x: Solution(x, x.long(), x, x.long()))(torch.zeros(3))
    assert isinstance(found, Solution)
    assert found.status.shape == (3,)
