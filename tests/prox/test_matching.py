"""Proximal matching: its value by hand, its limit, its gradient, what it refuses; the schedule as published and by given stages."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ShapeError
from difflayers.prox import MatchingStage, ProximalMatchingLoss, ProximalMatchingSchedule


def samples(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_is_a_mean_over_samples_of_the_whole_norm() -> None:
    x, y = samples(3, 2, 4, 5), samples(3, 2, 4, 5, seed=1)
    each = [1 - math.exp(-((y[i] - x[i]).square().sum() / 9.0**2)) for i in range(3)]
    assert ProximalMatchingLoss(9.0)(y, x).item() == pytest.approx(sum(each) / 3, rel=1e-13)
    pairs = [1 - math.exp(-((y[i, j] - x[i, j]).square().sum() / 4.0**2)) for i in range(3) for j in range(2)]
    assert ProximalMatchingLoss(4.0, batch_ndim=2)(y, x).item() == pytest.approx(sum(pairs) / 6, rel=1e-13)
    assert ProximalMatchingLoss(9.0, batch_ndim=0)(y[0], x[0]).item() == pytest.approx(each[0], rel=1e-13)
    assert ProximalMatchingLoss(0.5)(y[0, 0, 0], x[0, 0, 0]).shape == ()  # a batch of numbers


@given(st.floats(0.01, 100), st.floats(0, 50))
def test_is_within_zero_and_one_and_at_most_the_square(gamma: float, distance: float) -> None:
    y = torch.tensor([[distance]], dtype=torch.float64)
    value = ProximalMatchingLoss(gamma)(y, torch.zeros_like(y)).item()
    assert 0 <= value <= 1
    assert value <= (distance / gamma) ** 2 * (1 + 1e-12)
    assert (value == 0) == ((distance / gamma) ** 2 == 0)


def test_a_small_error_is_not_rounded_away() -> None:
    y = torch.full((1, 1), 1e-5)
    assert ProximalMatchingLoss(1.0)(y, torch.zeros(1, 1)).item() == pytest.approx(1e-10, rel=1e-5)


def test_derivatives() -> None:
    x, y = samples(3, 4).requires_grad_(), samples(3, 4, seed=1).requires_grad_()
    loss = ProximalMatchingLoss(2.0)
    assert gradcheck(loss, (y, x), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (y, x), check_fwd_over_rev=True)
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([y, x]), torch.stack([x, x])), torch.stack([loss(y, x), loss(x, x)]))
    # Where an error is far above γ there is nothing to learn from.
    assert torch.autograd.grad(ProximalMatchingLoss(0.01)(y, x), y)[0].abs().max() < 1e-100
    assert ProximalMatchingLoss(1.0)(y.float(), x.float()).dtype == torch.float32


def test_the_best_constant_is_the_mode() -> None:
    # Of a skewed distribution (gamma of shape 2: mode 1, median 1.68, mean 2) on a fine grid of quantiles.
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    x = torch.linspace(0, 30, 60_001, dtype=torch.float64)
    x = x[torch.searchsorted(1 - (1 + x) * torch.exp(-x), u)]
    guesses = torch.linspace(0.5, 2.5, 201, dtype=torch.float64)

    def best(loss: torch.nn.Module) -> float:
        return guesses[torch.stack([loss(guess.expand(len(x), 1), x[:, None]) for guess in guesses]).argmin()].item()

    assert best(torch.nn.MSELoss()) == pytest.approx(2.0, abs=0.011)
    assert best(torch.nn.L1Loss()) == pytest.approx(1.678, abs=0.011)
    assert best(ProximalMatchingLoss(0.2)) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf, "1"])
def test_gamma_must_be_positive(gamma) -> None:
    with pytest.raises(ValueError, match="gamma must be a positive number"):
        ProximalMatchingLoss(gamma)


def test_what_does_not_fit_is_refused() -> None:
    loss = ProximalMatchingLoss(1.0)
    with pytest.raises(ShapeError, match=r"\(4, 3\) and \(4, 1\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ShapeError, match="floating"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long))
    for shape in ((), (0, 3)):
        with pytest.raises(ShapeError, match="samples"):
            loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="batch_ndim"):
        ProximalMatchingLoss(1.0, batch_ndim=-1)
    assert repr(loss) == "ProximalMatchingLoss(gamma=1)"


def test_published_schedule() -> None:
    schedule = ProximalMatchingSchedule(numel=28 * 28)
    assert schedule.steps == 40_000
    assert schedule.stages[0] == MatchingStage(20_000, None, 1e-3)
    for k, factor in enumerate((8, 4, 2, 1)):
        stage = schedule.stages[1 + k]
        assert (stage.steps, stage.learning_rate) == (5_000, 1e-4)
        assert stage.gamma == pytest.approx(0.08 * 28 * factor)
    assert isinstance(schedule.loss(19_999), torch.nn.L1Loss)
    assert schedule.loss(20_000).gamma == pytest.approx(0.08 * 28 * 8)
    assert schedule.loss(39_999).gamma == schedule.loss(50_000).gamma == pytest.approx(0.08 * 28)
    assert (schedule.learning_rate(0), schedule.learning_rate(20_000)) == (1e-3, 1e-4)


@given(st.integers(20, 500), st.integers(0, 4), st.floats(0.1, 0.6))
def test_stages_fill_the_steps(steps: int, halvings: int, l1_share: float) -> None:
    schedule = ProximalMatchingSchedule(4, steps, l1_share=l1_share, halvings=halvings, scale=0.1)
    assert schedule.steps == steps == sum(stage.steps for stage in schedule.stages)
    gammas = [schedule.stage(step).gamma for step in range(steps)]
    assert gammas[0] is None
    assert gammas[-1] == pytest.approx(0.2)
    falling = [math.inf if gamma is None else gamma for gamma in gammas]
    assert falling == sorted(falling, reverse=True)
    lengths = [stage.steps for stage in schedule.stages[1:]]
    assert max(lengths) - min(lengths) <= 1


def test_given_stages_and_learning_rates_for_a_scheduler() -> None:
    schedule = ProximalMatchingSchedule.from_stages([(2, None, 1e-2), (1, None, 1e-3), (2, 0.5, 1e-4)])
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate)
    seen = []
    for _ in range(schedule.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [1e-2, 1e-2, 1e-3, 1e-4, 1e-4]
    assert repr(schedule) == "ProximalMatchingSchedule.from_stages([(2, None, 0.01), (1, None, 0.001), (2, 0.5, 0.0001)])"
    assert pickle.loads(pickle.dumps(schedule)).stages == schedule.stages


def test_schedules_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"numel": 0}, "numel"),
        ({"steps": 3}, "more steps or fewer stages"),
        ({"l1_share": 1.0}, "l1_share"),
        ({"halvings": -1}, "halvings"),
        ({"scale": 0.0}, "scale"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            ProximalMatchingSchedule(**{"numel": 4, **options})
    with pytest.raises(ValueError, match="at least one stage"):
        ProximalMatchingSchedule.from_stages([])
    with pytest.raises(ValueError, match="gamma"):
        ProximalMatchingSchedule.from_stages([(10, 0.0, 1e-3)])
    with pytest.raises(ValueError, match="step must be"):
        ProximalMatchingSchedule(4).loss(-1)
