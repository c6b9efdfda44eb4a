r"""
Learn a regularization through its fixed point
==============================================

A blurred photograph :math:`y` is restored by plug-and-play: a step towards the data, a step of a denoiser, until nothing moves,

.. math:: x = D_w\bigl(x - s\,\nabla f(x)\bigr), \qquad f(x) = \tfrac12 \|Ax - y\|^2.

The denoiser takes from every pixel what the differences to its neighbours can't account for,

.. math:: D_w(x) = x - G^T \bigl(w \tanh(Gx / w)\bigr),

with :math:`G` the differences in four directions, scaled to :math:`\|G\| \le 1`. It is the proximal operator of a convex function for any
:math:`w > 0`, so the fixed point exists and the iterations reach it. A large :math:`w` smooths, a small one spares an edge. One number can
be tuned by hand; here a network reads from :math:`y` one for each pixel and direction. What are the right ones? Nobody knows. The clean
photograph is known, and the error flows through the fixed point into the network.

There are two ways for it to flow. Autograd can go back through the iterations (unrolling) and keeps all of them for that.
:class:`~difflayers.PlugAndPlay` differentiates the fixed point and keeps one.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from skimage import data
from skimage.color import rgb2gray
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers.prox import L2, Blur, PlugAndPlay
from difflayers.prox.operators import prox_tv2d

parser = argparse.ArgumentParser(description="Learn a regularization through a fixed point: implicit against unrolled.")
parser.add_argument("--steps", type=int, default=40, help="training steps of each network")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other photographs, other noise, other initial networks")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 2
    print("DIFFLAYERS_SHORT=1: 2 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the images are small: more threads would only wait for each other

# %%
# Blurred photographs
# -------------------
# Pieces of 24 × 24 pixels with grey values between 0 and 1, blurred by a Gaussian of width 1.2 on a periodic grid, with noise of standard
# deviation 0.02.

SIZE, NOISE, BATCH, STEPSIZE = 24, 0.02, 8, 1.0
bell = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * 1.2**2))
blur = Blur(torch.outer(bell, bell) / bell.sum() ** 2)


def grey(photograph) -> Tensor:
    return torch.as_tensor(rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0, dtype=torch.float32)


seen = [grey(p) for p in (data.astronaut(), data.chelsea(), data.coins(), data.rocket(), data.stereo_motorcycle()[0])]
unseen = [grey(p) for p in (data.camera(), data.coffee())]


def draw_pieces(photographs: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clean pieces and blurred ones, each ``(count, 1, SIZE, SIZE)``."""
    pieces = []
    for which in torch.randint(len(photographs), (count,), generator=generator).tolist():
        row, column = (int(torch.randint(size - SIZE, (), generator=generator)) for size in photographs[which].shape)
        pieces.append(photographs[which][row : row + SIZE, column : column + SIZE])
    clean = torch.stack(pieces)[:, None]
    return clean, blur.A(clean) + NOISE * torch.randn(clean.shape, generator=generator)


