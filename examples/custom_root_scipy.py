r"""
Tune seven hyperparameters through a SciPy solver
=================================================

You have a solver that you trust, and you want gradients through it. :func:`~difflayers.implicit.custom_root` takes the solver and the
equation that its answer satisfies, and makes it a differentiable function. The solver itself stays what it is: here
:func:`scipy.optimize.minimize`.

The task is to guess a missing pixel of a photograph from the 120 pixels around it, by a robust linear regression learned from only 200
pixels of that photograph. With so few examples everything depends on the penalty:

.. math:: w(\lambda) = \arg\min_w \sum_i h(x_i^T w - y_i) + \tfrac12 \sum_j \lambda_{d(j)} w_j^2,
          \qquad h(e) = \delta^2 \bigl(\sqrt{1 + (e / \delta)^2} - 1\bigr).

One penalty :math:`\lambda` for all neighbours is tuned by a grid search. But near neighbours say more than far ones: a penalty for
each distance :math:`d = 1, \dots, 7` should be better, and a grid of 15 values for each of the seven would need 170 million fits. With
the gradient of the validation error with respect to :math:`\lambda`, sixty are enough.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from scipy.optimize import minimize
from skimage import data
from skimage.color import rgb2gray
from torch import Tensor
from torch.func import grad, hessian
from tqdm.auto import tqdm

from difflayers.implicit import conditions, custom_root

parser = argparse.ArgumentParser(description="Tune the hyperparameters of a robust regression through scipy.optimize.")
parser.add_argument("--steps", type=int, default=60, help="gradient steps on the hyperparameters")
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
distance = window.square().sum(dim=1).sqrt().round().long()  # 1, ..., 7


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


def robust_error(coefficients: Tensor, neighbours: Tensor, target: Tensor, delta: float = 0.05) -> Tensor:
    error = (neighbours @ coefficients - target) / delta
    return delta**2 * ((1 + error.square()).sqrt() - 1).sum()


def objective(coefficients: Tensor, log_penalty: Tensor, neighbours: Tensor, target: Tensor) -> Tensor:
    penalty = log_penalty.exp()[distance - 1]
    return robust_error(coefficients, neighbours, target) + (penalty * coefficients.square()).sum() / 2


@custom_root(conditions.stationarity(objective), symmetric=True)
def fit(start: Tensor, *args: Tensor) -> Tensor:
    def scipy_calls(function):
        return lambda coefficients: function(torch.from_numpy(coefficients), *args).numpy()

    derivatives = {"jac": scipy_calls(grad(objective)), "hess": scipy_calls(hessian(objective))}
    result = minimize(scipy_calls(objective), start.numpy(), method="trust-exact", options={"gtol": 1e-8}, **derivatives)
    return torch.from_numpy(result.x)


# %%
# Grid search and gradient descent
# --------------------------------
# Both start from nothing, look at the same training and validation examples, and finally fit once more to all of them.

zero = torch.zeros(len(window), dtype=torch.float64)
grid = torch.linspace(-7, 4, 23, dtype=torch.float64)


def one_penalty(training: tuple[Tensor, Tensor], judges: tuple[Tensor, Tensor]) -> Tensor:
    """The logarithm of the one penalty on the grid whose fit to ``training`` has the smallest error on ``judges``."""
    errors = [robust_error(fit(zero, value.expand(7), *training), *judges) for value in grid]
    return grid[torch.stack(errors).argmin()].expand(7)


def penalty_by_distance(training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], label: str) -> Tensor:
    """The logarithms of the seven penalties, by gradient descent on the error on ``validation``."""
    log_penalty = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_penalty], lr=0.2)
    coefficients = zero
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            coefficients = fit(coefficients.detach(), log_penalty, *training)
            error = robust_error(coefficients, *validation)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            bar.set_postfix_str(f"validation error {error.item():.4f}", refresh=False)
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
    scores[name] = [255 * (test[0] @ w - test[1]).abs().mean().item() for w in coefficients]

print("\nmean error on test pixels, in grey levels of 255")
print(f"{'':32}" + "".join(f"{name:>11}" for name in scores))
for method, row in zip(METHODS, zip(*scores.values(), strict=True), strict=True):
    print(f"{method:32}" + "".join(f"{score:11.2f}" for score in row))
print("(hindsight: the one penalty that is best on the test pixels themselves, which nobody can know beforehand)")
