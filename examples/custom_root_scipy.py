r"""
Tune six hyperparameters through a SciPy solver
===============================================

You have a solver that you trust, and you want gradients through it. :func:`~difflayers.implicit.custom_root` takes the solver and the
equation that its answer satisfies, and makes it a differentiable function. The solver itself stays what it is: here
:func:`scipy.optimize.minimize`.

The task is to guess a missing pixel of a photograph from the 120 pixels around it, by a robust linear regression learned from only 400
pixels of that photograph. With so few examples everything depends on the penalty:

.. math:: w(\lambda) = \arg\min_w \sum_i h(x_i^T w - y_i) + \tfrac12 \sum_j \lambda_{d(j)} w_j^2,
          \qquad h(e) = \delta^2 \bigl(\sqrt{1 + (e / \delta)^2} - 1\bigr).

One penalty :math:`\lambda` for all neighbours is tuned by a grid search. But near neighbours say more than far ones: a penalty for
each distance :math:`d = 1, \dots, 6` should be better, and a grid of 23 values for each of the six would need 148 million fits. With
the gradient of the validation error with respect to :math:`\lambda`, thirty are enough.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from skimage import data
from skimage.color import rgb2gray
from torch import Tensor
from tqdm.auto import tqdm

from difflayers.implicit import conditions, custom_root

parser = argparse.ArgumentParser(description="Tune the hyperparameters of a robust regression through scipy.optimize.")
parser.add_argument("--steps", type=int, default=30, help="gradient steps on the hyperparameters")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The examples
# ------------
# Rows of ``neighbours`` are the 11 × 11 pixels around a random pixel, without the one in the middle, which is the ``target``. The mean
# of the neighbours is subtracted from both. Each photograph gives 200 training, 200 validation and 5000 test examples.

RADIUS = 5
window = torch.cartesian_prod(torch.arange(-RADIUS, RADIUS + 1), torch.arange(-RADIUS, RADIUS + 1))
window = window[window.any(dim=1)]
distance = window.square().sum(dim=1).sqrt().round().long().clamp(max=6)


def draw_examples(photograph: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    row, column = (torch.randint(RADIUS, side - RADIUS, (count,), generator=generator) for side in photograph.shape)
    neighbours = photograph[row[:, None] + window[:, 0], column[:, None] + window[:, 1]]
    mean = neighbours.mean(dim=1)
    return neighbours - mean[:, None], photograph[row, column] - mean


# %%
# A differentiable SciPy solver
# -----------------------------
# The solver gets plain tensors and returns one; what it does in between is its own business. Its answer is a minimum, so the gradient
# of the objective vanishes there. That condition is all that is needed to differentiate it.


DELTA = 0.05


def objective(coefficients: Tensor, log_penalty: Tensor, neighbours: Tensor, target: Tensor) -> Tensor:
    penalty = log_penalty.exp()[distance - 1]
    error = (neighbours @ coefficients - target) / DELTA
    return DELTA**2 * ((1 + error.square()).sqrt() - 1).sum() + (penalty * coefficients.square()).sum() / 2


@custom_root(conditions.stationarity(objective), symmetric=True)
def fit(start: Tensor, log_penalty: Tensor, neighbours: Tensor, target: Tensor) -> Tensor:
    """Minimize the objective as one would without torch: NumPy arrays, derivatives by hand, a trust-region Newton method."""
    x, y, penalty = neighbours.numpy(), target.numpy(), log_penalty.exp()[distance - 1].numpy()

    def value_and_gradient(w):
        error = (x @ w - y) / DELTA
        root = np.sqrt(1 + error**2)
        return DELTA**2 * (root - 1).sum() + (penalty * w**2).sum() / 2, DELTA * x.T @ (error / root) + penalty * w

    def hessian(w):
        curvature = (1 + ((x @ w - y) / DELTA) ** 2) ** -1.5
        return (x.T * curvature) @ x + np.diag(penalty)

    result = minimize(value_and_gradient, start.numpy(), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-7})
    if not result.success:
        raise RuntimeError(result.message)
    return torch.from_numpy(result.x)


# %%
# Grid search and gradient descent
# --------------------------------
# Both start from nothing, look at the same training and validation examples, and finally fit once more to all of them.


def mean_error(coefficients: Tensor, neighbours: Tensor, target: Tensor) -> Tensor:
    """In grey levels of 255: what every penalty is chosen and judged by."""
    return 255 * (neighbours @ coefficients - target).abs().mean()


zero = torch.zeros(len(window), dtype=torch.float64)
grid = torch.linspace(-7, 4, 23, dtype=torch.float64)


def one_penalty(training: tuple[Tensor, Tensor], judges: tuple[Tensor, Tensor]) -> Tensor:
    """The logarithm of the one penalty on the grid whose fit to ``training`` has the smallest error on ``judges``."""
    errors = [mean_error(fit(zero, value.expand(6), *training), *judges) for value in grid]
    return grid[torch.stack(errors).argmin()].expand(6)


def penalty_by_distance(training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], label: str) -> Tensor:
    """The logarithms of the six penalties, by gradient descent on the error on ``validation``."""
    log_penalty = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_penalty], lr=0.2)
    coefficients = zero
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            coefficients = fit(coefficients.detach(), log_penalty, *training)
            error = mean_error(coefficients, *validation)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            bar.set_postfix_str(f"validation error {error.item():.2f}", refresh=False)
    return log_penalty.detach()


METHODS = ("mean of the neighbours", "one penalty, grid search", "one penalty, hindsight", "penalty by distance, gradient")
photographs = {"camera": data.camera(), "coffee": data.coffee(), "astronaut": data.astronaut()}
scores, learned, maps = {}, {}, {}
for name, photograph in photographs.items():
    grey = torch.from_numpy(rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0)
    generator = torch.Generator().manual_seed(0)
    training, validation, test = (draw_examples(grey, count, generator) for count in (200, 200, 5000))
    both = tuple(torch.cat(pair) for pair in zip(training, validation, strict=True))

    tuned = one_penalty(training, validation)
    learned[name] = penalty_by_distance(training, validation, f"{name:9}")
    maps[name] = [fit(zero, log_penalty, *both) for log_penalty in (tuned, learned[name])]
    hindsight = fit(zero, one_penalty(both, test), *both)
    coefficients = (zero, maps[name][0], hindsight, maps[name][1])
    scores[name] = [mean_error(w, *test).item() for w in coefficients]

print("\nmean error on test pixels, in grey levels of 255")
print(f"{'':32}" + "".join(f"{name:>11}" for name in scores))
for method, row in zip(METHODS, zip(*scores.values(), strict=True), strict=True):
    print(f"{method:32}" + "".join(f"{score:11.2f}" for score in row))
print("(hindsight: the one penalty that is best on the test pixels themselves, which nobody can know beforehand)")

# %%
# What was learned
# ----------------
# The penalty grows with the distance, and the coefficients show why: with one penalty the far neighbours, which say little, fit the
# noise of 400 examples; with a penalty by distance nearly all the weight is on the nearest ones.

figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=(1, 1, 1.3, 1.5))
for axis, coefficients, title in zip(axes, maps["camera"], ("one penalty", "penalty by distance"), strict=False):
    image = torch.full((2 * RADIUS + 1, 2 * RADIUS + 1), torch.nan, dtype=torch.float64)
    image[window[:, 0] + RADIUS, window[:, 1] + RADIUS] = coefficients
    shown = axis.imshow(image, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    axis.plot(RADIUS, RADIUS, "kx", markersize=9)
    axis.set(title=f"camera: weight of each neighbour,\n{title}", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[:2], location="bottom", shrink=0.5, aspect=30)
for name, log_penalty in learned.items():
    axes[2].semilogy(range(1, 7), log_penalty.exp(), "o-", label=name)
axes[2].set(title="learned penalty", xlabel="distance of the neighbour (pixels)")
axes[2].legend(frameon=False)
for index, (method, colour) in enumerate(zip(METHODS[1:], ("0.75", "0.5", "tab:blue"), strict=True)):
    heights = [score[index + 1] for score in scores.values()]
    bars = axes[3].bar([place + 0.28 * (index - 1) for place in range(len(scores))], heights, 0.26, color=colour, label=method)
    axes[3].bar_label(bars, fmt="%.1f", fontsize=8)
axes[3].set(title="error on test pixels (grey levels of 255)", xticks=range(len(scores)), ylim=(0, 7.5))
axes[3].set_xticklabels(scores)
axes[3].legend(frameon=False, fontsize=8)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "custom_root_scipy.png", dpi=150)
print("figure saved: figures/custom_root_scipy.png")
