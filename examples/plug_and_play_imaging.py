r"""
Deblur photographs and fill in measurements with a learned prior
================================================================

One denoiser, trained once, solves inverse problems that it has never seen: an image :math:`x` is found from measurements
:math:`y = A x + \text{noise}` as a fixed point of the alternating directions method (ADMM)

.. math:: u = \operatorname{prox}_{s f}(x - z), \qquad x = D(u + z), \qquad z \leftarrow z + u - x, \qquad f(x) = \tfrac12 \|A x - y\|^2,

with the denoiser :math:`D` where the proximal operator of a prior would stand. Does this have a fixed point, and is it reached? For any
network, nobody knows. A :class:`~difflayers.LearnedProximalNetwork` *is* a proximal operator: of a prior that it learned. If its
slope is nowhere above one, that prior is convex, and the iterations go to the minimizer of :math:`s f` plus this prior.

Below, one such network and an ordinary one with the same filters are trained on patches of photographs. Both, and total variation, then
deblur other photographs and reconstruct them from three random numbers for each ten pixels.
"""

from __future__ import annotations

import argparse
import itertools
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
from tqdm.auto import tqdm

from difflayers import Status
from difflayers.prox import (
    L2,
    Blur,
    ConvolutionalInputConvexNN,
    LearnedProximalNetwork,
    LinearOperator,
    PlugAndPlay,
    ProximalMatchingSchedule,
)
from difflayers.prox.operators import solve_tv2d

parser = argparse.ArgumentParser(description="Plug-and-play reconstruction of photographs with a learned proximal network.")
parser.add_argument("--steps", type=int, default=600, help="training steps of each network")
parser.add_argument("--filters", type=int, default=48, help="filters of each network")
parser.add_argument("--crops", type=int, default=3, help="pieces of each unseen photograph to judge by")
options, _ = parser.parse_known_args()
ITERATIONS, WEIGHTS = 80, (4.0, 8.0, 16.0, 32.0)
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.crops, ITERATIONS, WEIGHTS = 20, 1, 8, (4.0, 16.0)
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)
torch.set_flush_denormal(True)  # the tails of the activations would be computed with denormal numbers, which are slow

# %%
# The photographs
# ---------------
# Half size, grey values between 0 and 1. Five to learn from and to tune on, two to be judged on.

PATCH, SIZE, SIGMA = 32, 64, 0.05


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
# Both have one layer of 7 × 7 filters. In the gradient of a convex network the second convolution is the transpose of the first; in the
# ordinary network it is free, and so has twice as many parameters.


def proximal_network() -> LearnedProximalNetwork:
    torch.manual_seed(0)
    return LearnedProximalNetwork(
        ConvolutionalInputConvexNN(1, options.filters, strides=(1,), kernel_size=7, beta=30.0, padding_mode="circular")
    )


class OrdinaryNetwork(nn.Module):
    """The noise by two convolutions; what remains is the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.analysis = nn.Conv2d(1, options.filters, 7, padding=3, padding_mode="circular")
        self.synthesis = nn.Conv2d(options.filters, 1, 7, padding=3, padding_mode="circular")
        nn.init.zeros_(self.synthesis.weight)

    def forward(self, x: Tensor, sigma: float | None = None) -> Tensor:
        return x - self.synthesis(nn.functional.softplus(self.analysis(x - 0.5), beta=30.0))


# %%
# Training
# --------
# Noise of standard deviation 0.05 is removed from patches, by proximal matching: its γ is large at first, when the loss is about a squared
# error, and small at the end, when it no longer asks for the mean of all images that fit the noisy one, but for the most probable of them.
# (The published schedule begins with the 1-norm.) Nothing in this keeps the slope of the network below one
# where there are no photographs. The prior is then not bounded from below, and ADMM, which does get to such places, runs away from them. So
# while training the proximal network, its largest slope is estimated by a power iteration, at noisy photographs, at noise much larger than
# they are, and far out in the direction of the largest slope itself; the loss grows where it is above one.


def largest_slope(network: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the power iteration on the Jacobian at each x: the estimates, and the next directions."""
    direction = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    image = torch.func.jvp(network, (x,), (direction,))[1]
    return image.flatten(1).norm(dim=1), image.detach()


