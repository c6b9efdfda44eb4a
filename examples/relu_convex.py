r"""
Train a ReLU network to its global optimum, and tune its weight decay
=====================================================================

A network with one hidden layer, :math:`f(x) = \sum_j a_j (w_j^T x)_+`, trained with the objective
:math:`\tfrac12 \|f(X) - y\|^2 + \tfrac{\beta}{2} \sum_j (\|w_j\|^2 + a_j^2)`, is a convex program in disguise (Pilanci and Ergen, Neural
networks are convex regularizers, ICML 2020, arXiv:2002.10553). A hidden unit is active on some examples and not on others. Let
:math:`D_i` be the diagonal matrix of one such pattern of ones and zeros, together with the sign :math:`s_i = \pm 1` of the unit's output:

.. math:: \min_u \tfrac12 \Bigl\| \sum_i s_i D_i X u_i - y \Bigr\|^2 + \beta \sum_i \|u_i\|
          \quad\text{subject to}\quad (2 D_i - I) X u_i \ge 0

with all patterns and both signs has the same optimal value as the training of a wide enough network. So there is no initial value,
no learning rate and no luck, and it can be *proved* that no network of any width is better. The optimum is a function of the weight decay
:math:`\beta`, and :class:`~difflayers.CvxpyLayer` differentiates it: the weight decay is tuned by the gradient of a validation error.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import cvxpy as cp
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from difflayers import CvxpyLayer
from difflayers.errors import NotConvergedError

parser = argparse.ArgumentParser(description="A ReLU network as a convex program, with a CvxpyLayer.")
parser.add_argument("--steps", type=int, default=2000, help="training steps of the ordinary networks")
parser.add_argument("--tuning", type=int, default=9, help="gradient steps on the weight decay")
parser.add_argument("--size", type=int, default=100, help="training examples")
parser.add_argument("--seed", type=int, default=0, help="other digits to learn from, other initial networks")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, options.tuning = 50, 2
    print("DIFFLAYERS_SHORT=1: few training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The data
# --------
# Is a handwritten digit five or more? Only the first two principal components of its pixels are seen, and a column of ones, the bias.
# Small and large digits lie side by side in this plane, so a straight line does not separate them. 100 digits to learn from, 200 to choose
# the weight decay, 1497 for the test.

digits = load_digits()
generator = torch.Generator().manual_seed(options.seed)
pixels = torch.from_numpy(digits.data)
target = 2 * torch.from_numpy(digits.target >= 5).double() - 1
training, validation, test = torch.randperm(len(pixels), generator=generator).split([options.size, 200, len(pixels) - options.size - 200])
pixels = pixels - pixels[training].mean(0)
components = pixels @ torch.linalg.svd(pixels[training], full_matrices=False)[2][:2].T
components = components / components[training].std(0)
inputs = torch.cat([components, torch.ones_like(components[:, :1])], dim=1)
X, y = inputs[training], target[training]
n = len(X)

# %%
# All patterns
# ------------
# Example :math:`i` switches on or off where :math:`x_i^T u = 0`. These planes through the origin cut the sphere of all :math:`u` into
# cells, one for each pattern; two cells meet in an arc on a plane, and arcs meet in a corner, where two planes do. All are found from
# the corners: around each, the two examples are on or off in four ways. In general position there are :math:`n(n-1)` corners,
# :math:`2n(n-1)` arcs and :math:`n(n-1) + 2` cells, the most that there can be; Euler's formula, cells - arcs + corners = 2, checks that
# none is missing.


def all_patterns() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners ``(., 3)``, the patterns of cells and of arcs ``(., n)``, and the example on whose plane each arc is."""
    i, j = torch.triu_indices(n, n, 1)
    corners = torch.linalg.cross(X[i], X[j])
    corners = torch.cat([corners, -corners])
    corners, i, j = corners / corners.norm(dim=1, keepdim=True), i.repeat(2), j.repeat(2)
    around = {}
    for first in (0, 1):
        for second in (0, 1):
            pattern = (corners @ X.T > 0).short()
            pattern[torch.arange(len(i)), i], pattern[torch.arange(len(i)), j] = first, second
            around[first, second] = pattern
    cells = torch.cat(list(around.values())).unique(dim=0)
    on_first = [torch.cat([i.short()[:, None], around[0, second]], dim=1) for second in (0, 1)]
    on_second = [torch.cat([j.short()[:, None], around[first, 0]], dim=1) for first in (0, 1)]
    arcs = torch.cat(on_first + on_second).unique(dim=0)
    return corners, cells.double(), arcs[:, 1:].double(), arcs[:, 0].long()


