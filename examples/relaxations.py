r"""
Relaxed sorting, in pictures
============================

A sorting network is built of conditional swaps: two values come in, the smaller one leaves on the left and the larger one on the right.
:class:`~difflayers.SortingNetwork` relaxes the swap. This script draws what comes out of a relaxed swap, how wrong it is, which way its
gradient points, and what becomes of a whole network. :doc:`The tutorial </tutorials/sorting>` tells what to make of it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from difflayers import SortingNetwork
from difflayers.sorting import soft_rank

torch.set_num_threads(1)
STEPS = 400
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    STEPS = 20
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")

COLOURS = {
    "logistic": "tab:orange",
    "logistic_phi": "tab:red",
    "gaussian": "tab:brown",
    "reciprocal": "tab:green",
    "cauchy": "tab:blue",
    "optimal": "tab:purple",
}
MONOTONE = ("reciprocal", "cauchy", "optimal")
here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)


def style(distribution: str) -> dict:
    return {"color": COLOURS[distribution], "linestyle": "-" if distribution in MONOTONE else "--", "label": distribution}


def swap(x: Tensor, distribution: str, steepness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A network for two values, given 0 and x: the smaller, the larger, and the weight of 0 in the smaller, each of the shape of x."""
    values, permutation = SortingNetwork(2, distribution=distribution, steepness=steepness).sort(torch.stack([torch.zeros_like(x), x], -1))
    return values[..., 0], values[..., 1], permutation[..., 0, 0]


# %%
# Six distributions
# -----------------
# The weight of a in the smaller output is :math:`f(s(b - a))`, where f is a distribution function and s the steepness. On the right is
# what becomes of the smaller of 0 and x. Solid lines are the monotone ones: more input never gives less output. The dashed ones turn down
# again for positive x. The larger of 0 and x is x minus the smaller one: with the logistic distribution that is the activation
# SiLU, with the Gaussian one it is GELU, which turn down in the same way.

x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for distribution in COLOURS:
    smaller, _, weight = swap(x, distribution)
    axes[0].plot(x, weight, **style(distribution))
    axes[1].plot(x, smaller, **style(distribution))
axes[1].plot(x, x.clamp(max=0), color="black", linewidth=0.8, label="min(0, x)")
axes[0].set(title="f: the weight of 0 in the smaller of 0 and x", xlabel="x")
axes[1].set(title="the smaller of 0 and x, relaxed", xlabel="x", xlim=(-3, 6), ylim=(-3, 1))
axes[1].legend(frameon=False, fontsize=9, loc="lower right")
figure.savefig(here / "figures" / "relaxations_swap.png", dpi=150)

# %%
# Error and slope
# ---------------
# The difference from min(0, x), and the derivative in x. In units of 1/s the error is at most 1/16 for the optimal distribution, which got
# its name from this, 1/π for Cauchy's and 1 for the reciprocal one: from the left to the right, the longer the arm, the larger
# the error. An error that vanishes far out looks good on the left, and is paid for on the right. To vanish, it has to fall again; there the
# derivative is negative, and gradient descent moves x the wrong way.

figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
far = torch.logspace(-2, 4, 2001, dtype=torch.float64)
for distribution in COLOURS:
    point = x.clone().requires_grad_()
    smaller, _, _ = swap(point, distribution)
    (slope,) = torch.autograd.grad(smaller.sum(), point)
    axes[0].plot(x, (smaller.detach() - x.clamp(max=0)).abs(), **style(distribution))
    axes[1].plot(x, slope, **style(distribution))
    error = (swap(far, distribution)[0] - far.clamp(max=0)).abs().max()
    print(f"{distribution:13} largest error {float(error):.4f} / s, least slope {float(slope.min()):+.4f}")
axes[1].axhspan(-0.2, 0, color="tab:red", alpha=0.1)
axes[1].text(-5.8, -0.12, "the wrong way", color="tab:red", fontsize=9)
axes[0].set(title="how far from min(0, x)", xlabel="x")
axes[1].set(title="derivative of the smaller of 0 and x", xlabel="x", ylim=(-0.2, 1.2))
axes[1].legend(frameon=False, fontsize=9)
figure.savefig(here / "figures" / "relaxations_slope.png", dpi=150)

