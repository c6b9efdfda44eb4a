r"""
Deblur photographs and fill in measurements with a learned prior
================================================================

One denoiser, trained once, solves inverse problems that it has never seen: an image :math:`x` is found from measurements
:math:`y = A x + \text{noise}` as a fixed point of the alternating directions method (ADMM)

.. math:: u = \operatorname{prox}_{s f}(x - z), \qquad x = D(u + z), \qquad z \leftarrow z + u - x, \qquad f(x) = \tfrac12 \|A x - y\|^2,

with the denoiser :math:`D` where the proximal operator of a prior would stand. Does this have a fixed point, and is it reached? For any
network, nobody knows. A :class:`~difflayers.LearnedProximalNetwork` *is* a proximal operator: of a prior that it learned. If its
slope is nowhere above one, that prior is convex, and the iterations go to the minimizer of :math:`s f` plus this prior, for any
:math:`s > 0`.

Below, such a network and an ordinary one with as many filters are trained on patches of photographs. Both, and total variation, then
deblur other photographs and reconstruct them from three random numbers for each ten pixels.

Reference: Goujon, Neumayer, Bohra, Ducotterd, Unser, A neural-network-based convex regularizer for inverse problems, IEEE Trans. Comput.
Imaging 9, 2023, arXiv:2211.12461.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from skimage import data
from skimage.color import rgb2gray
from skimage.transform import rescale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from difflayers import LearnedProximalNetwork, PlugAndPlay, Status
from difflayers.prox import L2, Blur, LinearOperator
from difflayers.prox.operators import solve_tv2d

parser = argparse.ArgumentParser(description="Plug-and-play reconstruction of photographs with a learned proximal network.")
parser.add_argument("--steps", type=int, default=400, help="training steps of each network")
parser.add_argument("--filters", type=int, default=32, help="filters of each network, a multiple of 4")
parser.add_argument("--crops", type=int, default=4, help="pieces of each unseen photograph to judge by")
options, _ = parser.parse_known_args()
ITERATIONS, WEIGHTS = 120, (4.0, 8.0, 16.0, 32.0, 64.0)
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.crops, ITERATIONS, WEIGHTS = 20, 1, 8, (4.0, 16.0)
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)
torch.set_flush_denormal(True)  # the tails of the activations would be computed with denormal numbers, which are slow

# %%
# The photographs
# ---------------
# Half size, grey values between 0 and 1. Five to learn from and to tune on, two to be judged on.

PATCH, SIZE, SIGMA = 32, 64, 0.03


def grey(photograph) -> Tensor:
    grey_values = rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0
    return torch.as_tensor(rescale(grey_values, 0.5, anti_aliasing=True), dtype=torch.float32)


seen = [grey(p) for p in (data.astronaut(), data.chelsea(), data.coins(), data.rocket(), data.stereo_motorcycle()[0])]
unseen = [grey(p) for p in (data.camera(), data.coffee())]


def draw(photographs: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Square pieces of the photographs in turn, turned by multiples of 90°, ``(count, 1, size, size)``."""
    pieces = []
    for k in range(count):
        photograph = photographs[k % len(photographs)]
        row, column = (int(torch.randint(length - size + 1, (), generator=generator)) for length in photograph.shape)
        turns = int(torch.randint(4, (), generator=generator))
        pieces.append(torch.rot90(photograph[row : row + size, column : column + size], turns))
    return torch.stack(pieces)[:, None]


