r"""
Two networks, one valley
========================

Train a network twice, from two seeds, and average the weights: the result is worthless. Not because the two have learned different
things, but because they have *numbered* them differently: rename the hidden units of a layer, and the function of the network stays as
it was, but not its place among the weights. Bring the second network to the numbering of the first, and the line between them may run
through one valley. How high the loss rises along it is the *barrier*

.. math:: \max_{λ} \; L\bigl((1-λ)\,θ_A + λ\,π(θ_B)\bigr) - (1-λ)\,L(θ_A) - λ\,L(θ_B).

The permutations :math:`π` are found in two ways. *Weight matching* (Ainsworth et al. 2023, arXiv:2209.04836) brings the weights as near
to each other as it can, by linear assignment, and needs no data. *Sinkhorn re-basin* (Peña et al. 2023, arXiv:2212.12042) relaxes the
permutations to entropic transport plans, and trains them by gradient through these plans: on what matters, the loss between the networks.

The digits are those that come with scikit-learn: 1,297 to learn from and 500 held out.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from difflayers.rebasin import (
    LossCurve,
    MidpointObjective,
    PermutationSpec,
    SinkhornRebasin,
    loss_curve,
    weight_matching,
)

parser = argparse.ArgumentParser(description="Networks from different seeds, aligned by weight matching and by Sinkhorn re-basin.")
parser.add_argument("--pairs", type=int, default=1, help="pairs of networks of each kind, each from two seeds of its own")
parser.add_argument("--steps", type=int, default=100, help="steps of Sinkhorn re-basin")
parser.add_argument(
    "--channels", type=int, default=16, help="of the first of three convolutions; the others have twice and four times as many"
)
parser.add_argument("--epochs", type=int, default=60, help="epochs of each perceptron; convolutional networks take a sixth of it")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.epochs = 3, 6
    print("DIFFLAYERS_SHORT=1: a few training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# The networks
# ------------
# A perceptron with two hidden layers of 64, and a convolutional network with BatchNorm. Both are trained in the usual way, by AdamW with a
# learning rate that rises to 0.01 and falls again, and a weight decay of 0.1, until they make no mistake on what they learn from.

HELD_OUT, BATCH = 500, 64
digits = load_digits()
shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
pixels = torch.from_numpy(digits.data / 16).float()[shuffled].unflatten(1, (1, 8, 8))
classes = torch.from_numpy(digits.target)[shuffled]
test, training = (pixels[:HELD_OUT], classes[:HELD_OUT]), (pixels[HELD_OUT:], classes[HELD_OUT:])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    c = options.channels
    blocks = [*block(1, c), nn.MaxPool2d(2), *block(c, 2 * c), nn.MaxPool2d(2), *block(2 * c, 4 * c)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, 10))


def batches(size: int, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
    """The training digits in random order, without an incomplete batch."""
    order = torch.randperm(len(training[0]), generator=generator)
    return [tuple(part[chosen] for part in training) for chosen in order.split(size) if len(chosen) == size]


def train(build: Callable[[], nn.Module], epochs: int, seed: int, progress: tqdm) -> nn.Module:
    torch.manual_seed(seed)
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(training[0]) // BATCH))
    for _ in range(epochs):
        for x, y in batches(BATCH):
            optimizer.zero_grad()
            loss(network, x, y).backward()
            optimizer.step()
            schedule.step()
        progress.update()
    return network.eval()


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(network(x), y)


# %%
# The line between two networks
# -----------------------------
# A network on the line has other BatchNorm statistics than the ends; the average of theirs does not fit it. They are measured anew on
# training digits, at each point of every curve ("repaired"), for the naive line as well as for the aligned ones.


POINTS = 11


def line(network: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor], part: tuple[Tensor, Tensor], repair: bool = True) -> LossCurve:
    """The loss on some digits along the line from a to b."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    loader = batches(432, torch.Generator().manual_seed(0)) if norms and repair else None
    return loss_curve(network, a, b, lambda between: loss(between, *part), POINTS, repair=loader)


