r"""
Where a derivative is a choice, in pictures
===========================================

The solution of a quadratic program depends on its data in smooth pieces. This script walks over the places between the pieces and draws
what :func:`~difflayers.convex.solve_qp` returns there: a constraint that is just touched, a row that comes twice, a linear program, whose
solution does not move at all. The last picture shows what the option ``smoothing`` is for: learning the costs of a linear program.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from difflayers.convex import solve_qp

torch.set_num_threads(1)
DOUBLE = {"dtype": torch.float64}
STEPS = 100
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    STEPS = 10
    print("DIFFLAYERS_SHORT=1: 10 training steps, to see that everything runs; the numbers mean nothing")

# %%
# A constraint that is just touched
# ---------------------------------
# The nearest point to :math:`\theta` that is at most 1. At :math:`\theta = 1` the constraint holds with equality and does not push: it is
# weakly active. The derivative jumps from 1 to 0, and at the kink itself the layer takes the piece in which the constraint is inactive.
# With a barrier of weight :math:`\mu` the kink becomes round, and so does the derivative.

theta = torch.linspace(0.5, 1.5, 201, **DOUBLE).requires_grad_()


def nearest(theta: Tensor, smoothing: float | None = None) -> Tensor:
    return solve_qp(torch.eye(1, **DOUBLE), -theta[:, None], ub=torch.ones(1, **DOUBLE), smoothing=smoothing).x[:, 0]


figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
for smoothing, colour in ((None, "black"), (1e-3, "tab:blue"), (1e-2, "tab:red")):
    x = nearest(theta, smoothing)
    (slope,) = torch.autograd.grad(x.sum(), theta)
    label = "exact" if smoothing is None else f"smoothing={smoothing:g}"
    axes[0, 0].plot(theta.detach(), x.detach(), color=colour, label=label)
    axes[1, 0].plot(theta.detach(), slope, color=colour, label=label)
    if smoothing is None:
        kink = int((theta - 1).abs().argmin())
        axes[1, 0].plot([1.0], [slope[kink]], "o", color="black")
        print(f"derivative at the kink {float(slope[kink]):.1f}: that of the piece where the constraint is inactive")
axes[0, 0].set(title="a constraint that is just touched", ylabel="x")
axes[1, 0].set(xlabel="θ", ylabel="dx/dθ")
axes[0, 0].legend(frameon=False, fontsize=9)

# %%
# A row that comes twice
# ----------------------
# The same program with the row :math:`x \le 1` given once, twice and three times. Any split of the multiplier between equal rows is
# optimal; the layer's is the even one, of least norm, and so is its derivative. What cannot be a matter of choice is not: the sum of
# the multipliers, and how x follows when all the copies move together.

for copies in (1, 2, 3):
    h = torch.ones(copies, **DOUBLE, requires_grad=True)
    found = solve_qp(torch.eye(1, **DOUBLE), torch.tensor([-3.0], **DOUBLE), torch.ones(copies, 1, **DOUBLE), h)
    (slope,) = torch.autograd.grad(found.x.sum(), h)
    place = torch.arange(copies) + 4 * (copies - 1)
    axes[0, 1].bar(place, found.z.detach(), color="tab:blue")
    axes[1, 1].bar(place, slope, color="tab:orange")
    print(f"row given {copies} times: sum of multipliers {float(found.z.sum().detach()):.6f}, sum of dx/dh {float(slope.sum()):.6f}")
for axis, title in ((axes[0, 1], "multipliers of a row that comes 1, 2, 3 times"), (axes[1, 1], "dx/dh of each copy")):
    axis.set(title=title, xticks=[0, 4.5, 9], xticklabels=["once", "twice", "three times"])

# %%
# A linear program
# ----------------
# The assignment problem: 8 workers, 8 jobs, a cost for each pair, the cheapest assignment as a linear program over doubly
# stochastic matrices. We look for costs under which a given assignment is the cheapest. The solution is a vertex, which small changes of
# the costs do not move: the exact gradient is zero, and nothing is learned. A point of the central path moves with every cost. We train on
# it, and judge by the exact solution.

SIZE = 8
eye, line = torch.eye(SIZE, **DOUBLE), torch.ones(1, SIZE, **DOUBLE)
limits = {
    "A": torch.cat([torch.kron(eye, line), torch.kron(line, eye)]),
    "b": torch.ones(2 * SIZE, **DOUBLE),
    "lb": torch.zeros(SIZE**2, **DOUBLE),
}


def assign(cost: Tensor, smoothing: float | None = None) -> Tensor:
    return solve_qp(None, cost.flatten(), **limits, smoothing=smoothing).x.view(SIZE, SIZE)


generator = torch.Generator().manual_seed(0)
wanted = eye[torch.randperm(SIZE, generator=generator)]
start = torch.rand(SIZE, SIZE, generator=generator, **DOUBLE)


def learn(smoothing: float | None) -> tuple[Tensor, list[float]]:
    cost, errors = start.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([cost], lr=0.01)
    for _ in tqdm(range(STEPS), desc="exact gradient" if smoothing is None else f"smoothing={smoothing:g}"):
        plan = assign(cost, smoothing)
        loss = (plan - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            errors.append(float((assign(cost) - wanted).abs().sum() / 2))
    return cost.detach(), errors


for smoothing, colour in ((None, "black"), (1e-3, "tab:blue"), (1e-2, "tab:red"), (1e-1, "tab:green")):
    _, errors = learn(smoothing)
    label = "exact gradient" if smoothing is None else f"smoothing={smoothing:g}"
    axes[0, 2].plot(errors, color=colour, label=label)
    print(f"{label}: workers in the wrong job before {float((assign(start) - wanted).abs().sum() / 2):.1f}, after {errors[-1]:.1f}")
axes[0, 2].set(title="learning the costs of an assignment", xlabel="step", ylabel="workers in the wrong job (exact solution)")
axes[0, 2].legend(frameon=False, fontsize=9)

# %%
# The weight of the barrier
# -------------------------
# It is in the units of the objective: with n active pairs the objective of the smoothed point is above the best one by at most
# :math:`n\mu`. A small weight keeps the point near the vertex and the gradient near zero, a large one blurs the problem. The picture shows
# the length of the gradient for the costs that we started from.

weights = torch.logspace(-5, 0, 21)
lengths, gaps = [], []
for weight in weights.tolist():
    cost = start.clone().requires_grad_()
    plan = assign(cost, weight)
    (slope,) = torch.autograd.grad((plan - wanted).square().sum(), cost)
    lengths.append(float(slope.norm()))
    gaps.append(float((plan * start).sum().detach() - (assign(start) * start).sum()))
axes[1, 2].loglog(weights, lengths, color="tab:blue", label="length of the gradient")
axes[1, 2].loglog(weights, gaps, color="tab:orange", label="cost above the least")
axes[1, 2].set(title="the weight of the barrier", xlabel="smoothing")
axes[1, 2].legend(frameon=False, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "degenerate_derivatives.png", dpi=150)
print("figure saved: figures/degenerate_derivatives.png")
