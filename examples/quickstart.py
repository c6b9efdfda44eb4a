r"""
Denoise photographs with an optimization layer
==============================================

A small network learns to set up an optimization problem, an optimization layer solves it, and both are trained end to end.

Total variation denoises a scan line :math:`y` of a photograph by looking for a line :math:`u` that is close to it and piecewise flat:

.. math:: u(y, w) = \arg\min_u \tfrac12 \|u - y\|^2 + \sum_i w_i \, |u_{i+1} - u_i|.

Usually all weights :math:`w_i` are one number, tuned by hand: large enough to flatten the noise, small enough to spare the edges.
It would be better to have a large weight where the photograph is flat and a small one on its edges. Where these are, a network can
tell from the noisy line. Nobody can say what the right weights are, so they can't be its training target; but the clean line can:
the gradient of the error in :math:`u` flows through the minimization into the weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from skimage import data
from skimage.color import rgb2gray
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers import QPLayer

parser = argparse.ArgumentParser(description="Denoise scan lines of photographs with a network and a QPLayer.")
parser.add_argument("--steps", type=int, default=300, help="training steps of each network")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other lines, other noise, other initial networks")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 20
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The photographs
# ---------------
# Five to learn from, two to be judged on. A batch is a set of random pieces of random rows, 64 pixels long, with noise of standard
# deviation 0.1 on grey values between 0 and 1.

LENGTH, NOISE, BATCH = 64, 0.1, 64


def grey(photograph) -> Tensor:
    return torch.as_tensor(rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0, dtype=torch.float32)


seen = [grey(p) for p in (data.astronaut(), data.chelsea(), data.coins(), data.rocket(), data.stereo_motorcycle()[0])]
unseen = [grey(p) for p in (data.camera(), data.coffee())]


def draw_lines(photographs: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clean lines and noisy lines, each ``(count, LENGTH)``."""
    lines = []
    for which in torch.randint(len(photographs), (count,), generator=generator).tolist():
        rows, columns = photographs[which].shape
        row = torch.randint(rows, (), generator=generator)
        column = torch.randint(columns - LENGTH + 1, (), generator=generator)
        lines.append(photographs[which][row, column : column + LENGTH])
    clean = torch.stack(lines)
    return clean, clean + NOISE * torch.randn(clean.shape, generator=generator)


