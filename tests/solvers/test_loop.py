import torch

from difflayers import Status
from difflayers.solvers.loop import Rows, relative, scale_of

from .checks import D, statuses


def test_a_row_that_ended_never_changes():
    rows = Rows(torch.zeros(3, 2, dtype=D))
    rows.count()
    assert rows.record(torch.ones(3, 2, dtype=D), torch.tensor([0.5, torch.nan, 0.1], dtype=D)).tolist() == [True, False, True]
    rows.stop(torch.tensor([False, True, True]), Status.SOLVED)
    rows.stop(torch.tensor([False, True, True]), Status.SINGULAR)
    rows.count()
    rows.record(torch.full((3, 2), 2.0, dtype=D), torch.tensor([0.4, 0.0, 0.0], dtype=D))
    assert rows.any_running()
    solution = rows.solution()
    assert statuses(solution) == [Status.MAX_ITER, Status.SOLVED, Status.SOLVED]
    assert solution.iterations.tolist() == [2, 1, 1]
    assert solution.x.tolist() == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    assert solution.residual.tolist() == [0.4, torch.inf, 0.1]


def test_the_best_iterate_is_kept_and_idleness_counted():
    rows = Rows(torch.zeros(2, 1))
    for i, residual in enumerate([3.0, 1.0, 2.0, torch.nan, 1.0]):
        rows.record(torch.full((2, 1), float(i)), torch.tensor([residual, 1.0]))
    assert rows.x.flatten().tolist() == [1.0, 0.0]
    assert rows.idle.tolist() == [3, 4]


def test_settling_takes_only_stalled_rows_at_rounding_level():
    rows = Rows(torch.zeros(3, 1, dtype=D))
    rows.settle(torch.tensor([True, True, False]), torch.tensor([1e-15, 1e-12, 1e-15], dtype=D))
    assert rows.running.tolist() == [False, True, True]
    assert statuses(rows.solution()) == [Status.SOLVED, Status.MAX_ITER, Status.MAX_ITER]


def test_scales():
    assert relative(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 2.0])).tolist() == [0.0, torch.inf, 0.5]
    x, start = torch.zeros(2, dtype=D), torch.tensor([3.0, 4.0], dtype=D)
    assert 0 < float(scale_of(x, start)) < 1e-7
    assert float(scale_of(start, x)) == 5.0