# %%
# Alignment
# ---------
# ``from_module`` finds the groups of units that may be renamed together, from the network itself. Weight matching takes a moment. Sinkhorn
# re-basin starts from its permutations and makes the loss halfway between the networks small. The hardened permutations are judged by their
# barrier on training digits now and then, and the best are kept, those of the start among them: it never ends higher than it started.


class Aligned(NamedTuple):
    """A pair of networks: what each way of aligning them makes of the line."""

    accuracies: list[float]
    curves: dict[str, tuple[LossCurve, LossCurve]]  # training digits, digits held out


def align(build: Callable[[], nn.Module], epochs: int, pair: int, progress: tqdm) -> Aligned:
    networks = [train(build, epochs, seed, progress) for seed in (2 * pair, 2 * pair + 1)]
    accuracies = [100 * float((network(test[0]).argmax(-1) == test[1]).float().mean()) for network in networks]
    network = copy.deepcopy(networks[1])
    a, b = (each.state_dict() for each in networks)

    spec = PermutationSpec.from_module(network, test[0][:2])
    matched = weight_matching(spec, a, b)
    ends = {"naive": b, "weight matching": spec.apply(b, matched)}
    for name, init in {"Sinkhorn alone": None, "matching, Sinkhorn": matched}.items():
        rebasin = SinkhornRebasin(network, spec=spec, init=init)
        found = rebasin.fit(
            MidpointObjective(network, a, loss),
            batches(BATCH, torch.Generator().manual_seed(pair)),
            evaluate=lambda params: line(network, a, params, training).barrier,
            steps=options.steps,
            every=20,
            callback=lambda step, value: progress.update(),
        )
        assert found.score <= found.start_score
        ends[name] = rebasin.harden()
    curves = {name: (line(network, a, end, training), line(network, a, end, test)) for name, end in ends.items()}
    if any("running_mean" in name for name in b):
        curves["naive, not repaired"] = (line(network, a, b, training, repair=False), line(network, a, b, test, repair=False))
    return Aligned(accuracies, curves)


KINDS = {"perceptron": (perceptron, options.epochs), "convolutional": (convolutional, max(1, options.epochs // 6))}
results: dict[str, list[Aligned]] = {}
with tqdm(total=sum(2 * options.pairs * (epochs + options.steps) for _, epochs in KINDS.values())) as bar:
    for kind, (build, epochs) in KINDS.items():
        bar.set_description(f"{kind:13}")
        results[kind] = [align(build, epochs, pair, bar) for pair in range(options.pairs)]

for kind, pairs in results.items():
    for pair, (accuracies, curves) in enumerate(pairs):
        print(f"\n{kind}, pair {pair}: {accuracies[0]:.1f} % and {accuracies[1]:.1f} % of {HELD_OUT} digits right")
        print(f"{'barrier':20}{'train':>9}{'test':>9}")
        for name, (seen, unseen) in curves.items():
            print(f"{name:20}{seen.barrier:9.3f}{unseen.barrier:9.3f}")

# %%
# What is left of the barrier
# ---------------------------
# Placeholder.

COLOURS = {"naive, not repaired": "0.75", "naive": "0.35", "weight matching": "tab:blue"}
COLOURS |= {"Sinkhorn alone": "tab:orange", "matching, Sinkhorn": "tab:red"}
figure, axes = plt.subplots(1, len(KINDS), figsize=(5.5 * len(KINDS), 4.2), layout="constrained")
for panel, (kind, pairs) in zip(axes, results.items(), strict=True):
    for name, curves in pairs[0].curves.items():
        for curve, style, label in zip(curves, ("--", "-"), (None, name), strict=True):
            panel.plot(curve.lambdas, curve.losses, style, color=COLOURS[name], linewidth=2, label=label)
    panel.set(title=f"{kind} network" if kind == "convolutional" else kind, xlabel="λ", ylabel="cross-entropy (dashed: training digits)")
    panel.set_yscale("log")
    panel.legend(frameon=False, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "align_networks.png", dpi=150)
print("figure saved: figures/align_networks.png")
