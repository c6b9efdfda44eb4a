r"""
Learn new tasks without paying with the old ones
================================================

A network with six hidden units has learned five tasks from handwritten digits: is it a zero? ... a four? Now it shall learn five more, on
the same six units. Each task has a loss, and their gradients are the rows :math:`g_i` of a Jacobian :math:`J`. The usual step follows the
average row; where rows conflict, it lowers some losses at the price of others, and here the old tasks pay.

Jacobian descent (Quinton and Rey 2024, arXiv:2406.16232) takes another average. Its aggregator UPGrad first projects each gradient on
the cone of the directions that no task objects to, :math:`\{d : J d \ge 0\}`, and averages the projections. Then :math:`J d \ge 0` holds
for the result, too: to first order, no step raises any loss. The projection of :math:`g_i` is :math:`J^T v_i` with

.. math:: v_i = \arg\min_v \tfrac12 v^T J J^T v \quad\text{subject to}\quad v \ge e_i.

These are ten quadratic programs with the same matrix and ten different bounds. :func:`~difflayers.convex.solve_qp` takes them as one
batch, and here for several networks at once. (It could be differentiated as well. Nothing here needs that: a fast, exact batch is enough.)
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from tqdm.auto import tqdm

from difflayers.convex import solve_qp

parser = argparse.ArgumentParser(description="Multi-task learning with the UPGrad aggregator as one batch of quadratic programs.")
parser.add_argument("--steps", type=int, default=300, help="steps on all ten tasks; averaging is also given ten times as many")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other training images, other initial values")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# Tasks and networks
# ------------------
# Each of the 1797 images of 8 × 8 pixels has ten labels, one for each task. For every seed there are two copies of the network, one for
# each learning rate, so that no method can win by a rate that suits only itself. All of them are trained together, as one batch of
# networks, by plain gradient descent on 600 images.

OLD, TASKS, HIDDEN = 5, 10, 6
RATES = torch.tensor([1.0, 2.0], dtype=torch.float64)
digits = load_digits()
pixels = torch.from_numpy(digits.data) / 16
labels = one_hot(torch.from_numpy(digits.target)).double()
architecture = torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, TASKS)).double()

orders, networks = [], []
for seed in range(options.seeds):
    torch.manual_seed(seed)
    for module in architecture[::2]:
        module.reset_parameters()
    with torch.no_grad():  # an output of a new task begins with "one digit in ten", whatever the image
        architecture[2].weight[OLD:] = 0.0
        architecture[2].bias[OLD:] = torch.tensor(0.1).logit()
    state = {name: value.detach().clone() for name, value in architecture.named_parameters()}
    networks += [state] * len(RATES)
    orders += [torch.randperm(len(pixels))] * len(RATES)
initial = {name: torch.stack([state[name] for state in networks]) for name in networks[0]}
training, test = torch.stack(orders).split([600, len(pixels) - 600], dim=1)
rates = RATES.repeat(options.seeds)


def losses(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """The ten losses of one network on the images with these numbers."""
    scores = functional_call(architecture, parameters, (pixels[images],))
    return binary_cross_entropy_with_logits(scores, labels[images], reduction="none").mean(0)


# %%
# The aggregators
# ---------------
# Both take the Jacobians ``(networks, tasks, parameters)``. The matrix of the quadratic programs is shared by the tasks of a network and
# differs from network to network: the shapes are ``(networks, 1, 10, 10)`` for the matrix and ``(10, 10)`` for the bounds.


def average(jacobians: Tensor) -> Tensor:
    return jacobians.mean(1)


def upgrad(jacobians: Tensor) -> Tensor:
    gramians = jacobians @ jacobians.mT
    gramians = gramians / gramians.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    identity = torch.eye(TASKS, dtype=gramians.dtype)
    gramians = gramians + 1e-8 * identity  # the weights are unique, even where gradients are dependent
    weights = solve_qp(gramians[:, None], torch.zeros_like(identity), lb=identity).x.mean(1)
    return (weights[:, None] @ jacobians)[:, 0]


# %%
# Training
# --------
# With all gradients at hand it is easy to say what a step does to each task, to first order: ``jacobian @ update``, positive where the
# loss falls. A step counts as a conflict where the loss of some task rises by more than a millionth of the largest change.


def flatten(parameters: dict[str, Tensor], lead: int) -> Tensor:
    return torch.cat([value.flatten(lead) for value in parameters.values()], dim=-1)


def descend(parameters: dict[str, Tensor], update: Tensor, rates: Tensor) -> dict[str, Tensor]:
    parts = (rates[:, None] * update).split([value[0].numel() for value in parameters.values()], dim=-1)
    return {name: value - part.view_as(value) for (name, value), part in zip(parameters.items(), parts, strict=True)}


def average_descent(parameters: dict[str, Tensor], tasks: int, steps: int, rates: Tensor, label: str) -> dict[str, Tensor]:
    """Follow the gradient of the mean of the first ``tasks`` losses. No Jacobian is needed for that."""
    gradient = vmap(grad(lambda parameters, images: losses(parameters, images)[:tasks].mean()))
    for _ in tqdm(range(steps), desc=label):
        parameters = descend(parameters, flatten(gradient(parameters, training), lead=1), rates)
    return parameters


def jacobian_descent(parameters: dict[str, Tensor], aggregator: Callable[[Tensor], Tensor], label: str):
    """The networks, their losses and the first-order changes of these, ``(steps, networks, tasks)``, and the aggregator's seconds."""
    history, changes, seconds = [], [], 0.0
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            jacobians = flatten(vmap(jacrev(losses))(parameters, training), lead=2)
            began = time.perf_counter()
            update = aggregator(jacobians)
            seconds += time.perf_counter() - began
            changes.append((jacobians @ update[..., None])[..., 0])
            parameters = descend(parameters, update, rates)
            history.append(vmap(losses)(parameters, training))
            bar.set_postfix_str(f"mean loss {history[-1].mean():.4f}", refresh=False)
    return parameters, torch.stack(history), torch.stack(changes), seconds


