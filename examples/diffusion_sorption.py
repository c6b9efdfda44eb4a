r"""
Diffusion and sorption: a penalty, a constraint, experts
========================================================

A substance diffuses into a porous medium that takes most of it up,

.. math:: \partial_t u = \frac{D}{R(u)}\, \partial_x^2 u, \qquad u(t, 0) = 1, \quad u(t, 1) = -D\, \partial_x u(t, 1), \quad u(0, x) = u_0 .

A network is to give :math:`u` on the whole mesh for any :math:`u_0`, and no solution is there to learn from: only the equation. There are
two ways to teach an equation. Put its residual into the loss, and the network has to find the solution by itself. Or let the network
propose functions :math:`b_1, \dots, b_{16}`, and combine them by a solve inside the network:
:class:`~difflayers.HardConstraint` returns the combination with the smallest residual, for each :math:`u_0`, in training and after.

A mixture of experts cuts the mesh and lets each piece have a combination of its own (Chalapathi, Du and Krishnapriyan, ICLR 2024,
arXiv:2402.13412, whose first problem this is). Is that cheaper, and more accurate? All methods here have the same network, loss, steps and
total number of collocation points.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers.pde import HardConstraint, MixtureOfConstraints, dirichlet, edge_derivative, initial, pde, robin
from difflayers.pde.problems import DiffusionSorption

parser = argparse.ArgumentParser(description="Diffusion and sorption learned without data: penalty, constraint, experts.")
parser.add_argument("--full", action="store_true", help="the study: a finer mesh, 1024 collocation points, more steps, more methods")
parser.add_argument("--steps", type=int, help="training steps of each method (40, with --full 60)")
parser.add_argument("--seeds", type=int, default=1, help="repetitions: other initial networks, other conditions to train on")
options, _ = parser.parse_known_args()
options.steps = options.steps or (60 if options.full else 40)
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 2
    print("DIFFLAYERS_SHORT=1: 2 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the systems have 16 unknowns: more threads would only wait for each other

# %%
# The problem
# -----------
# R is infinite at u = 0, and the medium is nearly empty at its far end. Rounded off below u = 0.01 it is a milder function, and no solution
# changes by more than 0.2 %. Rounded off below the published 1e-6, solves with an untrained network take 20 to 50 iterations in place of 6,
# and some don't converge in 50.

times, points = (41, 96) if options.full else (26, 48)
problem = DiffusionSorption(times=times, points=points, regularization=1e-2)
dt, dx = problem.spacing


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Initial conditions ``(count, points)``: a constant in [0, 0.2], and 1 at the end that the substance comes from."""
    u0 = problem.initial(count, generator=generator, dtype=torch.float64)
    u0[:, 0] = 1
    return u0


unseen = draw(16, torch.Generator().manual_seed(99))
reference = problem.solve(unseen)

# %%
# The rows
# --------
# The equation is asked for inside, at t > 0. At t = 0 the initial condition holds in its place: there u jumps at x = 0, and on this mesh
# the residual of the true solution is more than ten times what it is anywhere else. The rows of the equation are changes in 150 seconds.
# Those of the initial condition are not relative: u0 may be nearly zero, and such rows would outweigh everything. Each kind of row counts
# as the mean of its squares.

EQUATION, START, LIMIT = 150.0, 5.0, 1024 if options.full else None
INSIDE = (slice(1, None), slice(1, -1))
INTERIOR = (times - 1) * (points - 2)


def constraint(experts: int = 1) -> HardConstraint:
    return HardConstraint(
        None,
        features=problem.features,
        rows=[
            pde(problem.residual, region=INSIDE, weight=EQUATION / math.sqrt(INTERIOR / experts)),
            initial(lambda u0: u0, weight=START / math.sqrt(points)),
            dirichlet(1.0, dim=1, weight=1 / math.sqrt(times)),
            robin(0.0, dx, dim=1, side="upper", b=problem.diffusivity, weight=1 / math.sqrt(times)),
        ],
        grid_ndim=2,
        points=LIMIT,
        ridge=1e-4,
        x0=1.0,
        tol=1e-6,
    )


