"""What transport layers do before and after they solve."""

from __future__ import annotations

import pytest
import torch

from difflayers.errors import ShapeError
from difflayers.solution import Status
from difflayers.transport.arguments import cleaned, filled_where_lost, flattened, infeasibility, validate, what_failed
from tests.transport.problems import marginal, random_cost


def test_defaults_and_batches() -> None:
    batch, (_, a, b, gamma) = validate(random_cost(2, 1, 3, 4), None, None, torch.ones(5))
    assert batch == (2, 5)
    torch.testing.assert_close(a, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(b, torch.full((4,), 1 / 4, dtype=torch.float64))
    assert gamma.shape == (5,)


def test_messages_name_the_argument() -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        validate(random_cost(3, 4), None, None, -1.0, "gamma")
    with pytest.raises(ShapeError, match="a must be a tensor like the cost"):
        validate(random_cost(3, 4), torch.ones(3), None, 1.0)
    with pytest.raises(ShapeError, match="n, m ≥ 1"):
        validate(random_cost(3, 4)[:0], None, None, 1.0)


def test_what_is_not_finite_is_made_harmless() -> None:
    cost = random_cost(2, 3, 4)
    cost[1, 0, 0] = torch.nan
    C, a, _, _, usable = cleaned((cost, marginal(3), marginal(4), torch.tensor(1.0)))
    assert usable.tolist() == [True, False]
    assert not bool(C[1].any())
    torch.testing.assert_close(a, torch.stack([marginal(3), torch.full((3,), 1 / 3, dtype=torch.float64)]))


def test_marginals_that_admit_no_plan() -> None:
    a = torch.tensor([[0.5, 0.5], [0.5, 0.6], [1.5, -0.5]], dtype=torch.float64)
    b = torch.tensor([[1.0]], dtype=torch.float64).expand(3, 1)
    assert (infeasibility(a, b, 1e-9) > 0).tolist() == [False, True, True]
    status = torch.tensor([0, int(Status.PRIMAL_INFEASIBLE), 0])
    assert "a sums to 1.1" in what_failed("solve", status, a, b)
    assert "smallest entry is -0.5" in what_failed("solve", status.roll(1), a, b)
    assert what_failed("solve", torch.zeros(3), a, b) == "solve"


def test_flat_arguments_and_lost_elements() -> None:
    a, b = flattened((marginal(3), marginal(2, 4)), (2,), (1, 1))
    assert a.shape == (2, 3)
    assert b.shape == (2, 4)
    status = torch.tensor([int(Status.MAX_ITER), int(Status.NUMERICAL_ERROR)])
    counts = {how: int(filled_where_lost([b], status, how)[0].isnan().all(-1).sum()) for how in ("raise", "nan", "warn")}
    assert counts == {"raise": 0, "nan": 2, "warn": 1}