# %%
# Learning the wrong way
# ----------------------
# The larger of 0 and x should be 1. We start at x = -3 and let gradient descent find it. From there the logistic and the
# Gaussian swaps send x to the left, away from the only solution, for ever: that is what the wrong sign means. The reciprocal swap has the
# longest arm and turns round first. Cauchy's arm is shorter, and it takes longer. The optimal swap is monotone as well, but its
# slope is zero that far from 0, and nothing moves: monotone means that no gradient is wrong, not that there is one.
#
# The right picture counts wrong signs in a bitonic network for 8 values: entries of :math:`\partial\,\mathrm{values} / \partial x` that are
# below -0.001, for standard normal inputs. The three monotone ones have none, at any steepness.

figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for distribution in tqdm(COLOURS, desc="learning"):
    point = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    path = []
    optimizer = torch.optim.SGD([point], lr=0.5)
    for _ in range(STEPS):
        path.append(point.item())
        loss = (swap(point, distribution)[1] - 1).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{distribution:13} from -3.0 to {path[-1]:.2f} in {STEPS} steps")
    axes[0].plot(path, **style(distribution))
axes[0].set(title="gradient descent on (larger of 0 and x − 1)², s = 1", xlabel="step", ylabel="x", xscale="log")
axes[0].legend(frameon=False, fontsize=9, loc="upper left")

inputs = torch.randn(128, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
steepnesses = torch.logspace(-1, 2, 13).tolist()
for distribution in COLOURS:
    shares = []
    for steepness in steepnesses:
        network = SortingNetwork(8, distribution=distribution, steepness=steepness)
        jacobians = torch.func.vmap(torch.func.jacrev(network))(inputs)
        shares.append(100 * float((jacobians < -1e-3).double().mean()))
    axes[1].semilogx(steepnesses, shares, **style(distribution))
axes[1].set(title="wrong signs in a network for 8 values", xlabel="steepness", ylabel="% of the Jacobian's entries")
figure.savefig(here / "figures" / "relaxations_wrong_way.png", dpi=150)

# %%
# A network as it gets steeper
# ----------------------------
# The relaxed permutation of eight numbers: entry (i, j) is the weight of input i in output j. Rows and columns sum to one, whatever the
# steepness; the black squares of the exact permutation come out as s grows.

numbers = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
steepnesses = (0.3, 3.0, 30.0, 300.0)
figure, axes = plt.subplots(3, 4, figsize=(9, 7), layout="constrained")
for row, distribution in zip(axes, ("logistic", "cauchy", "optimal"), strict=True):
    for axis, steepness in zip(row, steepnesses, strict=True):
        permutation = SortingNetwork(8, distribution=distribution, steepness=steepness).sort(numbers).permutation
        axis.imshow(permutation, cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=f"s = {steepness:g}" if row is axes[0] else "")
    row[0].set_ylabel(distribution)
figure.savefig(here / "figures" / "relaxations_permutation.png", dpi=150)

# %%
# Ranks
# -----
# One of five numbers moves from the left to the right past the others, at 1, 2, 3 and 4: its rank climbs from 1 to 5. The network smooths
# every comparison by itself. The projection on the permutahedron pools what is closer than its strength and is exact elsewhere: its
# ranks have flat pieces, where the derivative is zero, and straight ones.

moving = torch.linspace(0, 5, 501, dtype=torch.float64)
five = torch.cat([moving[:, None], torch.arange(1.0, 5.0, dtype=torch.float64).expand(501, 4)], -1)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
for value, colour in ((30.0, "tab:blue"), (5.0, "tab:green"), (1.0, "tab:orange")):
    axes[0].plot(moving, SortingNetwork(5, steepness=value).rank(five)[:, 0], color=colour, label=f"steepness {value:g}")
for axis, regularization in zip(axes[1:], ("l2", "kl"), strict=True):
    for value, colour in ((0.1, "tab:blue"), (0.5, "tab:green"), (2.0, "tab:orange")):
        ranks = soft_rank(five, regularization=regularization, regularization_strength=value)[:, 0]
        axis.plot(moving, ranks, color=colour, label=f"strength {value:g}")
for axis, title in zip(axes, ("SortingNetwork.rank, cauchy", 'soft_rank, "l2"', 'soft_rank, "kl"'), strict=True):
    axis.step(moving, 1 + (moving[:, None] > five[:, 1:]).sum(-1), color="black", linewidth=0.7)
    axis.set(title=title, xlabel="the number that moves")
    axis.legend(frameon=False, fontsize=9)
axes[0].set_ylabel("its rank")
figure.savefig(here / "figures" / "relaxations_ranks.png", dpi=150)
print(f"bounds: optimal {1 / 16:.4f}, cauchy {1 / math.pi:.4f}, reciprocal 1")
print("figures saved: figures/relaxations_*.png")
