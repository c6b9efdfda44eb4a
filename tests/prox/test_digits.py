"""Digits of 8 × 8 pixels in [0, 1]: what a learned proximal network removes of noise, and reconstructs by plug-and-play.

The figures of the method, with the network trained here: 1437 digits to learn from, 360 held out, both drawn anew for each seed. Noise
of σ = 0.2 is 14.0 dB. PSNR is the mean over the digits held out of each one's own. Compressed sensing: 32 noiseless measurements of the
64 pixels by orthonormal random rows, drawn anew for each seed, and ADMM in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers import Status
from difflayers.prox import L2, InputConvexNN, LearnedProximalNetwork, MatrixOperator, PlugAndPlay, ProximalMatchingSchedule

pytestmark = pytest.mark.slow

SIGMA, STEPS, RATE = 0.2, 800, 2e-2
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def trained(request: pytest.FixtureRequest) -> tuple[int, LearnedProximalNetwork, Tensor]:
    """A seed, a network that was trained by proximal matching, and the digits held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    generator = torch.Generator().manual_seed(request.param)
    digits = torch.from_numpy(datasets.load_digits().data / 16).float()
    digits = digits[torch.randperm(len(digits), generator=generator)]
    test, training = digits[:360], digits[360:]
    torch.manual_seed(request.param)
    network = LearnedProximalNetwork(InputConvexNN(64, hidden=256, layers=2, center=0.5))
    schedule = ProximalMatchingSchedule(64, STEPS)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        x = training[torch.randint(len(training), (128,), generator=generator)]
        y = x + SIGMA * torch.randn(x.shape, generator=generator)
        loss = schedule.loss(step)(network(y), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return request.param, network.double().requires_grad_(False), test.double()


def psnr(x: Tensor, truth: Tensor) -> float:
    return float(-10 * (x - truth).square().mean(-1).log10().mean())


def test_removes_noise(trained: tuple[int, LearnedProximalNetwork, Tensor]) -> None:
    seed, network, x = trained
    y = x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=x.dtype)
    assert psnr(y, x) == pytest.approx(14.0, abs=0.15)
    assert psnr(network(y), x) >= 19.8


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_reconstructs_from_half_the_measurements(trained: tuple[int, LearnedProximalNetwork, Tensor], solver: str) -> None:
    seed, network, x = trained
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    matrix = torch.linalg.qr(rows)[0].mT.contiguous()
    layer = PlugAndPlay(
        "admm",
        prior=network,
        data_fidelity=L2(MatrixOperator(matrix), weight=8.0),
        stepsize=1.0,
        solver=solver,
        tol=1e-6,
        max_iter=100,
        on_failure="nan",
    )
    found = layer.solve(x @ matrix.mT)
    solved = found.status == Status.SOLVED
    # The prior is not convex: as it is, ADMM goes in circles for a few digits. Accelerated, it reaches all of them.
    assert solved.double().mean() >= (1.0 if solver == "anderson" else 0.95)
    assert found.residual[solved].max() <= 1e-6
    assert psnr(found.x[solved], x[solved]) >= 23.2


def test_jacobian_is_symmetric_and_strongly_monotone(trained: tuple[int, LearnedProximalNetwork, Tensor]) -> None:
    _, network, x = trained
    jacobians = torch.func.vmap(torch.func.jacrev(network))(torch.cat((x[:16], torch.rand(16, 64, dtype=x.dtype))))
    assert (jacobians - jacobians.mT).abs().max() <= 1e-6
    assert torch.linalg.eigvalsh(jacobians).min() >= network.strong_convexity * (1 - 1e-9)


def test_prior_rises_with_noise(trained: tuple[int, LearnedProximalNetwork, Tensor]) -> None:
    seed, network, x = trained
    x = x[:32]
    assert (network(network.inverse(x)) - x).norm(dim=-1).max() <= 1e-8
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(200 + seed), dtype=x.dtype)
    prior = network.prior(torch.stack([x, x + 0.1 * noise, x + 0.2 * noise]))
    assert (prior.diff(dim=0) > 0).all()
