"""Plans, potentials and values: closed forms, other packages, invariances, hard temperatures, failures."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, jvp, vmap

from difflayers import SinkhornLayer
from difflayers.errors import ConvergenceWarning, InfeasibleError, NotConvergedError, ShapeError, SingularError
from difflayers.solution import Status
from difflayers.transport import sinkhorn
from difflayers.transport.marginals import Marginals
from tests.transport.exact import exact_plan_and_slopes
from tests.transport.problems import COSTS, marginal, plain_sweeps, random_cost


def test_closed_form_of_two_points() -> None:
    # The plan of the cost (0, c; c, 0) with uniform marginals has the odds e^(c/ε).
    c = torch.tensor(0.7, dtype=torch.float64)
    plan = sinkhorn(c * (1 - torch.eye(2, dtype=torch.float64)), epsilon=0.3).plan
    stay = 0.5 * torch.sigmoid(c / 0.3)
    torch.testing.assert_close(plan, torch.stack([torch.stack([stay, 0.5 - stay]), torch.stack([0.5 - stay, stay])]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_marginals_are_met_and_derivatives_finite_at_every_temperature(name: str, epsilon: float, dtype: torch.dtype) -> None:
    cost = COSTS[name].to(dtype).requires_grad_()
    a, b = (marginal(size).to(dtype).requires_grad_() for size in cost.shape)
    found = sinkhorn(cost, a, b, epsilon=epsilon)
    assert found.plan.dtype == dtype
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    assert float(found.marginal_error) <= tol
    plan = found.plan.detach().double()
    error = max(float((plan.sum(dim) - part.detach()).abs().sum()) for dim, part in ((-1, a), (-2, b)))
    assert error <= 1.1 * tol + 1e-6 * (dtype == torch.float32)
    weights = torch.linspace(-1, 1, cost.numel(), dtype=dtype).reshape(cost.shape).sin()
    first = torch.autograd.grad((weights * found.plan).sum() + found.value, (cost, a, b), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), (cost, a, b))
    assert all(bool(torch.isfinite(part).all()) for part in (*first, *second))


def test_the_returned_numbers_are_what_they_say() -> None:
    cost, a, b = random_cost(3, 5, 7), marginal(3, 5), marginal(7, seed=1)
    found = sinkhorn(cost, a, b, epsilon=0.05)
    plan = torch.exp((found.f.unsqueeze(-1) + found.g.unsqueeze(-2) - cost) / 0.05)
    torch.testing.assert_close(found.plan, plan, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.value, (plan * cost).sum((-1, -2)))
    torch.testing.assert_close(found.dual_value, (a * found.f).sum(-1) + (b * found.g).sum(-1))
    torch.testing.assert_close(found.dual_value, found.value + 0.05 * (plan * plan.log()).sum((-1, -2)))
    torch.testing.assert_close((a * found.f).sum(-1), (b * found.g).sum(-1))
    error = torch.maximum((found.plan.sum(-1) - a).abs().sum(-1), (found.plan.sum(-2) - b).abs().sum(-1))
    torch.testing.assert_close(found.marginal_error, error, rtol=0.5, atol=1e-15)


def test_marginals_are_uniform_by_default() -> None:
    cost = random_cost(4, 6)
    found = sinkhorn(cost, epsilon=0.1)
    torch.testing.assert_close(found.plan.sum(-1), torch.full((4,), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(found.plan.sum(-2), torch.full((6,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize(("epsilon", "sweeps"), [(0.1, 300), (1e-2, 6000)])
def test_against_plain_sweeps(epsilon: float, sweeps: int) -> None:
    cost, a, b = random_cost(20, 15), marginal(20), marginal(15, seed=1)
    f, g = plain_sweeps(cost, a, b, epsilon, sweeps)
    exact = torch.exp((f.unsqueeze(-1) + g - cost) / epsilon)
    torch.testing.assert_close(sinkhorn(cost, a, b, epsilon=epsilon).plan, exact, rtol=0, atol=1e-9)


def test_a_small_temperature_gives_the_unregularized_cost() -> None:
    cost = random_cost(30, 30, seed=5)
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    exact = float(cost[rows, columns].mean())
    for epsilon in (1e-2, 1e-3, 1e-4):
        excess = float(sinkhorn(cost, epsilon=epsilon).value) - exact
        assert -1e-12 <= excess <= epsilon * math.log(30)


def test_methods_agree() -> None:
    cost, a, b = random_cost(2, 9, 6), marginal(9), marginal(2, 6, seed=1)
    found = [sinkhorn(cost, a, b, epsilon=0.02, method=method, tol=1e-13) for method in ("auto", "sinkhorn", "newton")]
    for other in found[1:]:
        torch.testing.assert_close(other.plan, found[0].plan, rtol=0, atol=1e-13)
        torch.testing.assert_close(other.f, found[0].f)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(-3, 1), st.integers(0, 10_000))
def test_invariances(n: int, m: int, log_epsilon: float, seed: int) -> None:
    cost, a, b, epsilon = random_cost(n, m, seed=seed), marginal(n, seed=seed), marginal(m, seed=seed + 1), 10**log_epsilon
    plan = sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-12).plan
    assert bool((plan >= 0).all())

    def close(other: Tensor) -> None:
        torch.testing.assert_close(other, plan, rtol=0, atol=1e-7)

    # A cost of leaving or of arriving changes nothing.
    close(sinkhorn(cost + random_cost(n, 1, seed=seed + 2) - random_cost(m, seed=seed + 3), a, b, epsilon=epsilon, tol=1e-12).plan)
    close(sinkhorn(3 * cost, a, b, epsilon=3 * epsilon, tol=1e-12).plan)
    close(sinkhorn(cost, 5 * a, 5 * b, epsilon=epsilon, tol=1e-12).plan / 5)
    close(sinkhorn(cost.mT, b, a, epsilon=epsilon, tol=1e-12).plan.mT)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    close(sinkhorn(cost[:, order], a, b[order], epsilon=epsilon, tol=1e-12).plan[:, order.argsort()])


def test_the_dual_value_is_differentiated_without_a_linear_system(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = random_cost(2, 5, 4).requires_grad_(), marginal(5).requires_grad_(), marginal(4, seed=1).requires_grad_()
    found = sinkhorn(cost, a, b, epsilon=0.05)

    def refuse(*_: object) -> None:
        raise AssertionError("a linear system was solved")

    monkeypatch.setattr(Marginals, "solve_linear", refuse)
    slopes = torch.autograd.grad(found.dual_value.sum(), (cost, a, b))
    torch.testing.assert_close(slopes[0], found.plan)
    for slope, potential in zip(slopes[1:], (found.f, found.g), strict=True):
        shift = slope - potential.sum(0)
        torch.testing.assert_close(shift, shift.mean().expand_as(shift))


def test_the_dual_value_when_the_mass_changes() -> None:
    cost, a, b = random_cost(5, 4), marginal(5), marginal(4, seed=1)
    t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sinkhorn(cost, t * a, t * b, epsilon=0.1, tol=1e-14).dual_value, t)
    assert torch.autograd.gradgradcheck(lambda t: sinkhorn(cost, t * a, t * b, epsilon=0.1, tol=1e-14).dual_value, t)


def test_gradient_of_the_plan_at_a_low_temperature() -> None:
    cost, logits = random_cost(200, 200), random_cost(200, seed=1)
    weights, step = random_cost(200, 200, seed=2) - 0.5, 1e-6

    def loss(cost: Tensor, logits: Tensor, **options: float) -> Tensor:
        return (weights * sinkhorn(cost, logits.softmax(-1), epsilon=1e-3, **options).plan).sum()

    leaves = cost.clone().requires_grad_(), logits.clone().requires_grad_()
    slopes = torch.autograd.grad(loss(*leaves), leaves)
    directions = random_cost(200, 200, seed=3) - 0.5, random_cost(200, seed=4) - 0.5

    def along(t: float) -> Tensor:
        return loss(*(x + t * step * v for x, v in zip((cost, logits), directions, strict=True)), tol=1e-13)

    exact = (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * step)
    pushed = sum((slope * v).sum() for slope, v in zip(slopes, directions, strict=True))
    assert float((pushed - exact).abs() / exact.abs()) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_against_eighty_digits(seed: int) -> None:
    n, m, epsilon = 1 + seed % 6, 2 + seed % 5, 10 ** (-3.3 * seed / 29)
    cost, a, b, G = random_cost(n, m, seed=seed), marginal(n, seed=seed), marginal(m, seed=seed + 1), random_cost(n, m, seed=seed + 2)
    leaves = [part.requires_grad_() for part in (cost, a, b)]
    found = sinkhorn(*leaves, epsilon=epsilon)
    slopes = torch.autograd.grad((found.plan * G).sum(), leaves)
    plan, exact = exact_plan_and_slopes(*(part.detach() for part in leaves), epsilon, found, G)
    torch.testing.assert_close(found.plan.detach(), plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(epsilon * slopes[0], epsilon * exact[0], rtol=0, atol=1e-9)
    # The constant that may be shifted between a and b: each side's own, and the same for both.
    shifts = [slope - true for slope, true in zip(slopes[1:], exact[1:], strict=True)]
    torch.testing.assert_close(torch.cat([shifts[0], -shifts[1]]), shifts[0].mean().expand(n + m), rtol=0, atol=1e-6)


def test_two_layers_in_one_loss() -> None:
    cost = random_cost(6, 6).requires_grad_()
    weights = random_cost(6, 6, seed=1)

    def losses() -> tuple[Tensor, Tensor]:
        first = sinkhorn(cost, epsilon=0.1).plan
        return (weights * first).sum(), (weights * sinkhorn(first + cost, epsilon=0.05).plan).square().sum()

    apart = [torch.autograd.grad(losses()[i], cost)[0] for i in range(2)]
    together = torch.autograd.grad(sum(losses()), cost)[0]
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_zero_marginals_equal_the_problem_without_them() -> None:
    cost = random_cost(6, 5).requires_grad_()
    a = torch.tensor([0.3, 0.0, 0.3, 0.0, 0.2, 0.2], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25], dtype=torch.float64, requires_grad=True)
    rows, columns = a.detach().nonzero().squeeze(-1), b.detach().nonzero().squeeze(-1)
    for epsilon in (0.1, 1e-3):
        found = sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-13)
        small = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=epsilon, tol=1e-13)
        assert torch.equal(found.f.isneginf(), a == 0)
        assert torch.equal(found.g.isneginf(), b == 0)
        torch.testing.assert_close(found.plan[rows][:, columns], small.plan, rtol=0, atol=1e-12)
        assert float(found.plan.detach().sum()) == pytest.approx(1)
        weights = random_cost(6, 5, seed=3)
        exact = torch.autograd.grad((weights[rows][:, columns] * small.plan).sum() + small.f.sum() - small.g[0], (cost, a, b))
        slopes = torch.autograd.grad((weights * found.plan).sum() + found.f[rows].sum() - found.g[columns[0]], (cost, a, b))
        torch.testing.assert_close(slopes[0], exact[0], rtol=1e-6, atol=1e-7)
        for slope, true, kept in zip(slopes[1:], exact[1:], (rows, columns), strict=True):
            shift = (slope - true)[kept]
            torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=1e-6, atol=1e-7)
            assert slope.count_nonzero() == len(kept)


def test_no_mass_at_all() -> None:
    cost = random_cost(3, 2).requires_grad_()
    nothing = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = sinkhorn(cost, nothing, torch.zeros(2, dtype=torch.float64))
    assert not found.plan.any()
    slopes = torch.autograd.grad(found.plan.sum() + found.value + found.dual_value, (cost, nothing))
    assert not any(slope.any() for slope in slopes)


def test_elements_stop_alone() -> None:
    # A problem that sweeps solve beside one that needs Newton's method, one without mass and one that is spoiled.
    cost = torch.stack([random_cost(8, 8), 100 * random_cost(8, 8, seed=1), random_cost(8, 8), random_cost(8, 8) * torch.nan])
    a = torch.full((4, 8), 1 / 8, dtype=torch.float64)
    b = a.clone()
    a[2] = b[2] = 0
    found = sinkhorn(cost, a, b, epsilon=0.1, on_failure="nan")
    assert found.status.tolist() == [0, 0, 0, Status.NUMERICAL_ERROR]
    for i in range(3):
        alone = sinkhorn(cost[i], a[i], b[i], epsilon=0.1)
        assert int(alone.iterations) == int(found.iterations[i])
        torch.testing.assert_close(found.plan[i], alone.plan, rtol=0, atol=1e-14)
    assert len(set(found.iterations.tolist())) > 1


def test_a_temperature_for_each_element() -> None:
    cost, epsilon = random_cost(4, 4), torch.tensor([1.0, 0.1, 1e-3], dtype=torch.float64)
    found = sinkhorn(cost, epsilon=epsilon)
    torch.testing.assert_close(found.plan, torch.stack([sinkhorn(cost, epsilon=float(e)).plan for e in epsilon]), rtol=0, atol=1e-10)
    mapped = vmap(lambda e: sinkhorn(cost, epsilon=e).plan)(epsilon)
    torch.testing.assert_close(mapped, found.plan)


def test_masses_that_differ_and_negative_marginals_are_named() -> None:
    cost, a = random_cost(2, 2), torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match=r"same total mass; a sums to 1, b to 1\.2"):
        sinkhorn(cost, a, 1.2 * a)
    with pytest.raises(InfeasibleError, match=r"must not be negative; the smallest entry is -0\.1"):
        sinkhorn(cost, a, torch.tensor([1.1, -0.1], dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="same total mass"):
        found = sinkhorn(cost, a, 1.2 * a, on_failure="warn")
    torch.testing.assert_close(found.plan.sum(-1), a)
    assert found.status == Status.PRIMAL_INFEASIBLE
    # Rounding of the dtype is not a difference.
    sinkhorn(cost.float(), a.float(), a.float() * (1 + 3e-7))
    sinkhorn(cost, a, a * (1 + 1e-12))


def test_too_few_iterations() -> None:
    cost = random_cost(30, 30)
    with pytest.raises(NotConvergedError) as caught:
        sinkhorn(cost, epsilon=1e-3, method="sinkhorn", max_iter=50)
    assert caught.value.solution.status == Status.MAX_ITER
    with pytest.warns(ConvergenceWarning):
        found = sinkhorn(cost, epsilon=1e-3, method="sinkhorn", max_iter=50, on_failure="warn")
    assert float((found.plan.sum(-1) - 1 / 30).abs().sum()) == pytest.approx(float(found.marginal_error))
    assert sinkhorn(cost, epsilon=1e-3, method="sinkhorn", max_iter=50, on_failure="nan").plan.isnan().all()


def test_potentials_of_groups_that_exchange_nothing_have_no_derivative() -> None:
    # Two groups of points far apart: the plan's derivative exists, that of the height of one group beside the other is lost in rounding.
    line = torch.tensor([0.0, 0.1, 10.0, 10.1], dtype=torch.float64)
    cost = ((line[:, None] - line) ** 2 + 0.001 * random_cost(4, 4)).requires_grad_()
    found = sinkhorn(cost, epsilon=0.01)
    (slope,) = torch.autograd.grad((found.plan * random_cost(4, 4, seed=1)).sum(), cost, retain_graph=True)
    assert torch.isfinite(slope).all()
    (within,) = torch.autograd.grad((found.f[0] - found.f[1]), cost, retain_graph=True)
    assert torch.isfinite(within).all()
    with pytest.raises(SingularError, match="behind a derivative"):
        torch.autograd.grad(found.f[0] - found.f[2], cost)


def test_forward_mode_and_jacobians() -> None:
    cost, a = random_cost(3, 4), marginal(3)
    jacobian = jacrev(lambda c: sinkhorn(c, a, epsilon=0.2, tol=1e-13).plan)(cost)
    direction = random_cost(3, 4, seed=9)
    pushed = jvp(lambda c: sinkhorn(c, a, epsilon=0.2, tol=1e-13).plan, (cost,), (direction,))[1]
    torch.testing.assert_close((jacobian * direction).sum((-1, -2)), pushed)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 2, dtype=torch.int64),), {}, "floating tensor"),
        ((torch.ones(3),), {}, "shape"),
        ((torch.ones(3, 0),), {}, "shape"),
        ((torch.ones(2, 3), torch.ones(3) / 3), {}, r"a must have the shape \(\*batch, 2\)"),
        ((torch.ones(2, 3), None, torch.ones(3).double() / 3), {}, "b must be a tensor like the cost"),
        ((torch.ones(2, 3), [0.5, 0.5]), {}, "a must be a tensor like the cost"),
        ((torch.ones(4, 2, 3), torch.ones(5, 2) / 2), {}, "broadcast"),
        ((torch.ones(2, 2),), {"epsilon": 0.0}, "epsilon must be positive"),
        ((torch.ones(2, 2),), {"max_iter": 0}, "max_iter must be at least 1"),
        ((torch.ones(2, 2),), {"method": "auction"}, "method='auction'"),
        ((torch.ones(2, 2),), {"backward": "envelope"}, "backward='envelope'"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises((ShapeError, ValueError), match=message):
        sinkhorn(*arguments, **options)


def test_module() -> None:
    layer = SinkhornLayer(epsilon=0.05, method="newton", tol=1e-12)
    cost = random_cost(3, 4)
    assert torch.equal(layer(cost), layer.solve(cost).plan)
    assert repr(layer) == "SinkhornLayer(epsilon=0.05, on_failure='raise', method='newton', tol=1e-12)"
    fixed = SinkhornLayer(torch.tensor(0.05, dtype=torch.float64))
    assert "epsilon" in fixed.state_dict()
    assert not list(fixed.parameters())
    learned = SinkhornLayer(torch.nn.Parameter(torch.tensor(0.05, dtype=torch.float64)))
    (slope,) = torch.autograd.grad(learned.solve(cost).value, learned.epsilon)
    assert float(slope) > 0  # a higher temperature costs more
    torch.testing.assert_close(fixed(cost), layer(cost), rtol=0, atol=1e-9)