def train(network: nn.Module, label: str, *, bound_slope: bool) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    part = max(options.steps // 8, 1)
    stages = [(options.steps - 2 * part, 4 * SIGMA * PATCH, 1.0), (part, 2 * SIGMA * PATCH, 1.0), (part, SIGMA * PATCH, 1.0)]
    matching = ProximalMatchingSchedule.from_stages(stages)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03 if bound_slope else 0.01, total_steps=options.steps, pct_start=0.1)
    direction = torch.randn(3, 1, PATCH, PATCH, generator=generator)
    with tqdm(range(options.steps), desc=label) as bar:
        for step in bar:
            clean = draw(seen, 10, PATCH, generator)
            noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)
            denoised = network(noisy)
            loss = matching.loss(step)(denoised, clean)
            if bound_slope:
                far = torch.stack([noisy[0], torch.randn(noisy[1].shape, generator=generator), 0.5 + 3 * direction[2] / direction[2].std()])
                slope, direction = largest_slope(network, far, direction)
                loss = loss * (1 + 100 * torch.relu(slope - 1).square().mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.set_postfix_str(f"{decibels(denoised.detach(), clean).mean():.2f} dB", refresh=False)
    return network.eval().requires_grad_(False)


class TotalVariation:
    """Its proximal operator, found by iterations that start where those of the call before ended."""

    last = None

    def __call__(self, x: Tensor) -> Tensor:
        warm_start = self.last if self.last is not None and self.last.u.shape == x.shape else None
        self.last = solve_tv2d(x, 0.04, tol=1e-4, warm_start=warm_start)
        return self.last.u


proximal = train(proximal_network(), "proximal network", bound_slope=True)
ordinary = train(OrdinaryNetwork(), "ordinary network", bound_slope=False)
denoisers: dict[str, Callable[[Tensor], Tensor]] = {
    "total variation": TotalVariation(),
    "ordinary network": ordinary,
    "proximal network": proximal,
}

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


def reconstruct(operator: nn.Module, denoiser: Callable[[Tensor], Tensor], weight: float, y: Tensor):
    layer = PlugAndPlay("admm", denoiser, L2(operator), weight, tol=1e-4, max_iter=ITERATIONS, on_failure="warn")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some do not converge is a result here, and printed
        return layer.solve(y)


# %%
# Tuning and judging
# ------------------
# Each method has one number to be tuned, the weight :math:`s` of the measurements against the prior: by the same grid, on the same
# photographs that the networks have learned from.

tuning = draw(seen, len(seen), SIZE, torch.Generator().manual_seed(3))
clean = draw(unseen, options.crops * len(unseen), SIZE, torch.Generator().manual_seed(4))
results: dict[tuple[str, str], Tensor] = {}
best: dict[tuple[str, str], float] = {}
print(f"\n{'':20}{'':18}     dB  against TV  weight  converged  iterations")
for problem, operator in problems.items():
    y_tuning, y = measure(operator, tuning, 5), measure(operator, clean, 6)
    for name, denoiser in denoisers.items():
        grid = tqdm(WEIGHTS, desc=f"{problem}, {name}", leave=False)
        gains = torch.stack([decibels(reconstruct(operator, denoiser, s, y_tuning).x, tuning).nan_to_num(-99).mean() for s in grid])
        best[problem, name] = WEIGHTS[int(gains.argmax())]
        found = reconstruct(operator, denoiser, best[problem, name], y)
        results[problem, name] = found.x
        quality = decibels(found.x, clean).mean()
        gain = quality - decibels(results[problem, "total variation"], clean).mean()
        solved = (found.status == Status.SOLVED).sum()
        print(
            f"{problem:20}{name:18}{quality:7.2f}  {gain:+10.2f}  {best[problem, name]:6.0f}"
            f"  {solved:3} of {len(clean):2}  {found.iterations.float().mean():10.1f}"
        )

# %%
# Does it converge?
# -----------------
# One image, many more iterations, and how far each moves the image. A hook on the denoiser sees all of them.


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
        curve = movements(problem, name, y, 3 * ITERATIONS if name != "total variation" else ITERATIONS)
        line[4].semilogy(curve, label=name, color=colours[name])
        print(f"{problem}, {name}: the last iteration moves the image by {curve[-1]:.1e}")
    line[4].set(title="movement in each iteration", xlabel="iteration", ylim=(1e-8, 10))
line[4].legend(frameon=False, fontsize=8)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "plug_and_play_imaging.png", dpi=120)
print("figure saved: figures/plug_and_play_imaging.png")