released = average_descent(initial, OLD, 300 if options.steps > 5 else 5, torch.full_like(rates, 4.0), "the old tasks      ")
before = vmap(losses)(released, training)
trained, curves, first_order, seconds = {}, {}, {}, {}
for name, aggregator in (("average", average), ("UPGrad", upgrad)):
    trained[name], curves[name], first_order[name], seconds[name] = jacobian_descent(released, aggregator, f"{name:19}")
trained["average, 5 × steps"] = average_descent(released, TASKS, 5 * options.steps, rates, "average, 5 × steps")

# %%
# Results
# -------
# The rise of an old task is its loss divided by what it was before the new tasks came.


def by_rate(values: Tensor) -> Tensor:
    """The mean over seeds, by rate."""
    return values.unflatten(0, (options.seeds, len(RATES))).mean(0)


conflict = {name: (changes.min(-1).values < -1e-6 * changes.abs().max(-1).values).double().mean(0) for name, changes in first_order.items()}
table = {}
print(f"\nmean of {options.seeds} seeds, {options.steps} steps on all tasks; training images; test: mean of the ten losses")
print(f"{'':20}{'rate':>5}{'new tasks':>11}{'old tasks':>11}{'worst old task':>16}{'at its peak':>13}{'test':>9}{'conflicts':>11}")
print(f"{'before':20}{'':5}{before[:, OLD:].mean():11.4f}{before[:, :OLD].mean():11.4f}{'× 1.00':>16}{'× 1.00':>13}")
for name, parameters in trained.items():
    now, unseen = vmap(losses)(parameters, training), vmap(losses)(parameters, test)
    rise = now[:, :OLD] / before[:, :OLD]
    columns = [now[:, OLD:].mean(-1), now[:, :OLD].mean(-1), rise.max(-1).values, unseen.mean(-1)]
    table[name] = torch.stack([by_rate(column) for column in columns])
    for index, rate in enumerate(RATES.tolist()):
        new, old, worst, tested = table[name][:, index].tolist()
        peak = share = ""
        if name in curves:
            peak = f"× {by_rate((curves[name][..., :OLD] / before[:, :OLD]).amax((0, 2)))[index]:.2f}"
            share = f"{100 * by_rate(conflict[name])[index]:.1f} %"
        print(f"{name:20}{rate:5.1f}{new:11.4f}{old:11.4f}{f'× {worst:.2f}':>16}{peak:>13}{tested:9.4f}{share:>11}")
