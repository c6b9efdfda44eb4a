"""Predictions conditioned on linear conservation laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.errors import ConvergenceWarning, InfeasibleError, NotConvergedError, ShapeError
from difflayers.pde import ConservationProjection, conservation_projection, trapezoid_weights
from difflayers.pde.problems import Stefan
from difflayers.solution import Status

LAWS = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))


def draw(n: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, covariance, value and weights; no more rows than points."""
    generator = torch.Generator().manual_seed(seed)
    rows = min(rows, n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root = normal(n, n)
    return (
        normal(n),
        root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64),
        normal(rows),
        torch.eye(rows, n).double() + 0.3 * normal(rows, n),
    )


def close(value: Tensor | None, exact: Tensor, tolerance: float = 1e-9) -> None:
    assert value is not None
    torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)


@given(LAWS)
@settings(max_examples=40, deadline=None)
def test_exact_laws_solve_the_bordered_system(law: tuple[int, int, int]) -> None:
    mean, covariance, value, G = draw(*law)
    n, rows = len(mean), len(value)
    system = torch.cat([torch.cat([covariance.inverse(), G.mT], 1), torch.cat([G, G.new_zeros(rows, rows)], 1)])
    exact = (system.inverse() @ torch.cat([covariance.inverse() @ mean, value]))[:n]
    found = conservation_projection(mean, covariance, value, G, covariance="full")
    close(found.mean, exact, 1e-7)
    close(found.covariance, system.inverse()[:n, :n], 1e-7)
    assert (G @ found.mean - value).abs().max() <= 1e-12 * max(1, float((G.abs() @ found.mean.abs()).max()))
    assert (G @ found.covariance).abs().max() <= 1e-11 * covariance.abs().max()


@given(LAWS, st.floats(0.05, 3))
@settings(max_examples=40, deadline=None)
def test_noisy_laws_give_the_posterior_in_precision_form(law: tuple[int, int, int], noise: float) -> None:
    mean, covariance, value, G = draw(*law)
    precision = covariance.inverse() + G.mT @ G / noise**2
    found = conservation_projection(mean, covariance, value, G, noise, covariance="full")
    close(found.covariance, precision.inverse(), 1e-8)
    close(found.mean, precision.inverse() @ (covariance.inverse() @ mean + G.mT @ value / noise**2), 1e-8)


@given(LAWS, st.sampled_from([0.0, 0.3]))
@settings(max_examples=40, deadline=None)
def test_a_variance_is_a_diagonal_covariance(law: tuple[int, int, int], noise: float) -> None:
    mean, covariance, value, G = draw(*law)
    variance = covariance.diagonal()
    found = conservation_projection(mean, variance, value, G, noise, full_posterior=True)
    full = conservation_projection(mean, variance.diag(), value, G, noise, covariance="full")
    for part, exact in zip(found[:4], full[:4], strict=True):
        close(part, exact, 1e-12)
    assert (found.variance >= 0).all()
    assert (found.variance <= variance * (1 + 1e-12)).all()
    assert found.variance.sum() < variance.sum()