def mean_squares(u: Tensor, u0: Tensor) -> tuple[Tensor, Tensor]:
    """Of the residuals of the equation and of the conditions, on the whole mesh: their sum is the loss of every method."""
    equation = EQUATION * problem.mesh_residual(u)[:, *INSIDE]
    outflow = u[..., -1] + problem.diffusivity * edge_derivative(u, dx, dim=-1, side="upper")
    conditions = START**2 * (u[:, 0] - u0).square().mean(-1) + (u[..., 0] - 1).square().mean(-1) + outflow.square().mean(-1)
    return equation.square().mean((-2, -1)), conditions


# %%
# The network
# -----------
# A small Fourier neural operator. Its coordinate in time is √t: what comes in from the side is a function of x/√t at first.


class FourierLayer(nn.Module):
    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes, self.local = modes, nn.Conv2d(width, width, 1)
        self.weights = nn.Parameter(torch.randn(2, width, width, modes, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        m, spectrum = self.modes, torch.fft.rfft2(x)
        mixed = torch.zeros_like(spectrum)
        for rows, weights in zip((slice(m), slice(-m, None)), torch.view_as_complex(self.weights), strict=True):
            mixed[..., rows, :m] = torch.einsum("bitx,iotx->botx", spectrum[..., rows, :m], weights)
        return nn.functional.gelu(torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.local(x))


class FourierNeuralOperator(nn.Module):
    """From initial conditions ``(batch, points)`` to functions on the mesh ``(batch, times, points, functions)``."""

    def __init__(self, functions: int, width: int = 16, layers: int = 2, modes: int = 8, padding: int = 8) -> None:
        super().__init__()
        self.lift, self.padding = nn.Conv2d(3, width, 1), padding
        self.layers = nn.ModuleList(FourierLayer(width, modes) for _ in range(layers))
        self.head = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, functions, 1))

    def forward(self, u0: Tensor) -> Tensor:
        coordinates = torch.meshgrid(torch.linspace(0, 1, times).sqrt(), torch.linspace(0, 1, points), indexing="ij")
        start = u0[:, None, -1:].float().expand(-1, times, points)
        inputs = torch.stack([start, *(c.expand_as(start) for c in coordinates)], 1)
        h = nn.functional.pad(self.lift(inputs), (0, self.padding, 0, self.padding), mode="replicate")  # not periodic
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h[..., :times, :points]).movedim(1, -1).double()


# %%
# The methods
# -----------
# Published experts are apart: each solves for its piece with the equation there, and with a copy of all initial and boundary rows, and the
# loss alone keeps them together. Coupled experts have interface rows: u and its slope should agree where two of them meet.


class Method(NamedTuple):
    label: str
    functions: int
    layer: HardConstraint | MixtureOfConstraints | None
    patience: int = 1  # times as many steps


METHODS = [Method("soft penalty", 1, None), Method("soft, 4 × steps", 1, None, 4), Method("one constraint", 16, constraint())]
if options.full:
    METHODS.append(Method("one, 64 functions", 64, constraint()))
for coupled in (False, True):
    for experts in (4, 8, 16) if options.full else (4, 16):
        layer = MixtureOfConstraints(constraint(experts), (1, experts), interface_weight=1.0 if coupled else 0.0)
        METHODS.append(Method(f"{experts} {'coupled' if coupled else 'apart'}", 16, layer))


class Run(NamedTuple):
    """What is measured, of one method and one seed; times are processor time."""

    error: float
    residual: float
    conditions: float
    step: float
    solve: float
    kept: float
    iterations: float


def predict(method: Method, network: nn.Module, u0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """u and the iterations of its solve."""
    basis = network(u0)
    if method.layer is None:
        return basis[..., 0], torch.zeros(())
    solution = method.layer.solve(basis, u0, generator=generator)
    return solution.u, solution.iterations.double().mean()


def train(method: Method, seed: int, bar: tqdm) -> tuple[Run, Tensor]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    network = FourierNeuralOperator(method.functions)
    if method.layer is not None:  # the weights start at 1: so does u, roughly, if the sum of the functions is small
        for parameter in network.head[-1].parameters():
            parameter.data *= 0.1
    steps = method.patience * options.steps
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 5e-4)
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    iterations, start = 0.0, time.process_time()
    for _ in range(steps):
        u0 = draw(4, generator)
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            u, taken = predict(method, network, u0, generator)
            equation, conditions = mean_squares(u, u0)
            loss = (equation + conditions).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        iterations += taken.item() / steps
        bar.update()
    step = (time.process_time() - start) / steps
    with torch.no_grad():
        start = time.process_time()
        u, _ = predict(method, network, unseen, generator)
        solve = (time.process_time() - start) / len(unseen)
        error = ((u - reference).norm(dim=(-2, -1)) / reference.norm(dim=(-2, -1))).mean().item()
        residual, conditions = (part.mean().sqrt().item() for part in mean_squares(u, unseen))
    kept = sum(storages.values()) / 2**20
    return Run(100 * error, residual, conditions, 1e3 * step, 1e3 * solve, kept, iterations), u