corners, cells, arcs, planes = all_patterns()
euler = len(cells) - len(arcs) + len(corners)
print(f"{len(cells)} patterns of at most {n * (n - 1) + 2}; {len(cells)} - {len(arcs)} + {len(corners)} = {euler}")

# %%
# A proof that the optimum is global
# ----------------------------------
# Let :math:`r` be the residual of a network, and :math:`m` the largest :math:`|r^T (X u)_+|` of all :math:`u` on the sphere. If
# :math:`m \le \beta`, no hidden unit could be added with profit: the network is the best of all. If not, :math:`r` times
# :math:`\min(1, \beta / m)` is still feasible in the dual program, and :math:`y^T r - \tfrac12 \|r\|^2` of it is a lower bound for every
# network. The function is linear in each cell, so its largest value on the sphere is at the gradient of a cell, at such a gradient
# projected on the plane of an arc, or at a corner. These are finitely many places, and all are looked at.

normals = X[planes] / X[planes].norm(dim=1, keepdim=True)


def candidate_units(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(., 3)``, the best hidden unit of all among them, and how much each would gain ``(.,)``."""
    inside, along = (cells * residual) @ X, (arcs * residual) @ X
    along = along - (along * normals).sum(1, keepdim=True) * normals
    units = torch.cat([inside, -inside, along, -along])
    units = torch.cat([units / units.norm(dim=1, keepdim=True).clamp_min(1e-300), corners])
    return units, (units @ X.T).relu() @ residual


def lower_bound(residual: Tensor, beta: Tensor, largest: Tensor) -> Tensor:
    """The value of the dual program at the residual, scaled to be feasible."""
    feasible = (beta / largest).clamp(max=1) * residual
    return y @ feasible - feasible @ feasible / 2


# %%
# The layer
# ---------
# The optimum uses only a few of the patterns. So begin with some, solve, ask which units could be added with profit, add the patterns of
# some of these that differ, and repeat until the lower bound meets the value. The bound is about all patterns, not about those that were
# tried. At the end the program has just the units that the optimum uses, and the layer differentiates that: it is the derivative of the
# whole program, too, except at the values of :math:`\beta` at which a unit comes or goes.


class Kind(NamedTuple):
    """Kinds of hidden units: where each is active, ``(count, n)``, and the signs of their outputs, ``(count,)``."""

    patterns: Tensor
    signs: Tensor


def make_layer(kinds: Kind) -> CvxpyLayer:
    """The program for these kinds of units, as a function of the targets and of the weight decay."""
    active, matrix = kinds.patterns.numpy().T, X.numpy()
    u, goal, beta = cp.Variable((3, len(kinds.signs))), cp.Parameter(n), cp.Parameter(nonneg=True)
    outputs = cp.multiply(active, matrix @ u) @ kinds.signs.numpy()
    objective = cp.sum_squares(outputs - goal) / 2 + beta * cp.sum(cp.norm(u, 2, axis=0))
    problem = cp.Problem(cp.Minimize(objective), [cp.multiply(2 * active - 1, matrix @ u) >= 0])
    return CvxpyLayer(problem, parameters=[goal, beta], variables=[u])


def network(u: Tensor, kinds: Kind, x: Tensor) -> Tensor:
    return (x @ u).relu() @ kinds.signs


def objective_value(u: Tensor, kinds: Kind, beta: Tensor) -> Tensor:
    return (network(u, kinds, X) - y).square().sum() / 2 + beta * u.norm(dim=0).sum()


def used_kinds(u: Tensor, kinds: Kind, tol: float) -> Kind:
    """Without the units that vanish; equal ones (a unit on an arc has the pattern of either side) are added up."""
    directions = u / u.norm(dim=0).clamp_min(1e-300)
    equal = (directions.T @ directions > 1 - tol / 100) & (kinds.signs[:, None] == kinds.signs)
    kept = (u.norm(dim=0) > tol) & ~equal.triu(1).any(0)
    return Kind((X @ u @ equal.double() >= 0).double().T[kept], kinds.signs[kept])


def useful_kinds(units: Tensor, gain: Tensor, count: int) -> Kind:
    """The kind of the most useful unit; then of the most useful that is not close to it, and so on."""
    patterns, signs = [], []
    while len(gain) and len(signs) < count:
        best = gain.abs().argmax()
        patterns.append((X @ units[best] >= 0).double())
        signs.append(gain[best].sign())
        far = units @ units[best] < 0.995
        units, gain = units[far], gain[far]
    return Kind(torch.stack(patterns), torch.stack(signs))


class Certified(NamedTuple):
    """The layer for the kinds of units that the optimum uses, its value, the lower bound for all networks, the history of both."""

    layer: CvxpyLayer
    kinds: Kind
    value: float
    bound: float
    history: list[tuple[int, float, float]]


@torch.no_grad()
def global_optimum(beta: Tensor, kinds: Kind, tol: float = 1e-8, rounds: int = 50) -> Certified:
    """Begin with these kinds of units, and add others until the optimum is certainly global."""
    history, added, tiny = [], 32, 1e-6
    for _ in range(rounds):
        layer = make_layer(kinds)
        try:
            (u,), converged, tiny = layer(y, beta), True, 1e-6
        except NotConvergedError as error:  # too many units that are nearly equal; the lower bound judges what was reached
            (u,), converged, tiny, added = error.solution.values, False, max(1e-4, 2 * tiny), max(1, added // 2)
        value, residual = objective_value(u, kinds, beta).item(), y - network(u, kinds, X)
        units, gain = candidate_units(residual)
        bound = lower_bound(residual, beta, gain.abs().max()).item()
        history.append((len(kinds.signs), value, bound))
        solved, kinds = kinds, used_kinds(u, kinds, tiny)
        if value - bound < tol * value:
            if converged and len(kinds.signs) == len(solved.signs):
                return Certified(layer, solved, value, bound, history)
            continue
        profitable = gain.abs() > beta
        merged = map(torch.cat, zip(kinds, useful_kinds(units[profitable], gain[profitable], added), strict=True))
        rows = torch.column_stack(tuple(merged)).unique(dim=0)
        kinds = Kind(rows[:, :-1], rows[:, -1])
    raise RuntimeError(f"after {rounds} rounds the value {value} is not yet the lower bound {bound}")


START = torch.tensor(0.5, dtype=torch.float64)
some = (X @ torch.randn(3, 10, generator=generator, dtype=torch.float64) >= 0).T.double().unique(dim=0)
began = time.perf_counter()
first = global_optimum(START, Kind(some, torch.ones_like(some[:, 0])))
print(f"\nweight decay {START:g}\n{'kinds of units':>14}{'value':>14}{'lower bound':>14}{'difference':>13}")
for count, value, bound in first.history:
    print(f"{count:14}{value:14.7f}{bound:14.7f}{value - bound:13.1e}")
print(f"found and proved in {time.perf_counter() - began:.1f} s")

# %%
# The same as a network, with its gradients
# -----------------------------------------
# A unit :math:`u` of the program is a hidden unit with weights :math:`w = u / \sqrt{\|u\|}` and :math:`a = s \sqrt{\|u\|}`: the objective
# of ordinary training has to be the same number. The derivative of the optimal value in :math:`\beta` has to be the penalty
# :math:`\sum_i \|u_i\|`, by the envelope theorem. The derivative of the validation error has no closed form; it is compared with finite
# differences, for which the whole search is repeated at two other :math:`\beta`.


def mean_square(u: Tensor, kinds: Kind, examples: Tensor) -> Tensor:
    return (network(u, kinds, inputs[examples]) - target[examples]).square().mean()


def accuracy(outputs: Tensor, examples: Tensor) -> float:
    return 100 * (outputs * target[examples] > 0).double().mean().item()


beta = START.clone().requires_grad_()
(u,) = first.layer(y, beta)
(slope,) = torch.autograd.grad(objective_value(u, first.kinds, beta), beta, retain_graph=True)
(validation_slope,) = torch.autograd.grad(mean_square(u, first.kinds, validation), beta)
with torch.no_grad():
    u = u.detach()
    W, a = u / u.norm(dim=0).sqrt(), first.kinds.signs * u.norm(dim=0).sqrt()
    ordinary = ((X @ W).relu() @ a - y).square().sum() / 2 + START / 2 * (W.square().sum() + a.square().sum())
    shifted = []
    for factor in (1.001, 0.999):
        moved = global_optimum(factor * START, first.kinds)
        shifted.append(mean_square(moved.layer(y, factor * START)[0], moved.kinds, validation).item())
print(f"\nobjective of the network    {ordinary.item():.9f}   of the program        {first.value:.9f}")
print(f"d optimal value / d beta    {slope.item():.9f}   penalty               {u.norm(dim=0).sum().item():.9f}")
difference = (shifted[0] - shifted[1]) / (0.002 * START.item())
print(f"d validation error / d beta {validation_slope.item():.9f}   finite differences    {difference:.9f}")

# %%
# Ordinary training
# -----------------
# Networks with as many hidden units as the optimum, and with 100: the same objective, Adam with a cosine schedule, ten of each. Wide
# ones come close to the optimum, though nothing tells how close; narrow ones may stop far from it.

RUNS = 10


def train_networks(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The objectives ``(steps, RUNS)`` and the weights ``(RUNS, 3, width)``, ``(RUNS, width, 1)``."""
    curves = torch.zeros(options.steps, RUNS, dtype=torch.float64)
    U = (torch.randn(RUNS, 3, width, generator=generator, dtype=torch.float64) / 2).requires_grad_()
    A = (torch.randn(RUNS, width, 1, generator=generator, dtype=torch.float64) / width**0.5).requires_grad_()
    optimizer = torch.optim.Adam([U, A], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in tqdm(range(options.steps), desc=f"{RUNS} networks, {width} units"):
        error = ((X @ U).relu() @ A)[..., 0] - y
        objective = error.square().sum(1) / 2 + START / 2 * (U.square().sum((1, 2)) + A.square().sum((1, 2)))
        optimizer.zero_grad()
        objective.sum().backward()
        optimizer.step()
        schedule.step()
        curves[step] = objective.detach()
    return curves, U.detach(), A.detach()


curves, lines = {}, []
for width in (len(first.kinds.signs), 100):
    began = time.perf_counter()
    curves[width], U, A = train_networks(width)
    reached = curves[width][-1]
    spent = time.perf_counter() - began
    lines.append(f"{RUNS} networks{width:10}{reached.min():12.5f}{reached.mean():12.5f}{reached.max():12.5f}{spent:10.1f}")
print(f"\n{'objective':11}{'units':>10}{'best':>12}{'mean':>12}{'worst':>12}{'seconds':>10}")
print(f"convex program{len(first.kinds.signs):7}{first.value:12.5f}")
print("\n".join(lines))

# %%
# Tuning the weight decay
# -----------------------
# By nine gradient steps on its logarithm, through the layer, and by a grid of nine values. At every value the optimum is proved to be
# global; each search begins with the units of the value before.


class Trial(NamedTuple):
    beta: float
    validation: float
    test: float
    accuracy: float
    units: int
    gap: float


def trial(beta: Tensor, kinds: Kind) -> tuple[Tensor, Certified, Trial]:
    """The validation error, differentiable in beta, and what else is to be known of the optimum."""
    found = global_optimum(beta.detach(), kinds)
    (u,) = found.layer(y, beta)
    error = mean_square(u, found.kinds, validation)
    with torch.no_grad():
        right = accuracy(network(u, found.kinds, inputs[test]), test)
        tested = mean_square(u, found.kinds, test).item()
    row = Trial(beta.item(), error.item(), tested, right, len(found.kinds.signs), (found.value - found.bound) / found.value)
    return error, found, row


path, found, seconds = [], first, {}
log_beta = START.log().requires_grad_()
optimizer = torch.optim.Adam([log_beta], lr=0.5)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.tuning)
began = time.perf_counter()
with tqdm(range(options.tuning), desc="weight decay, gradient") as bar:
    for _ in bar:
        error, found, row = trial(log_beta.exp(), found.kinds)
        path.append(row)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"beta {row.beta:.2f}, validation error {row.validation:.4f}", refresh=False)