def decibels(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image."""
    return -10 * torch.log10((estimate - clean).square().mean((-1, -2, -3)))


# %%
# Two networks
# ------------
# Both take from the image what a layer of 7 × 7 filters finds in it and bounded activations let through,
#
# .. math:: D(x) = x - S^T \rho(K x), \qquad \rho(u) = t \tanh(u / t).
#
# In the ordinary network the two convolutions are free. In the other one they are the same, :math:`S = K`, and scaled to
# :math:`\|K\| \le 1`. As :math:`0 \le \rho' \le 1`, the slopes of :math:`D`, the eigenvalues of
# :math:`I - K^T \operatorname{diag}(\rho'(K x)) K`, are then between 0 and 1. So :math:`D` is the gradient of a convex
# function, and nonexpansive: the potential below goes to :class:`~difflayers.LearnedProximalNetwork`, with a lower bound of the slopes.
#
# Which norm has :math:`K`? Images are continued by their mirror images. A filter comes with its own three mirror images, so that each
# quarter of the mirrored image has the same share of the energy, and :math:`\|K\|^2` is at most the largest value of
# :math:`\sum_i |\hat k_i(\omega)|^2` at the frequencies of the mirrored image.

SLOPE = 0.02
MARGIN = 3  # of a filter of 7 × 7


def mirrored(filters: Tensor) -> Tensor:
    """Each filter in its four mirror images."""
    filters = torch.cat([filters, filters.flip(-1)])
    return torch.cat([filters, filters.flip(-2)])


def sources(size: int) -> Tensor:
    """For each place of a line that is continued by its mirror image the place its value comes from."""
    place = torch.arange(-MARGIN, size + MARGIN) % (2 * size)
    return torch.minimum(place, 2 * size - 1 - place)


def convolved(x: Tensor, filters: Tensor) -> Tensor:
    """K x."""
    for dim in (-2, -1):
        x = x.index_select(dim, sources(x.shape[dim]))
    return F.conv2d(x, mirrored(filters))


def transposed(u: Tensor, filters: Tensor) -> Tensor:
    """Kᵀ u."""
    x = F.conv_transpose2d(u, mirrored(filters))
    for dim in (-2, -1):
        shape = list(x.shape)
        shape[dim] -= 2 * MARGIN
        x = x.new_zeros(shape).index_add(dim, sources(shape[dim]), x)
    return x


class UnitNorm(nn.Module):
    """Filters without a mean, scaled to ‖K‖ = 1 for images of up to SIZE pixels in each direction that divide it."""

    def forward(self, raw: Tensor) -> Tensor:
        filters = raw - raw.mean((-1, -2), keepdim=True)
        spectrum = torch.fft.rfft2(mirrored(filters), s=(2 * SIZE, 2 * SIZE))
        return filters / spectrum.abs().square().sum((0, 1)).max().sqrt()


class RidgePotential(nn.Module):
    """(1 − μ) (½ ‖x‖² − Σ t² log cosh(K x / t)), convex whatever the filters are."""

    event_ndim = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = nn.Parameter(torch.randn(options.filters // 4, 1, 7, 7) / 7)
        self.log_bound = nn.Parameter(torch.full((options.filters // 4, 1, 1), math.log(SIGMA / 2)))
        parametrize.register_parametrization(self, "filters", UnitNorm())

    def forward(self, x: Tensor) -> Tensor:
        bound = self.log_bound.exp().repeat(4, 1, 1)
        u = (convolved(x, self.filters) / bound).abs()
        log_cosh = u + F.softplus(-2 * u) - math.log(2)
        return (1 - SLOPE) * (x.square().sum((-1, -2, -3)) / 2 - (bound.square() * log_cosh).sum((-1, -2, -3)))

    def gradient(self, x: Tensor) -> Tensor:
        bound, filters = self.log_bound.exp().repeat(4, 1, 1), self.filters
        return (1 - SLOPE) * (x - transposed(bound * torch.tanh(convolved(x, filters) / bound), filters))


class OrdinaryNetwork(nn.Module):
    """The same, with two convolutions that are free."""

    def __init__(self) -> None:
        super().__init__()
        start = RidgePotential()
        raw = start.get_parameter("parametrizations.filters.original").detach()
        raw = raw - raw.mean((-1, -2), keepdim=True)
        self.analysis, self.synthesis = nn.Parameter(raw.clone()), nn.Parameter(raw.clone())
        self.scale = float(
            raw.norm() / start.filters.detach().norm()
        )  # Adam takes steps of one size: parameters that were smaller would jump
        self.log_bound = start.log_bound

    def forward(self, x: Tensor, sigma: float | None = None) -> Tensor:
        bound = self.log_bound.exp().repeat(4, 1, 1)
        return x - transposed(bound * torch.tanh(convolved(x, self.analysis / self.scale) / bound), self.synthesis / self.scale)


# %%
# Training
# --------
# Noise of standard deviation 0.03 is removed from patches, in the sense of least squares. Both networks start as the same function, and
# end as equally good denoisers. The slope of the ordinary one has left the interval, though: at photographs already it is above one.


def train(network: nn.Module, label: str) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            clean = draw(seen, 8, PATCH, generator)
            denoised = network(clean + SIGMA * torch.randn(clean.shape, generator=generator))
            loss = (denoised - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"{decibels(denoised.detach(), clean).mean():.2f} dB", refresh=False)
    return network.eval().requires_grad_(False)


potential = RidgePotential()
proximal = train(LearnedProximalNetwork(potential, SLOPE), "proximal network")
parametrize.remove_parametrizations(potential, "filters")  # they do not change any more: the norm need not be computed again
ordinary = train(OrdinaryNetwork(), "ordinary network")


class TotalVariation:
    """Its proximal operator to a duality gap of 1e-4, by iterations that start where those of the call before ended."""

    last = None

    def __call__(self, x: Tensor) -> Tensor:
        warm_start = self.last if self.last is not None and self.last.u.shape == x.shape else None
        self.last = solve_tv2d(x, 0.04, tol=1e-4, warm_start=warm_start)
        return self.last.u


denoisers: dict[str, Callable[[Tensor], Tensor]] = {
    "total variation": TotalVariation(),
    "ordinary network": ordinary,
    "proximal network": proximal,
}


def largest_slope(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest singular value of the Jacobian at x, from below, by power iteration."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    pullback = torch.func.vjp(network, x)[1]
    for _ in range(40):
        direction = direction / direction.norm()
        image = torch.func.jvp(network, (x,), (direction,))[1]
        direction = pullback(image)[0]
    return float(image.norm())


judged_at = draw(unseen, 20, PATCH, torch.Generator().manual_seed(9))
noisy = judged_at + SIGMA * torch.randn(judged_at.shape, generator=torch.Generator().manual_seed(10))
print(f"\n{'':18}removes noise, dB  a slope of\n{'noisy':18}{decibels(noisy, judged_at).mean():17.2f}")
for name, network in (("ordinary network", ordinary), ("proximal network", proximal)):
    slope = max(largest_slope(network, x[None]) for x in judged_at[:4])
    print(f"{name:18}{decibels(network(noisy), judged_at).mean():17.2f}  {slope:13.4f}")

# %%
# Two problems
# ------------
# A Gaussian blur, and a random projection on 30 % of the dimensions; noise of standard deviation 0.02 in both. For each, the data fidelity
# knows its proximal operator in closed form: by the Fourier transform, and because the rows are orthonormal.

profile = torch.exp(-torch.linspace(-4, 4, 9).square() / (2 * 1.5**2))
kernel = torch.outer(profile, profile)
rows = torch.linalg.qr(torch.randn(SIZE**2, 3 * SIZE**2 // 10, generator=torch.Generator().manual_seed(2)))[0].mT
problems = {
    "deblurring": Blur(kernel / kernel.sum()),
    "compressed sensing": LinearOperator(
        lambda x: x.flatten(1) @ rows.mT, lambda y: (y @ rows).unflatten(1, (1, SIZE, SIZE)), orthonormal_rows=True
    ),
}


def measure(operator: nn.Module, clean: Tensor, seed: int) -> Tensor:
    y = operator(clean)
    return y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


def reconstruct(operator: nn.Module, denoiser: Callable[[Tensor], Tensor], weight: float, y: Tensor, tol: float):
    layer = PlugAndPlay("admm", denoiser, L2(operator), weight, tol=tol, max_iter=ITERATIONS, on_failure="warn")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some do not converge is a result here, and printed
        return layer.solve(y)


# %%
# Tuning and judging
# ------------------
# Each method has one number to be tuned, the weight :math:`s` of the measurements against the prior: by the same grid, on the same
# photographs that the networks have learned from. A large :math:`s` is as good as another in compressed sensing, as the measurements are
# then met almost exactly: the smallest of those within 0.02 dB of the best is taken. The tolerance is 1e-3 for tuning, and then 3e-4.

tuning = draw(seen, 3, SIZE, torch.Generator().manual_seed(3))
clean = draw(unseen, options.crops * len(unseen), SIZE, torch.Generator().manual_seed(4))
results: dict[tuple[str, str], Tensor] = {}
best: dict[tuple[str, str], float] = {}
print(f"\n{'':20}{'':18}     dB  against TV     better  weight  converged  iterations")
for problem, operator in problems.items():
    y_tuning, y = measure(operator, tuning, 5), measure(operator, clean, 6)
    for name, denoiser in denoisers.items():
        grid = tqdm(WEIGHTS, desc=f"{problem}, {name}", leave=False)
        gains = torch.stack([decibels(reconstruct(operator, denoiser, s, y_tuning, 1e-3).x, tuning).nan_to_num(-99).mean() for s in grid])
        best[problem, name] = WEIGHTS[int((gains > gains.max() - 0.02).nonzero()[0])]
        found = reconstruct(operator, denoiser, best[problem, name], y, 3e-4)
        results[problem, name] = found.x
        quality = decibels(found.x, clean)
        gain = quality - decibels(results[problem, "total variation"], clean)
        solved = (found.status == Status.SOLVED).sum()
        print(
            f"{problem:20}{name:18}{quality.mean():7.2f}  {gain.mean():+10.2f}  {(gain > 0).sum():3} of {len(clean):2}"
            f"  {best[problem, name]:6.0f}  {solved:3} of {len(clean):2}  {found.iterations.float().mean():10.1f}"
        )

# %%
# Does it converge?
# -----------------
# One image, and how far each iteration moves it. A hook on the denoiser sees all of them.
#
# Both networks gain on total variation in deblurring, by 0.2 to 0.3 dB and in most images. In compressed sensing they are about even
# with it, half of the images being better and half of them worse: total variation is the better prior where a picture is flat. What does
# the theory buy? No decibels here; the ordinary network is as good as the other, and its iterations converge, too. But that was to be
# seen, in these problems and for these weights, and nothing follows for the next ones. Of the proximal network it is known before it is
# trained, for any :math:`A` and any :math:`s`, and so is what the iterations minimize.


def movements(problem: str, name: str, y: Tensor, count: int) -> list[float]:
    """‖xₖ₊₁ − xₖ‖ / ‖xₖ₊₁‖ of the iterations."""
    iterates: list[Tensor] = []

    def recorded(x: Tensor) -> Tensor:
        iterates.append(denoisers[name](x))
        return iterates[-1]

    layer = PlugAndPlay("admm", recorded, L2(problems[problem]), best[problem, name], tol=1e-12, max_iter=count, on_failure="warn")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.solve(y)
    return [float((after - before).norm() / after.norm()) for before, after in itertools.pairwise(iterates)]


figure, axes = plt.subplots(2, 5, figsize=(16, 6.4), layout="constrained")
colours = {"total variation": "tab:blue", "ordinary network": "0.5", "proximal network": "tab:red"}
for (problem, operator), line in zip(problems.items(), axes, strict=True):
    y = measure(operator, clean[:1], 6)
    for panel, image, title in [
        (line[0], operator.A_adjoint(y), f"{problem}: Aᵀy"),
        *((panel, results[problem, name][:1], name) for panel, name in zip(line[1:], denoisers, strict=False)),
    ]:
        panel.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
        panel.set(title=f"{title}, {float(decibels(image, clean[:1])):.1f} dB", xticks=[], yticks=[])
    for name in denoisers:
        curve = movements(problem, name, y, ITERATIONS)
        line[4].semilogy(curve, label=name, color=colours[name])
        print(f"{problem}, {name}: the last iteration moves the image by {curve[-1]:.1e}")
    line[4].set(title="movement in each iteration", xlabel="iteration", ylim=(1e-8, 10))
line[4].legend(frameon=False, fontsize=8)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "plug_and_play_imaging.png", dpi=120)
print("figure saved: figures/plug_and_play_imaging.png")