def decibels(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, averaged over the pieces."""
    return -10 * torch.log10((estimate - clean).square().mean((-3, -2, -1))).mean()


# %%
# The regularization
# ------------------
# The network ends with four values for each pixel, the logarithms of the weights relative to the tuned one: untrained, it is the
# regularization with one weight.

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def differences(x: Tensor) -> Tensor:
    return torch.cat([x.roll((-i, -j), (-2, -1)) - x for i, j in DIRECTIONS], dim=-3) / 4


def transposed(z: Tensor) -> Tensor:
    return sum(part.roll((i, j), (-2, -1)) - part for part, (i, j) in zip(z.split(1, dim=-3), DIRECTIONS, strict=True)) / 4


def restore(y: Tensor, weights: Tensor, **how: Any) -> Tensor:
    def denoise(x: Tensor) -> Tensor:
        return x - transposed(weights * torch.tanh(differences(x) / weights))

    return PlugAndPlay("pgd", denoise, L2(blur), STEPSIZE, **how)(y)


class Mode(NamedTuple):
    """How the fixed point is found and differentiated, and what the figure calls it."""

    label: str
    how: dict[str, Any]


IMPLICIT = Mode("fixed point", {"solver": "anderson", "tol": 1e-4, "linear_solver": "gmres", "on_failure": "warn"})
# A tolerance that nothing fails: that few steps end before the fixed point is no failure here.
UNROLLED = [Mode(f"{k} steps unrolled", {"backward": "unroll", "max_iter": k, "tol": 1e6}) for k in (5, 10, 20, 50)]


class WeightNetwork(nn.Module):
    def __init__(self, tuned: float, width: int = 16) -> None:
        super().__init__()
        self.tuned, layers = tuned, []
        for depth in range(3):
            padding = {"padding": 2**depth, "dilation": 2**depth, "padding_mode": "circular"}
            layers += [nn.Conv2d(width if depth else 1, width, 3, **padding), nn.ReLU()]
        last = nn.Conv2d(width, len(DIRECTIONS), 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)

    def forward(self, y: Tensor) -> Tensor:
        return self.tuned * self.network((y - y.mean((-2, -1), keepdim=True)) / (2 * NOISE)).exp()


# %%
# Two baselines without learning
# ------------------------------
# The same regularization with one weight, and total variation, its proximal operator in place of the denoiser; both tuned on pieces of
# the photographs to learn from.


class TotalVariation:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def prox(self, x: Tensor, gamma: Tensor) -> Tensor:
        return prox_tv2d(x, gamma * self.weight, tol=1e-4)


def total_variation(y: Tensor, weight: float) -> Tensor:
    prior = TotalVariation(weight)
    return PlugAndPlay("pgd", None, L2(blur), STEPSIZE, prior=prior, solver="anderson", tol=2e-3, on_failure="warn")(y)


def one_weight(y: Tensor, weight: float) -> Tensor:
    return restore(y, torch.full((4, SIZE, SIZE), weight), **IMPLICIT.how)


clean, blurred = draw_pieces(seen, 16, torch.Generator().manual_seed(1))
GRIDS = {total_variation: (0.002, 0.004, 0.008), one_weight: (0.001, 0.002, 0.003, 0.0045, 0.007, 0.01)}
tuned = {}
with torch.no_grad():
    for method, grid in GRIDS.items():
        scores = [decibels(method(blurred, weight), clean).item() for weight in tqdm(grid, desc=f"{method.__name__}: tuning")]
        tuned[method] = max(zip(scores, grid, strict=True))[1]

# %%
# Training
# --------
# All networks of a seed start from the same values and meet the same pieces. What the forward pass keeps for the backward pass is
# counted by autograd's own hooks. The time is processor time.


class Trained(NamedTuple):
    network: WeightNetwork
    kept: float
    seconds: float


def megabytes_kept(network: WeightNetwork, y: Tensor, how: dict[str, Any]) -> float:
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        restored = restore(y, network(y).detach().requires_grad_(), **how)
    assert restored.requires_grad
    return sum(storages.values()) / 2**20


def train(mode: Mode, seed: int) -> Trained:
    torch.manual_seed(seed)
    network, generator = WeightNetwork(tuned[one_weight]), torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=options.steps)
    restore(draw_pieces(seen, 1, torch.Generator())[1], torch.ones(4, SIZE, SIZE), **mode.how)
    start = time.process_time()
    for _ in range(options.steps):
        clean, y = draw_pieces(seen, BATCH, generator)
        loss = -decibels(restore(y, network(y), **mode.how), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Trained(network, megabytes_kept(network, y, mode.how), (time.process_time() - start) / options.steps)


MODES = [*UNROLLED, IMPLICIT]
baselines, as_trained, converged, costs = [], [], [], []
with tqdm(total=options.seeds * len(MODES)) as bar:
    for seed in range(options.seeds):
        clean, y = draw_pieces(unseen, 32, torch.Generator().manual_seed(200 + seed))
        with torch.no_grad():
            baselines.append([decibels(x, clean) for x in (y, *(method(y, tuned[method]) for method in GRIDS))])
        runs = []
        for mode in MODES:
            bar.set_description(f"seed {seed}, {mode.label:18}")
            runs.append(train(mode, seed))
            bar.update()
        with torch.no_grad():
            weights = [run.network(y) for run in runs]
            as_trained.append([decibels(restore(y, w, **mode.how), clean) for w, mode in zip(weights, MODES, strict=True)])
            converged.append([decibels(restore(y, w, **IMPLICIT.how), clean) for w in weights])
        costs.append([[run.kept, 1e3 * run.seconds] for run in runs])
baselines, as_trained, converged, costs = (torch.tensor(rows) for rows in (baselines, as_trained, converged, costs))


def cell(values: Tensor) -> str:
    return f"{values.mean():6.2f} ± {values.std(correction=0):.2f}"


print(f"\ndB on photographs never seen, mean of {options.seeds} seeds")
for label, values in zip(("blurred", "total variation", "one weight"), baselines.T, strict=True):
    print(f"{label:20}{cell(values)}")
print(f"{'learned weights':20}{'as trained':>13}{'fixed point':>15}{'MB kept':>10}{'ms a step':>11}")
for i, mode in enumerate(MODES):
    kept, milliseconds = costs[:, i].mean(0)
    print(f"{mode.label:20}{cell(as_trained[:, i])}  {cell(converged[:, i])}{kept:10.2f}{milliseconds:11.1f}")

# %%
# Memory, and what is learned
# ---------------------------
# @@STORY

figure, axes = plt.subplots(1, 5, figsize=(16, 3.6), layout="constrained", width_ratios=(1.5, 1.5, 1, 1, 1))
depths = [mode.how["max_iter"] for mode in UNROLLED]
kept = costs[..., 0].mean(0)
axes[0].plot(depths, kept[:-1], "o-", color="tab:blue", label="unrolled")
axes[0].axhline(kept[-1], color="tab:red", label="fixed point, implicit")
axes[0].set(title="kept for backward, MB", xlabel="steps", ylim=(0, None))
gains = {"unrolled, as trained": as_trained[:, :-1], "unrolled, then run to the end": converged[:, :-1]}
for (label, values), style in zip(gains.items(), ("o-", "s--"), strict=True):
    axes[1].plot(depths, (values - baselines[:, 2:]).mean(0), style, color="tab:blue", label=label)
axes[1].axhline((converged[:, -1] - baselines[:, 2]).mean(), color="tab:red", label="fixed point, implicit")
axes[1].axhline((baselines[:, 1] - baselines[:, 2]).mean(), color="0.4", linestyle=":", label="total variation")
axes[1].set(title="dB over one weight, unseen photographs", xlabel="steps in training")
for panel in axes[:2]:
    panel.legend(frameon=False, fontsize=8)
with torch.no_grad():
    shown = int((y - clean).square().mean((-3, -2, -1)).argsort()[-8])
    restored, smoothing = restore(y, weights[-1], **IMPLICIT.how)[shown, 0], weights[-1][shown].mean(0)
scale = math.log(tuned[one_weight])
axes[2].imshow(y[shown, 0], cmap="gray", vmin=0, vmax=1)
axes[2].set_title(f"blurred, {decibels(y[shown], clean[shown]):.1f} dB")
axes[3].imshow(restored, cmap="gray", vmin=0, vmax=1)
axes[3].set_title(f"restored, {decibels(restored[None], clean[shown]):.1f} dB")
axes[4].imshow(smoothing.log() - scale, cmap="coolwarm", vmin=-2, vmax=2)
axes[4].set_title("weights: blue spares")
for panel in axes[2:]:
    panel.axis("off")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "learned_regularization.png", dpi=150)
print("figure saved: figures/learned_regularization.png")
