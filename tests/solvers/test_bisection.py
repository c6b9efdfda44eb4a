import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import bisection

from .checks import D, assert_no_graph_no_mutation, assert_solved, statuses


def test_cube_roots_of_any_batch_shape():
    a = torch.tensor([[1.0, 8.0, 27.0], [0.0, -8.0, 1e-9]], dtype=D)
    solution = bisection(lambda x: x**3 - a, torch.tensor(-10.0, dtype=D), torch.full((3,), 10.0, dtype=D))
    assert_solved(solution)
    assert solution.x.shape == solution.status.shape == (2, 3)
    torch.testing.assert_close(solution.x, a.sign() * a.abs() ** (1 / 3), rtol=1e-13, atol=1e-7)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.sampled_from([D, torch.float32]))
def test_it_cannot_fail(root, below, above, dtype):
    lower, upper, root = (torch.tensor(value, dtype=dtype) for value in (root - below, root + above, root))
    solution = bisection(lambda x: torch.atan(x - root), lower, upper)
    assert_solved(solution)
    size = float((upper - lower).abs() + root.abs())
    assert float((solution.x - root).abs()) <= (1e-6 if dtype == torch.float32 else 1e-14) * size


def test_a_root_at_an_end_and_a_reversed_bracket():
    zero, one = torch.tensor(0.0, dtype=D), torch.tensor(1.0, dtype=D)
    for solution in (bisection(lambda x: x, zero, one), bisection(lambda x: x, one, zero), bisection(lambda x: x, -one, zero)):
        assert_solved(solution)
        assert solution.x == 0
        assert int(solution.iterations) == 0


def test_same_signs_are_an_error_that_names_the_element():
    a, lower, upper = torch.tensor([0.5, 7.0, 0.2]), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"1 of 3 brackets, first at index \(1,\).*widen the bracket"):
        bisection(lambda x: x - a, lower, upper)
    solution = bisection(lambda x: x - a, lower, upper, check_bracket=False)
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.SOLVED]
    assert solution.x[1] == 1.0


def test_nan_fails_alone_and_limits_are_kept():
    a = torch.tensor([0.5, torch.nan, 0.25], dtype=D)
    solution = bisection(lambda x: x - a, torch.zeros(3, dtype=D), torch.ones(3, dtype=D))
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.SOLVED]
    short = bisection(lambda x: x - 0.3, torch.tensor(0.0), torch.tensor(1.0), max_iter=3)
    assert statuses(short) == [Status.MAX_ITER]
    assert int(short.iterations) == 3
    assert abs(float(short.x) - 0.3) <= 1 / 8
    assert bisection(lambda x: x, torch.zeros(0), torch.ones(0)).x.shape == (0,)


def test_a_nan_inside_the_bracket():
    solution = bisection(lambda x: torch.where(x.abs() < 0.1, torch.nan, x - 0.05), torch.tensor([-1.0, -0.9]), torch.tensor([1.0, 1.1]))
    assert statuses(solution)[0] == Status.NUMERICAL_ERROR
    assert torch.isfinite(solution.x).all()


def test_no_graph_no_mutation():
    assert_no_graph_no_mutation(lambda lower, a: bisection(lambda x: x - a, lower, torch.full((2,), 5.0)), torch.zeros(2), torch.ones(2))


def test_bad_arguments():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    with pytest.raises(ShapeError, match="one dtype"):
        bisection(lambda x: x, zero, one.double())
    with pytest.raises(ShapeError, match="floating"):
        bisection(lambda x: x, zero.long(), one.long())
    with pytest.raises(ShapeError, match="shape"):
        bisection(lambda x: x[:2], torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="tol"):
        bisection(lambda x: x, zero, one, tol=-1.0)
