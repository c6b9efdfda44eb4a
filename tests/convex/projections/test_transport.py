"""Transport plans: marginals to rounding, against a quadratic program, sparse and large, balanced or refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_birkhoff, projection_transport
from difflayers.errors import InfeasibleError, NotConvergedError, ShapeError
from tests.convex.projections.checks import rows, wide_rows


def _marginals(count: int, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(count, m, seed=100).softmax(-1), rows(count, n, seed=101).softmax(-1)


def _by_quadratic_program(S: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    m, n = S.shape[-2:]
    eye = torch.eye(m * n, dtype=S.dtype)
    sums = torch.cat([eye.reshape(m, n, -1).sum(1), eye.reshape(m, n, -1).sum(0)])
    solved = solve_qp(eye, -S.flatten(-2), A=sums, b=torch.cat([a, b], -1), lb=torch.zeros(m * n, dtype=S.dtype))
    return solved.x.reshape(S.shape)


@pytest.mark.parametrize(("m", "n"), [(1, 4), (3, 4), (5, 3)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_against_a_quadratic_program(m: int, n: int, scale: float) -> None:
    S, (a, b) = scale * rows(5, m, n, seed=0), _marginals(5, m, n)
    torch.testing.assert_close(projection_transport(S, (a, b)), _by_quadratic_program(S, a, b), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_marginals_are_met_to_rounding(scale: float) -> None:
    S, (a, b) = scale * rows(3, 12, 20, seed=1), _marginals(3, 12, 20)
    T = projection_transport(S, (a, b))
    assert (T >= 0).all()
    torch.testing.assert_close(T.sum(-1), a, rtol=0, atol=1e-14)
    torch.testing.assert_close(T.sum(-2), b, rtol=0, atol=1e-14)
    S = wide_rows(50, 3, 3, seed=2)
    torch.testing.assert_close(projection_birkhoff(S).sum(-1), torch.ones(50, 3, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_large_multiple_of_a_cost_gives_the_assignment() -> None:
    cost = rows(6, 6, seed=3)
    T = projection_birkhoff(-1e4 * cost)
    assert torch.equal(T.round(), T)
    assert (T.sum(-1) == 1).all()
    swapped = [(T * cost).sum() <= (T[torch.randperm(6, generator=torch.Generator().manual_seed(k))] * cost).sum() for k in range(20)]
    assert all(swapped)


def test_empty_marginals() -> None:
    S = rows(3, 4, seed=4).requires_grad_()
    a = torch.tensor([0.0, 0.4, 0.6], dtype=torch.float64)
    b = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    T = projection_transport(S, (a, b))
    assert not T[0].any()
    assert not T[:, [1, 3]].any()
    assert torch.isfinite(torch.autograd.grad((T * T).sum(), S)[0]).all()
    assert not projection_transport(S, (0 * a, 0 * b)).any()


def test_support_in_several_components() -> None:
    # A permutation is its own component entry by entry: nothing can move.
    S = 10 * torch.eye(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(projection_birkhoff)(S)
    assert jacobian.abs().max() <= 1e-12
    # Two blocks, each of which moves alone.
    blocks = 5 * torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).double() + 0.1 * rows(4, 4, seed=5)
    blocks.requires_grad_()
    assert gradcheck(projection_birkhoff, blocks, check_forward_ad=True)


def test_failures_stay_alone() -> None:
    S, (a, b) = rows(4, 3, 4, seed=6), _marginals(4, 3, 4)
    good = projection_transport(S, (a, b))
    unbalanced = a.clone()
    unbalanced[1] *= 1.1
    negative = b.clone()
    negative[1] += torch.tensor([-1.0, 0.5, 0.25, 0.25])
    for marginals in ((unbalanced, b), (a, negative)):
        with pytest.raises(InfeasibleError) as caught:
            projection_transport(S, marginals)
        assert caught.value.indices == [(1,)]
        T = projection_transport(S, marginals, on_failure="nan")
        assert T[1].isnan().all()
        torch.testing.assert_close(T[[0, 2, 3]], good[[0, 2, 3]], rtol=0, atol=1e-15)
    S[2, 0, 0] = torch.nan
    with pytest.raises(NotConvergedError) as caught:
        projection_transport(S, (a, b))
    assert caught.value.indices == [(2,)]


def test_float32_and_refusals() -> None:
    S, (a, b) = rows(3, 4, seed=7), _marginals(1, 3, 4)
    half = projection_transport(S.float(), (a[0].float(), b[0].float()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), projection_transport(S, (a[0], b[0])), rtol=0, atol=1e-6)
    with pytest.raises(ShapeError, match="a must"):
        projection_transport(S, (b[0], a[0]))
    with pytest.raises(ShapeError, match="m, n"):
        projection_transport(S[:, :0], (a[0], b[0, :0]))
    with pytest.raises(ShapeError, match="n, n"):
        projection_birkhoff(S)
