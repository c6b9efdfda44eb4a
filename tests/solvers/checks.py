"""What every solver must pass, as functions of one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers import Solution, Status

D = torch.float64


def statuses(solution: Solution) -> list[Status]:
    return [Status(code) for code in solution.status.flatten().tolist()]


def assert_solved(solution: Solution, tol: float | None = None) -> None:
    assert set(statuses(solution)) == {Status.SOLVED}, (statuses(solution), solution.residual)
    assert solution.status.dtype == solution.iterations.dtype == torch.int64
    assert solution.status.shape == solution.residual.shape == solution.iterations.shape
    if tol is not None:
        assert float(solution.residual.max()) <= tol


def assert_batch_is_loop(solve: Callable[..., Solution], *rows: Tensor, atol: float = 1e-12) -> Solution:
    """``solve(*rows)`` on the batch, and element by element with a batch of one: same status and iterations, same x to rounding."""
    batch = solve(*rows)
    for i in range(rows[0].shape[0]):
        single = solve(*[row[i : i + 1] for row in rows])
        assert int(single.status[0]) == int(batch.status[i])
        # BLAS rounds differently for other shapes, which may tip an iteration that is near its tolerance.
        assert abs(int(single.iterations[0]) - int(batch.iterations[i])) <= max(2, int(single.iterations[0]) // 10)
        if int(single.status[0]) == Status.SOLVED:
            torch.testing.assert_close(single.x[0], batch.x[i], atol=atol, rtol=atol, equal_nan=True)
    return batch


def assert_no_graph_no_mutation(solve: Callable[[Tensor, Tensor], Solution], start: Tensor, theta: Tensor) -> None:
    """``solve(start, theta)`` where both require a gradient: nothing records a graph, nothing is changed."""
    start, theta = start.clone().requires_grad_(), theta.clone().requires_grad_()
    before = [(t.detach().clone(), t._version) for t in (start, theta)]
    solution = solve(start, theta)
    assert not solution.x.requires_grad
    assert not solution.residual.requires_grad
    assert torch.is_grad_enabled()
    for tensor, (value, version) in zip((start, theta), before, strict=True):
        assert torch.equal(tensor.detach(), value)
        assert tensor._version == version


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spd(n, condition, *batch, seed=0, dtype=D):
    q = torch.linalg.qr(randn(*batch, n, n, seed=seed))[0]
    return ((q * condition ** torch.linspace(0, -1, n, dtype=D)) @ q.mT).to(dtype)


def quadratic(P, b):
    return lambda x: ((P @ x[..., None]).squeeze(-1) * x).sum(-1) / 2 - (b * x).sum(-1)
