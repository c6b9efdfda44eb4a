from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers.convex import Cones, solve_cone
from difflayers.convex.cone import _pattern
from difflayers.convex.cone_polish import polish
from difflayers.convex.cone_structure import Structure
from tests.convex.cone_programs import KINDS, known


@pytest.mark.parametrize("kind", KINDS)
def test_a_rough_point_becomes_the_solution(kind: str) -> None:
    cones, n = KINDS[kind]
    program = known(cones, n, 4, seed=2)
    (P, P_values), (A, A_values) = _pattern("P", program.P, (n, n)), _pattern("A", program.A, (cones.rows, n))
    structure = Structure((4,), cones, P, A)
    exact = torch.cat([program.x, program.s - program.y], -1)
    rough = exact + 1e-5 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.tensor([True, True, False, True])
    found = polish(structure, rough, program.s, [P_values, program.q, A_values, program.b], wanted, 1e-8)
    assert float(found.measured[0][wanted].max()) < 1e-12
    torch.testing.assert_close(found.point[wanted][:, :n], exact[wanted][:, :n], atol=1e-8, rtol=1e-8)
    assert torch.equal(found.point[2], rough[2])


@pytest.mark.parametrize(
    ("cones", "target", "nearest"),
    [
        (Cones(nonneg=3), [0.0, 1.0, -1.0], [0.0, 1.0, 0.0]),
        (Cones(soc=(3,)), [5.0, 3.0, 4.0], [5.0, 3.0, 4.0]),
        (Cones(soc=(3,)), [-5.0, 3.0, 4.0], [0.0, 0.0, 0.0]),
        (Cones(soc=(3,)), [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        (Cones(psd=(2,)), [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        (Cones(psd=(2,)), [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_solutions_where_primal_and_dual_are_zero_together(cones: Cones, target: list[float], nearest: list[float]) -> None:
    eye, q = torch.eye(3, dtype=torch.float64), -torch.tensor(target, dtype=torch.float64)
    q.requires_grad_()
    found = solve_cone(eye, q, -eye, torch.zeros(3, dtype=torch.float64), cones, solver="CLARABEL")
    torch.testing.assert_close(found.x, torch.tensor(nearest, dtype=torch.float64), atol=1e-9, rtol=0)
    assert bool(torch.autograd.grad(found.x.sum(), q)[0].isfinite().all())


def test_a_step_that_raises_the_residual_may_lead_to_the_solution() -> None:
    # A portfolio of which one share is all but unheld: from Clarabel's point the first step picks the wrong side.
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    F, r = draw(128, 30, 30)[59], draw(128, 30)[59]
    A = torch.cat([torch.ones(1, 30), -torch.eye(30)]).double()
    b = torch.cat([torch.ones(1), torch.zeros(30)]).double()
    found = solve_cone(2 * F.mT @ F, -r, A, b, Cones(zero=1, nonneg=30), solver="CLARABEL")
    dense = solve_cone(2 * F.mT @ F, -r, A, b, Cones(zero=1, nonneg=30), solver="QP")
    torch.testing.assert_close(found.x, dense.x, atol=1e-9, rtol=1e-9)