seconds["gradient"], began = time.perf_counter() - began, time.perf_counter()
scan, slopes, found = [], [], first
for value in tqdm(torch.logspace(-0.5, 1, 9, dtype=torch.float64), desc="weight decay, grid"):
    value.requires_grad_()
    error, found, row = trial(value, found.kinds)
    scan.append(row)
    slopes.append(torch.autograd.grad(error, value)[0].item())
seconds["grid"] = time.perf_counter() - began
tuned, best = min(path, key=lambda row: row.validation), min(scan, key=lambda row: row.validation)

rows = {}
weights = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
errors = [(inputs[part] @ weights - target[part]).square().mean().item() for part in (validation, test)]
rows["least squares"] = f"{'':8}{errors[0]:12.4f}{errors[1]:9.4f}{accuracy(inputs[test] @ weights, test):10.1f}"
logistic = LogisticRegression().fit(X[:, :2], y)
rows["logistic regression"] = f"{'':29}{100 * logistic.score(inputs[test][:, :2], target[test]):10.1f}"
with torch.no_grad():
    outputs = [((inputs[part] @ U).relu() @ A)[..., 0] for part in (validation, test)]
errors = [(out - target[part]).square().mean().item() for out, part in zip(outputs, (validation, test), strict=True)]
rows[f"{RUNS} networks, mean"] = f"{START:8.3f}{errors[0]:12.4f}{errors[1]:9.4f}{accuracy(outputs[1], test):10.1f}{U.shape[-1]:7}"
for name, row, count, spent in (
    ("global optimum", path[0], 1, ""),
    ("global optimum, grid", best, len(scan), f"{seconds['grid']:9.1f}"),
    ("global optimum, gradient", tuned, len(path), f"{seconds['gradient']:9.1f}"),
):
    rows[name] = f"{row.beta:8.3f}{row.validation:12.4f}{row.test:9.4f}{row.accuracy:10.1f}{row.units:7}{count:7}{spent}"