def decibels(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, averaged over the lines: what everything below is trained, tuned and judged by."""
    return -10 * torch.log10((estimate - clean).square().mean(-1)).mean()


# %%
# The layer
# ---------
# With the matrix :math:`D` of differences, the dual of the weighted total-variation problem is a quadratic program in a box:
#
# .. math:: \min_v \tfrac12 v^T D D^T v - (D y)^T v \quad\text{subject to}\quad -w \le v \le w, \qquad u = y - D^T v.
#
# The matrix is shared by the whole batch; the bounds, which the network chooses, are different for every line. Nothing else is
# needed: :class:`~difflayers.QPLayer` finds the solution, and its backward pass is the implicit function theorem.

D = torch.diff(torch.eye(LENGTH), dim=0)
P = D @ D.T
box_qp = QPLayer()


def total_variation(noisy: Tensor, weights: Tensor) -> Tensor:
    return noisy - box_qp(P, -noisy @ D.T, lb=-weights, ub=weights) @ D


def tune_weight(photographs: list[Tensor], generator: torch.Generator) -> Tensor:
    """The one weight that gives plain total variation the most decibels on the training photographs."""
    clean, noisy = draw_lines(photographs, 256, generator)
    grid = torch.linspace(0.15, 0.45, 13)  # the best one is well inside
    scores = [decibels(total_variation(noisy, weight.expand(LENGTH - 1)), clean) for weight in tqdm(grid, desc="total variation: tuning")]
    return grid[torch.stack(scores).argmax()]


tuned_weight = tune_weight(seen, torch.Generator().manual_seed(0))

# %%
# Two networks
# ------------
# Both are the same five small convolutions. One ends with a value for each of the 63 differences, the logarithm of its weight
# relative to the tuned one: untrained, it is total variation. The other is the usual residual denoiser: it ends with a value for each
# of the 64 pixels, its estimate of the noise.


class Convolutions(nn.Sequential):
    def __init__(self, last_kernel: int, generator: torch.Generator, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for depth in range(4):
            layers += [nn.Conv1d(width if depth else 1, width, 5, dilation=2**depth, padding=2 * 2**depth), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layers[-2].bias)
        last = nn.Conv1d(width, 1, last_kernel, padding=(last_kernel - 1) // 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)

    def forward(self, noisy: Tensor) -> Tensor:
        scaled = (noisy - noisy.mean(-1, keepdim=True)) / NOISE
        return super().forward(scaled.unsqueeze(1)).squeeze(1)


class NetworkAlone(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.network = Convolutions(5, generator)

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - NOISE * self.network(noisy)


class NetworkWithLayer(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.network = Convolutions(4, generator)

    def weights(self, noisy: Tensor) -> Tensor:
        return tuned_weight * self.network(noisy).exp()

    def forward(self, noisy: Tensor) -> Tensor:
        return total_variation(noisy, self.weights(noisy))


def train(model: nn.Module, generator: torch.Generator, label: str) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            clean, noisy = draw_lines(seen, BATCH, generator)
            loss = -decibels(model(noisy), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"{-loss.item():.2f} dB", refresh=False)


# %%
# Training and judging
# --------------------
# Every seed draws its own training lines, noise, initial networks and test lines. Both networks get the same lines in the same order.
# What the layer is worth is knowledge: that lines of photographs are piecewise flat need not be learned. In these few hundred steps
# the network alone can't catch up; try ``--steps 3000``, and it nearly does.

METHODS = ("noisy", "total variation", "network alone", "network + layer")
scores = torch.zeros(options.seeds, len(METHODS))
for seed in range(options.seeds):
    alone = NetworkAlone(torch.Generator().manual_seed(seed))
    layered = NetworkWithLayer(torch.Generator().manual_seed(seed))
    train(alone, torch.Generator().manual_seed(100 + seed), f"seed {seed}, network alone  ")
    train(layered, torch.Generator().manual_seed(100 + seed), f"seed {seed}, network + layer")
    clean, noisy = draw_lines(unseen, 512, torch.Generator().manual_seed(200 + seed))
    with torch.no_grad():
        estimates = (noisy, total_variation(noisy, tuned_weight.expand(LENGTH - 1)), alone(noisy), layered(noisy))
    scores[seed] = torch.stack([decibels(estimate, clean) for estimate in estimates])

sizes = [sum(p.numel() for p in model.parameters()) for model in (alone, layered)]
print(f"\ndB on photographs never seen ({options.steps} steps, {sizes[0]} parameters alone, {sizes[1]} with the layer)")
print(f"{'':16}" + "".join(f"  seed {seed}" for seed in range(options.seeds)) + "    mean  against total variation")
for method, column in zip(METHODS, scores.T, strict=True):
    gain = (column - scores[:, 1]).mean()
    print(f"{method:16}" + "".join(f"{score:8.2f}" for score in column) + f"{column.mean():8.2f}  {gain:+.2f}")

# %%
# One line of an unseen photograph
# --------------------------------
# Below the reconstructions are the weights that the network of the last seed chose. It read from the noisy line where the edges are,
# and lets the layer smooth a lot where the line is flat and little where it is not: the step at pixel 60 keeps its height.

ROW, COLUMN = 232, 200
clean = unseen[0][ROW, COLUMN : COLUMN + LENGTH]
noisy = clean + NOISE * torch.randn(LENGTH, generator=torch.Generator().manual_seed(7))
with torch.no_grad():
    plain = total_variation(noisy[None], tuned_weight.expand(1, LENGTH - 1))[0]
    weights, denoised = layered.weights(noisy[None])[0], layered(noisy[None])[0]

figure, axes = plt.subplot_mosaic([["photo", "line"], ["gains", "weights"]], figsize=(13, 7), layout="constrained", width_ratios=(1, 2))
axes["photo"].imshow(unseen[0], cmap="gray", vmin=0, vmax=1)
axes["photo"].plot([COLUMN, COLUMN + LENGTH], [ROW, ROW], color="tab:red", linewidth=3)
axes["photo"].set(title="a photograph never seen, and a line of it", xticks=[], yticks=[])
axes["line"].plot(noisy, ".", color="0.6", label=f"noisy, {decibels(noisy, clean):.1f} dB")
axes["line"].plot(clean, color="black", linewidth=1, label="clean")
axes["line"].plot(plain, color="tab:blue", label=f"total variation, {decibels(plain, clean):.1f} dB")
axes["line"].plot(denoised, color="tab:red", linewidth=2, label=f"network + layer, {decibels(denoised, clean):.1f} dB")
axes["line"].set(title="the line and its reconstructions", ylabel="grey value", xlim=(-1, LENGTH))
axes["weights"].axhline(tuned_weight, color="tab:blue", label="total variation: one weight for all")
axes["weights"].bar(torch.arange(LENGTH - 1) + 0.5, weights, width=0.8, color="tab:red", label="chosen by the network")
axes["weights"].set(title="the weights of the differences: low at the edges", xlabel="pixel", xlim=(-1, LENGTH), ylabel="weight")
gains = scores[:, 2:] - scores[:, 1:2]
axes["gains"].bar(METHODS[2:], gains.mean(0), color=("0.7", "tab:red"))
axes["gains"].plot(METHODS[2:], gains.T, "o", color="black", markersize=4)
axes["gains"].set(title="gain over total variation (dots: seeds)", ylabel="dB on unseen photographs")
for name in ("line", "weights"):
    axes[name].legend(frameon=False, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "quickstart.png", dpi=150)
print("figure saved: figures/quickstart.png")