predict(METHODS[2], FourierNeuralOperator(16), unseen[:2], torch.Generator())  # what is done once is not timed
runs: dict[str, list[Run]] = {method.label: [] for method in METHODS}
shown: dict[str, Tensor] = {}
with tqdm(total=options.seeds * sum(method.patience for method in METHODS) * options.steps) as bar:
    for seed in range(options.seeds):
        for method in METHODS:
            bar.set_description(f"seed {seed}, {method.label:18}")
            run, shown[method.label] = train(method, seed, bar)
            runs[method.label].append(run)
            if options.full:
                tqdm.write(f"seed {seed}, {method.label:18} {run}")


def cell(values: Tensor) -> str:
    return f"{values.mean():7.2f} ± {values.std(correction=0):.2f}"


where = f"{times} × {points} mesh, {LIMIT or INTERIOR} points in all, {options.steps} steps"
print(f"\n{where}; held-out conditions, mean of {options.seeds} seeds")
print(f"{'':20}{'error, %':>14}{'equation':>10}{'conditions':>12}{'ms a step':>11}{'ms a solve':>12}{'MB kept':>9}{'iterations':>12}")
for label, of_seeds in runs.items():
    error, *rest = torch.tensor(of_seeds).T
    equation, conditions, step, solve, kept, iterations = (values.mean().item() for values in rest)
    print(f"{label:20}{cell(error)}{equation:10.4f}{conditions:12.4f}{step:11.1f}{solve:12.1f}{kept:9.1f}{iterations:12.1f}")

# %%
# What came out
# -------------
# For the same number of steps the constraint is worth a lot, and experts that are coupled about as much. For the same time a penalty does
# as well as the constraint on this problem, whose solutions are told apart by one number: a step with it costs a third. Experts apart
# lose. The paper's experts had four times as many points as its one constraint, and a hundred times the steps. ``--full`` is the study;
# the tutorial "From a penalty to a hard constraint to experts" has its table for three seeds, and what can be said about the reasons.
#
# One reason can be seen below on the left. On this mesh the true solution has a residual, too, at the corner that everything comes from.
# Whoever has more freedom to fit those rows fits the solution worse.

figure, axes = plt.subplots(2, 5, figsize=(16, 5.5), layout="constrained", sharex=True, sharey=True)
sample = int(unseen[:, -1].argmin())
extent = (0, problem.length, problem.duration, 0)
on_mesh = problem.mesh_residual(reference)[sample].abs().clamp(min=1e-6).log10()
fields = {"reference": reference} | {name: shown[name] for name in ("soft, 4 × steps", "one constraint", "4 apart", "4 coupled")}
for column, (label, u) in zip(axes.T, fields.items(), strict=True):
    top = column[0].imshow(u[sample], extent=extent, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    column[0].set_title(label)
    if u is reference:
        picture = column[1].imshow(on_mesh, extent=extent, aspect="auto", cmap="magma")
        column[1].set_title("its residual on this mesh, log₁₀")
        figure.colorbar(picture, ax=column[1])
        continue
    bottom = column[1].imshow((u - reference)[sample], extent=extent, aspect="auto", vmin=-0.1, vmax=0.1, cmap="coolwarm")
    column[1].set_title(f"error, {runs[label][-1].error:.1f} % on all")
figure.colorbar(top, ax=axes[0, -1])
figure.colorbar(bottom, ax=axes[1, -1])
for axis in axes[1]:
    axis.set_xlabel("x")
for axis in axes[:, 0]:
    axis.set_ylabel("t")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "diffusion_sorption.png", dpi=150)
print("figure saved: figures/diffusion_sorption.png")