lowest = (first_order["UPGrad"].min(-1).values / first_order["UPGrad"].abs().max(-1).values).min()
print(f"the smallest entry of J d in all UPGrad steps, relative to the largest of its step: {lowest:.1e}")
count, milliseconds = len(rates) * TASKS, 1e3 * seconds["UPGrad"] / options.steps
print(f"{count * options.steps} quadratic programs, {count} in each step: {milliseconds:.1f} ms a step")

# %%
# Who pays
# --------
# Averaging learns the new tasks at the price of the old ones: their losses end above the line. With UPGrad no task's loss ever rises to
# first order, and with these rates it hardly does at all: the old tasks even get better. If all that counts is the mean of the ten
# losses, averaging for longer is cheaper and better; UPGrad is for tasks that are not allowed to pay.

figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(1.15, 1, 1))
colours = {"average": "tab:orange", "UPGrad": "tab:blue"}
for name, colour in colours.items():
    ratio = torch.cat([before[None], curves[name]])[..., :OLD] / before[:, :OLD]
    new = torch.cat([before[None], curves[name]])[..., OLD:].mean(-1)
    for network in range(len(RATES) - 1, len(rates), len(RATES)):
        label = f"{name}, {options.steps} steps" if network < len(RATES) else None
        axes[0].plot(new[:, network], ratio[:, network].amax(-1), color=colour, label=label)
        axes[0].plot(new[-1, network], ratio[-1, network].max(), "o", color=colour)
later = vmap(losses)(trained["average, 5 × steps"], training)[len(RATES) - 1 :: len(RATES)]
worst = (later[:, :OLD] / before[len(RATES) - 1 :: len(RATES), :OLD]).amax(-1)
axes[0].plot(later[:, OLD:].mean(-1), worst, "x", color="tab:orange", label=f"average, {5 * options.steps} steps")
axes[0].axhline(1, color="0.5", linewidth=1)
axes[0].set(xlabel="mean loss of the new tasks (training goes to the left)", ylabel="worst old task: its loss / before", yscale="log")
axes[0].set(title=f"old against new tasks, rate {RATES[-1]:g}, {options.seeds} seeds")
axes[0].set_yticks([0.7, 1, 1.5, 2, 3, 4, 6], labels=["0.7", "1", "1.5", "2", "3", "4", "6"], minor=False)
axes[0].minorticks_off()
axes[0].invert_xaxis()
axes[0].legend(frameon=False)
for axis, (name, changes) in zip(axes[1:], first_order.items(), strict=True):
    seen = changes[:, len(RATES) - 1]
    shown = axis.imshow((seen / seen.abs().amax(-1, keepdim=True)).T, cmap="RdBu", vmin=-0.3, vmax=0.3, aspect="auto", interpolation="none")
    axis.axhline(OLD - 0.5, color="black", linewidth=1)
    axis.set(title=f"{name}: first-order change of each loss", xlabel="step", ylabel="new tasks        old tasks")
    axis.set_yticks(range(TASKS))
bar = figure.colorbar(shown, ax=axes[1:], ticks=(-0.3, 0, 0.3), aspect=30)
bar.ax.set_yticklabels(["rises", "0", "falls"])

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "jacobian_descent.png", dpi=150)
print("figure saved: figures/jacobian_descent.png")