print(f"\n{'':26}{'':8}{'mean squared error of':>21}{'test':>10}")
print(f"{'':26}{'beta':>8}{'validation':>12}{'test':>9}{'% right':>10}{'units':>7}{'betas':>7}{'seconds':>9}")
for name, row in rows.items():
    print(f"{name:26}{row}")
print(f"largest gap to the lower bound, of all betas: {max(row.gap for row in path + scan):.1e} of the value")

# %%
# What the optimum looks like
# ---------------------------

figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
at = torch.tensor(tuned.beta, dtype=torch.float64)
found = global_optimum(at, found.kinds)
(u,), kinds = found.layer(y, at), found.kinds
side = torch.linspace(-2.6, 2.6, 200, dtype=torch.float64)
plane = torch.stack([*torch.meshgrid(side, side, indexing="xy"), torch.ones(200, 200, dtype=torch.float64)], dim=-1)
drawn = axes[0].contourf(side, side, network(u, kinds, plane).clamp(-1.2, 1.2), levels=24, cmap="RdBu_r", vmin=-1.5, vmax=1.5)
for unit in u.T:
    kink = -(unit[0] * side + unit[2]) / unit[1]
    axes[0].plot(side, kink, color="black", linewidth=0.8, linestyle=":")
for label, colour, name in ((-1, "tab:blue", "0 to 4"), (1, "tab:red", "5 to 9")):
    points = X[y == label]
    axes[0].plot(points[:, 0], points[:, 1], "o", color=colour, markeredgecolor="white", markersize=6, label=name)
