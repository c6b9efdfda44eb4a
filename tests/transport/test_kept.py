"""Products with the entries that matter, and conjugate gradients."""

from __future__ import annotations

import pytest
import torch

from difflayers.transport.kept import Kept, conjugate_gradients
from tests.transport.problems import random_cost


@pytest.mark.parametrize("least", [0.95, 1e-3])
def test_products(least: float) -> None:
    matrix = random_cost(40, 30)
    kept = Kept(matrix, least)
    assert kept.sparse == (least > 0.9)
    exact = torch.where(matrix >= least, matrix, 0) if kept.sparse else matrix
    u, v = random_cost(40, seed=1), random_cost(30, seed=2)
    torch.testing.assert_close(kept.times(v), exact @ v)
    torch.testing.assert_close(kept.transposed(u), exact.mT @ u)
    torch.testing.assert_close(kept.squares_transposed(u), exact.square().mT @ u)


def test_rows_and_columns_without_entries() -> None:
    matrix = torch.zeros(5, 4, dtype=torch.float64)
    matrix[1, 2] = 2.0
    kept = Kept(matrix, 0.5)
    torch.testing.assert_close(kept.times(torch.ones(4, dtype=torch.float64)), matrix.sum(1))
    torch.testing.assert_close(kept.transposed(torch.ones(5, dtype=torch.float64)), matrix.sum(0))


def test_no_warning_of_sparse_tensors() -> None:
    torch.set_warn_always(True)
    try:
        Kept(random_cost(20, 20), 0.99)
    finally:
        torch.set_warn_always(False)


def test_conjugate_gradients() -> None:
    root = random_cost(12, 12) - 0.5
    matrix, rhs = root @ root.mT + torch.eye(12, dtype=torch.float64), random_cost(12, seed=1)
    x, reached = conjugate_gradients(lambda v: matrix @ v, 1 / matrix.diagonal(), rhs, 1e-13, 50)
    assert reached
    torch.testing.assert_close(matrix @ x, rhs)
    _, reached = conjugate_gradients(lambda v: matrix @ v, torch.ones_like(rhs), rhs, 1e-13, 2)
    assert not reached
    x, reached = conjugate_gradients(lambda v: matrix @ v, torch.ones_like(rhs), 0 * rhs, 1e-13, 50)
    assert reached
    assert not bool(x.any())


def test_conjugate_gradients_do_not_take_an_indefinite_matrix() -> None:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    _, reached = conjugate_gradients(lambda v: signs * v, torch.ones_like(signs), torch.ones_like(signs), 1e-12, 50)
    assert not reached