@given(LAWS, st.sampled_from([0.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_laws_one_after_the_other_are_laws_together(law: tuple[int, int, int], noise: float) -> None:
    mean, covariance, value, G = draw(*law)
    together = conservation_projection(mean, covariance, value, G, noise, covariance="full")
    point, posterior, likelihood = mean, covariance, torch.zeros((), dtype=torch.float64)
    for row, b in zip(G, value, strict=True):
        found = conservation_projection(point, posterior, b, row, noise, covariance="full")
        assert found.covariance is not None
        point, posterior, likelihood = found.mean, found.covariance, likelihood + found.log_likelihood
    close(together.mean, point, 1e-8)
    close(together.covariance, posterior, 1e-8)
    close(together.log_likelihood, likelihood, 1e-8)


def test_the_limits_of_the_noise() -> None:
    mean, covariance, value, G = draw(5, 2, 0)
    variance = covariance.diagonal()
    exact = conservation_projection(mean, variance, value, G)
    for noise in (1e-3, 1e-4):
        found = conservation_projection(mean, variance, value, G, noise)
        assert (found.mean - exact.mean).abs().max() < 10 * noise**2
        assert exact.residual < found.residual < 10 * noise**2
    ignored = conservation_projection(mean, variance, value, G, 1e8)
    close(ignored.mean, mean, 1e-12)
    close(ignored.variance, variance, 1e-12)
    mixed = conservation_projection(mean, variance, value, G, torch.tensor([0.0, 1e8], dtype=torch.float64))
    close(mixed.mean, conservation_projection(mean, variance, value[0], G[0]).mean, 1e-12)


def test_ones_project_in_the_euclidean_norm() -> None:
    mean, _, value, G = draw(5, 2, 1)
    found = conservation_projection(mean, torch.ones_like(mean), value, G)
    close(found.mean, mean - torch.linalg.pinv(G) @ (G @ mean - value), 1e-12)


def heat(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, times (a few), and a solution of u_t = u_xx with insulated ends, whose mean stays 1."""
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    t = torch.linspace(0, 0.1, 4, dtype=torch.float64)[:, None]
    return (
        x,
        t,
        1 + torch.exp(-(math.pi**2) * t) * torch.cos(math.pi * x) + 0.3 * torch.exp(-4 * math.pi**2 * t) * torch.cos(2 * math.pi * x),
    )


def test_the_heat_equation_keeps_its_mass() -> None:
    x, _, u = heat(41)
    weights = trapezoid_weights(x)
    close(u @ weights, torch.ones(4, dtype=torch.float64), 1e-12)  # the trapezoidal rule is exact for these cosines
    generator = torch.Generator().manual_seed(0)
    deviation = 0.02 + 0.2 * torch.rand(u.shape, generator=generator, dtype=torch.float64)
    worse, better = 0, 0
    for _ in range(20):
        prediction = u + deviation * torch.randn(u.shape, generator=generator, dtype=torch.float64)
        found = conservation_projection(prediction, deviation**2, 1.0, weights)  # each time is a problem of its own
        assert (found.mean @ weights - 1).abs().max() < 1e-12
        assert (found.residual < 1e-12).all()
        plain = conservation_projection(prediction, torch.ones_like(u), 1.0, weights).mean
        worse += int((found.mean - u).square().mean() > (prediction - u).square().mean())
        better += int((found.mean - u).square().mean() < (plain - u).square().mean())
    # In the norm of the inverse covariance a projection on a set that holds the truth comes nearer to it, always.
    distance = [((part - u).square() / deviation**2).sum() for part in (found.mean, prediction)]
    assert distance[0] < distance[1]
    assert worse <= 4
    assert better >= 15


@pytest.mark.slow
def test_a_network_on_stefans_problem_errs_less() -> None:
    # It knows place and time, not the threshold: so it is unsure near the front, and the mass tells where that is.
    coordinates = torch.cartesian_prod(torch.linspace(0, 1, 41), torch.linspace(0, 1, 41)).unflatten(0, (41, 41))
    weights = trapezoid_weights(coordinates[0, :, 1].double())

    def problem(threshold: float) -> Stefan:
        return Stefan(points=41, times=41, threshold=threshold)

    learned = torch.stack([problem(0.55 + 0.01 * k).exact() for k in range(16)])
    for seed in range(3):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(500):
            mean, spread = network(coordinates).double().unbind(-1)
            variance = torch.nn.functional.softplus(spread).square() + 1e-4
            loss = ((learned - mean).square() / variance + variance.log())[:, 4:].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for threshold in (0.555, 0.605, 0.695):
            truth = problem(threshold).exact()[4:]
            found = conservation_projection(mean.detach()[4:], variance.detach()[4:], problem(threshold).mass()[4:], weights)
            assert found.residual.max() < 1e-12
            assert (found.mean - truth).square().mean() < (mean[4:] - truth).square().mean()


def test_one_row_per_time_is_a_batch_of_times() -> None:
    x, t, u = heat(9)
    weights = trapezoid_weights(x)
    rows = torch.einsum("st,x->stx", torch.eye(len(t), dtype=torch.float64), weights)
    variance = 0.1 + (x - 0.3) ** 2 + 0 * u
    one = conservation_projection(u + 0.3, variance, 1.0, rows, grid_ndim=2)
    batch = conservation_projection(u + 0.3, variance, 1.0, weights)
    close(one.mean, batch.mean, 1e-12)
    close(one.variance, batch.variance, 1e-12)
    assert one.residual < 1e-13


def test_float32_is_computed_in_float64() -> None:
    x = torch.linspace(0, 1, 200)
    found = conservation_projection(
        x.sin(), torch.rand(200, generator=torch.Generator().manual_seed(0)), 1 / 3, trapezoid_weights(x.double())
    )
    assert found.mean.dtype == found.variance.dtype == found.residual.dtype == torch.float32
    assert found.residual < 1e-13
    assert (torch.trapezoid(found.mean.double(), x.double()) - 1 / 3).abs() < 1e-6


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_redundant_rows_are_met_where_they_agree(scale: float) -> None:
    mean, covariance, value, G = draw(6, 2, 3)
    rows, values = torch.cat([G, scale * G.sum(0, keepdim=True)]), torch.cat([value, scale * value.sum(0, keepdim=True)])
    for form, prior in (("diagonal", covariance.diagonal()), ("full", covariance)):
        found = conservation_projection(mean, prior, values, rows, covariance=form)
        exact = conservation_projection(mean, prior, value, G, covariance=form)
        close(found.mean, exact.mean, 1e-11)
        close(found.variance, exact.variance, 1e-11)
        assert found.status == Status.SOLVED
    with pytest.raises(InfeasibleError):
        conservation_projection(mean, covariance.diagonal(), values + scale * torch.tensor([0, 0, 1e-6]), rows)


def test_nearly_redundant_rows_are_met_or_refused() -> None:
    mean, variance, weights = torch.zeros(4).double(), torch.ones(4).double(), torch.ones(4).double()
    for angle in [10.0**-k for k in range(1, 14)]:
        rows = torch.stack([weights, weights + angle * torch.tensor([1.0, -1.0, 0.5, 0.0])])
        found = conservation_projection(mean, variance, torch.tensor([1.0, 1.0 + angle]), rows, on_failure="nan")
        if found.status == Status.SOLVED:
            assert found.residual < 1e-10
        else:
            assert found.mean.isnan().all()
        assert found.status == Status.SOLVED or angle < 1e-5


def test_badly_scaled_laws_are_met_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for _ in range(60):
        rows, n = 5, 12
        G, variance, mean = normal(rows, n) * 10 ** (3 * normal(rows, 1)), 10 ** (2 * normal(n)), normal(n) * 10 ** (2 * normal(n))
        value = G @ normal(n)
        found = conservation_projection(mean, variance, value, G)
        size = G.abs() @ found.mean.abs() + value.abs()
        assert ((G @ found.mean - value).abs() / size).max() < 1e-13


def test_a_law_about_what_is_certain() -> None:
    mean, variance = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0])
    found = conservation_projection(mean, variance, torch.tensor([6.0, 7.0, 5.0]), torch.ones(3))
    close(found.mean, torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 4.0], [1.0, 2.0, 2.0]]), 1e-6)
    close(found.variance, torch.zeros(3, 3), 1e-6)
    certain = torch.tensor([1.0, 1.0, 0.0])  # speaks only of values that cannot move
    assert conservation_projection(mean, variance, 3.0, certain).status == Status.SOLVED
    with pytest.raises(InfeasibleError, match="1 of 2 problems"):
        conservation_projection(mean, variance, torch.tensor([3.0, 4.0]), certain)
    with pytest.warns(ConvergenceWarning, match="PRIMAL_INFEASIBLE"):
        conservation_projection(mean, variance, 4.0, certain, on_failure="warn")


def test_smoothness_is_a_stage_before_the_law() -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    truth = torch.sin(3 * x)
    prediction = truth + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
    weights = trapezoid_weights(x)
    variance = torch.full_like(x, 0.01)
    law = truth @ weights
    found = conservation_projection(prediction, variance, law, weights)
    smooth = conservation_projection(prediction, variance, law, weights, smoothness=0.9)
    assert smooth.residual < 1e-12
    assert (smooth.mean - truth).square().mean() < 0.5 * (found.mean - truth).square().mean()
    assert smooth.variance.sum() < found.variance.sum()
    closer = conservation_projection(prediction, variance, law, weights, smoothness=0.99)
    assert closer.mean.diff(n=2).square().sum() < smooth.mean.diff(n=2).square().sum()
    none = conservation_projection(prediction, torch.zeros_like(x), prediction @ weights, weights, smoothness=0.9)
    close(none.mean, prediction, 1e-12)


def test_the_likelihood_learns_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(5, dtype=torch.float64)
    mean = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    variance = torch.full_like(mean, 0.1)
    total = mean.sum(-1) + math.sqrt(0.5 + 0.3**2) * torch.randn(2000, generator=generator, dtype=torch.float64)
    project = ConservationProjection(weights, torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    optimizer = torch.optim.Adam(project.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -project.solve(mean, variance, total).log_likelihood.mean()
        loss.backward()
        optimizer.step()
    noise = project.noise
    assert isinstance(noise, Tensor)
    assert abs(noise.item() - 0.3) < 0.06


def test_a_failed_element_stands_alone() -> None:
    mean, covariance, value, G = draw(4, 2, 5)
    variance = covariance.diagonal().clone()
    means, variances = mean.repeat(4, 1), variance.repeat(4, 1)
    means[1, 2], variances[2, 0] = torch.nan, -1
    with pytest.raises(NotConvergedError) as caught:
        conservation_projection(means, variances, value, G)
    assert caught.value.indices == [(1,), (2,)]
    found = conservation_projection(means, variances, value, G, on_failure="nan", full_posterior=True)
    exact = conservation_projection(mean, variance, value, G, full_posterior=True)
    assert found.status.tolist() == [0, Status.NUMERICAL_ERROR, Status.NUMERICAL_ERROR, 0]
    for part, one in zip(found, exact, strict=True):
        assert part is not None
        assert one is not None
        close(part[0], one, 1e-14)
        close(part[3], one, 1e-14)
    assert all(part is not None and part[1:3].isnan().all() for part in found[:4])


def test_nothing_of_the_size_of_a_covariance_is_made() -> None:
    n = 100_000
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    prior = (torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1).requires_grad_()
    found = conservation_projection(x, prior, torch.tensor([1.0, 0.4]), torch.stack([trapezoid_weights(x), trapezoid_weights(x) * x]))
    found.mean.square().sum().backward()  # a covariance would take 80 GB
    assert found.residual < 1e-12


def test_the_module() -> None:
    x = torch.linspace(0, 1, 6)
    project = ConservationProjection(trapezoid_weights(x), 0.1, covariance="full", smoothness=0.5, on_failure="nan")
    mean, covariance = project(x, torch.eye(6), torch.ones(3))
    assert mean.shape == (3, 6)
    assert covariance.shape == (3, 6, 6)
    assert repr(project) == (
        "ConservationProjection(weights: (6,), noise=0.1, covariance='full', grid_ndim=1, smoothness=0.5, on_failure='nan')"
    )
    mean, variance = ConservationProjection(trapezoid_weights(x, x), grid_ndim=2)(torch.ones(6, 6), torch.ones(6, 6), 0.5)
    assert mean.shape == variance.shape == (6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.arange(3)}, "mean must be a floating tensor"),
        ({"weights": torch.ones(4)}, r"weights must have the shape .* grid \(3,\), got \(4,\)"),
        ({"variance": torch.ones(2)}, r"a variance .* \(3,\), got \(2,\)"),
        ({"covariance": "full"}, r"a covariance .* \(3, 3\), got \(3,\)"),
        ({"value": torch.ones(3)}, "value must have the shape .* 2 rows"),
        ({"noise": torch.ones(3)}, "noise must have the shape .* 2 rows"),
        ({"grid_ndim": 2}, "2 grid dimensions"),
    ],
)
def test_refuses_shapes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"mean": torch.ones(3), "variance": torch.ones(3), "value": torch.ones(2), "weights": torch.ones(2, 3)}
    with pytest.raises(ShapeError, match=message):
        conservation_projection(**(given | change))


def test_refuses_unknown_options() -> None:
    arguments = torch.ones(3), torch.ones(3), 1.0, torch.ones(3)
    with pytest.raises(ValueError, match="choose 'diagonal' or 'full'"):
        conservation_projection(*arguments, covariance="dense")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="smoothness"):
        conservation_projection(*arguments, smoothness=1.0)
    with pytest.raises(ValueError, match="on_failure"):
        conservation_projection(*arguments, on_failure="ignore")  # ty: ignore[invalid-argument-type]