axes[0].set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xlabel="first component", ylabel="second component")
axes[0].set_title(f"the best network of all for β = {tuned.beta:.2f}: {tuned.units} hidden units\n(dotted: where they switch on)")
axes[0].legend(loc="lower left", framealpha=0.9)
figure.colorbar(drawn, ax=axes[0], label="output", ticks=[-1, 0, 1])
for (width, objectives), colour in zip(curves.items(), ("tab:orange", "0.6"), strict=True):
    axes[1].semilogy(objectives - first.bound, color=colour, linewidth=0.8)
    axes[1].plot([], [], color=colour, label=f"{RUNS} networks with {width} units, Adam")
axes[1].axhline(max(first.value - first.bound, 1e-13), color="tab:blue", label="convex program: rounding errors")
axes[1].set(title=f"objective above the proved lower bound, β = {START:g}", xlabel="training step")
axes[1].legend(frameon=False)
for name, colour in {"validation": "tab:blue", "test": "0.6"}.items():
    axes[2].semilogx([row.beta for row in scan], [getattr(row, name) for row in scan], ".-", color=colour, label=f"{name}, grid")
for row, slope in zip(scan, slopes, strict=True):
    ends = [row.beta * 0.85, row.beta / 0.85]
    axes[2].plot(ends, [row.validation + slope * (end - row.beta) for end in ends], color="black", linewidth=2)
axes[2].plot([], [], color="black", linewidth=2, label="derivative by the layer")
axes[2].semilogx([row.beta for row in path], [row.validation for row in path], "o-", color="tab:red", markersize=4, label="gradient steps")
axes[2].set(title="error of the globally optimal network", xlabel="weight decay β", ylabel="mean squared error")
axes[2].legend(frameon=False)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "relu_convex.png", dpi=150)
print("figure saved: figures/relu_convex.png")
