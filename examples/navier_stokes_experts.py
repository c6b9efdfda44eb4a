r"""
A flow in two dimensions, by one solve or by four
=================================================

Vorticity :math:`ω` on a periodic square is carried along by the velocity :math:`v` that it makes, diffuses, and is stirred:

.. math:: r = ω_t + v \cdot \nabla ω - ν\,Δω - f = 0.

A network shall predict the flow from the initial vorticity :math:`ω_0`, and no solution is given to learn from: only the equation is. It
proposes basis functions :math:`b_j` in space and time that vanish at t = 0, and three ways are compared to make a flow of them,

.. math:: ω = ω_0 + \sum_j w_j\, b_j.

*Soft penalty*: all weights :math:`w_j` are equal, the network has to make the residual small by itself. *Hard constraint*
(:class:`~difflayers.HardConstraint`): the weights minimize :math:`\|r\|^2`, for each flow anew. *Experts*
(:class:`~difflayers.MixtureOfConstraints`, after Chalapathi et al., ICLR 2024): the square is cut into four, and each quarter has weights
of its own. The velocity is nonlocal, but linear in the vorticity, so the residual is a pointwise function of features that are linear in
the weights, which is what makes these solves cheap (:class:`~difflayers.pde.problems.NavierStokes`).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers.pde import HardConstraint, MixtureOfConstraints
from difflayers.pde.problems import NavierStokes

parser = argparse.ArgumentParser(description="A flow in two dimensions: a soft penalty, one hard constraint, four experts.")
parser.add_argument("--steps", type=int, default=40, help="training steps of each network; the soft penalty also gets three times as many")
parser.add_argument("--seeds", type=int, default=1, help="repetitions: other flows, other initial networks")
parser.add_argument("--full", action="store_true", help="400 steps, three seeds: half an hour")
options, _ = parser.parse_known_args()
if options.full:
    options.steps, options.seeds = 400, 3
FLOWS = 8  # to test on
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, FLOWS = 2, 2
    print("DIFFLAYERS_SHORT=1: 2 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the solves are small: more threads would only wait for each other

# %%
# The flow
# --------
# Smooth random eddies on 32 × 32 points, with vorticities of standard deviation 3: in the time that is looked at, they are carried
# along by about a third of the square.

problem = NavierStokes(points=32, times=17, duration=1.0, viscosity=5e-3)
DEVIATION, FUNCTIONS, BATCH = 3.0, 16, 2


def draw(batch: int, generator: torch.Generator) -> Tensor:
    return problem.initial(batch, deviation=DEVIATION, smoothness=5.0, generator=generator)


# %%
# The network
# -----------
# A Fourier neural operator in space. Its outputs are coefficients of Chebyshev polynomials in time. It sees :math:`ω_0`, its derivatives
# and velocity, the force, and the rate at which the vorticity changes in the beginning.


class FourierLayer(nn.Module):
    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes, self.pointwise = modes, nn.Conv2d(width, width, 1)
        self.weights = nn.Parameter(torch.randn(2, width, width, modes, modes, 2) / (width * modes))

    def forward(self, x: Tensor) -> Tensor:
        m, spectrum = self.modes, torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        for rows, weights in zip((slice(None, m), slice(-m, None)), torch.view_as_complex(self.weights), strict=True):
            out[..., rows, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[..., rows, :m], weights)
        return x + nn.functional.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.pointwise(x))


def channels(initial: Tensor) -> Tensor:
    arguments = problem.arguments(initial)
    still = initial.new_zeros(len(initial), *problem.grid)
    return torch.cat([initial[:, None], -problem.mesh_residual(still, *arguments)[:, :1], *arguments], dim=1)


class BasisNetwork(nn.Module):
    def __init__(self, width: int = 24, modes: int = 8, depth: int = 4, degree: int = 3) -> None:
        super().__init__()
        layers = [nn.Conv2d(8, width, 1), *(FourierLayer(width, modes) for _ in range(depth))]
        self.network = nn.Sequential(*layers, nn.Conv2d(width, 64, 1), nn.GELU(), nn.Conv2d(64, FUNCTIONS * (degree + 1), 1))
        angle = torch.acos((2 * problem.t / problem.duration - 1).float())
        self.register_buffer("polynomials", torch.cos(angle[:, None] * torch.arange(degree + 1)))
        self.register_buffer("scale", channels(draw(32, torch.Generator().manual_seed(0))).std((0, 2, 3), keepdim=True))

    def forward(self, initial: Tensor) -> Tensor:
        """Initial vorticities ``(batch, points, points)`` → basis functions ``(batch, times, points, points, N)``."""
        coefficients = self.network(channels(initial) / self.scale).unflatten(1, (FUNCTIONS, -1))
        return problem.corrections(torch.einsum("bjkxy,tk->btxyj", coefficients, self.polynomials))


# %%
# Three ways to weigh the basis
# -----------------------------
# A sample of the points is enough for sixteen unknowns. The initial condition is kept by construction, and the equation is all that remains
# to be solved. With experts, the residual is that of each piece with its own weights: the basis functions are differentiated before they
# are cut, so a jump between two pieces does not show in it. It shows in the error.

constraint = HardConstraint(problem.residual, features=problem.features, grid_ndim=3, points=2048, hessian="gauss_newton")
WAYS = {
    "equal weights": None,
    "one solve": MixtureOfConstraints(constraint, (1, 1, 1)),
    "4 experts": MixtureOfConstraints(constraint, (1, 2, 2)),
    "16 experts": MixtureOfConstraints(constraint, (1, 4, 4)),
}


def weigh(way: str, basis: Tensor, arguments: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Weights for each block of the square, ``(batch, rows, columns, N)``."""
    layer = WAYS[way]
    if layer is None:
        return basis.new_full((len(basis), 1, 1, FUNCTIONS), FUNCTIONS**-0.5)
    return layer.solve(basis, *arguments, generator=generator).weights.unflatten(1, layer.partition[1:])


def combine(functions: Tensor, weights: Tensor) -> Tensor:
    """``(batch, times, points, points, N)`` by the weights of the blocks, to ``(batch, times, points, points)``."""
    rows, columns = weights.shape[1:3]
    blocks = functions.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return torch.einsum("btpxqyj,bpqj->btpxqy", blocks, weights).flatten(4, 5).flatten(2, 3)


def residual(basis: Tensor, weights: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
    return problem.residual({name: combine(part, weights) for name, part in problem.features(basis).items()}, *arguments)


# %%
# Training
# --------
# The loss is the mean square of the residual on the whole mesh. A step with a solve in it takes three times as long as one without,
# so the soft penalty gets a second run of three times as many steps.


class Trained(NamedTuple):
    network: BasisNetwork
    seconds: float  # of processor time, a step


def train(way: str, steps: int, seed: int, bar: tqdm) -> Trained:
    torch.manual_seed(seed)
    network, generator = BasisNetwork(), torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=max(steps, 1))
    start = time.process_time()
    for _ in range(steps):
        initial = draw(BATCH, generator)
        arguments, basis = problem.arguments(initial), network(initial)
        loss = residual(basis, weigh(way, basis, arguments, generator), arguments).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return Trained(network, (time.process_time() - start) / max(steps, 1))


class Score(NamedTuple):
    flow: Tensor
    error: float  # in the 2-norm over space and time, relative to the reference
    residual: float  # root mean square


@torch.no_grad()
def test(network: BasisNetwork, way: str, initial: Tensor, truth: Tensor) -> Score:
    arguments, basis = problem.arguments(initial), network(initial)
    weights = weigh(way, basis, arguments, torch.Generator().manual_seed(0))
    flow = initial[:, None] + combine(basis, weights)
    return Score(flow, float((flow - truth).norm() / truth.norm()), float(residual(basis, weights, arguments).square().mean().sqrt()))


RUNS = {
    "untrained": ("one solve", 0),
    "soft penalty": ("equal weights", options.steps),
    "soft penalty, 3 × steps": ("equal weights", 3 * options.steps),
    "one hard constraint": ("one solve", options.steps),
    "4 experts": ("4 experts", options.steps),
}
costs = {name: [] for name in RUNS}
scores = {name: {way: [] for way in WAYS} for name in RUNS}
kept, floor = [], []
with tqdm(total=options.seeds * sum(steps for _, steps in RUNS.values())) as bar:
    for seed in range(options.seeds):
        initial = draw(FLOWS, torch.Generator().manual_seed(1000 + seed))
        truth = problem.solve(initial, tol=1e-4)
        kept.append(float((initial[:, None] - truth).norm() / truth.norm()))
        floor.append(float(problem.mesh_residual(truth).square().mean().sqrt()))
        for name, (way, steps) in RUNS.items():
            bar.set_description(f"seed {seed}, {name:23}")
            run = train(way, steps, seed, bar)
            costs[name].append(1e3 * run.seconds)
            for other in WAYS:
                scores[name][other].append(test(run.network, other, initial, truth))

# %%
# Results
# -------
# Each network is tested in every way, whatever it was trained for.


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


print(f"\nerrors on {FLOWS} new flows, mean of {options.seeds} seeds; keeping the initial vorticity: {mean(kept):.4f}")
print(f"residual of the reference on this mesh: {mean(floor):.3f}\n")
print(f"{'trained':25}{'ms a step':>9}{'residual':>10}   " + "".join(f"{way:>15}" for way in WAYS))
for name, (way, _) in RUNS.items():
    errors = "".join(f"{mean([score.error for score in scores[name][other]]):15.4f}" for other in WAYS)
    print(f"{name:25}{mean(costs[name]):9.1f}{mean([score.residual for score in scores[name][way]]):10.3f}   {errors}")

times = (4, 8, 16)
shown = {
    "reference": truth[0],
    "soft penalty,\n3 × steps": scores["soft penalty, 3 × steps"]["equal weights"][-1].flow[0],
    "one hard\nconstraint": scores["one hard constraint"]["one solve"][-1].flow[0],
    "4 experts": scores["4 experts"]["4 experts"][-1].flow[0],
}
figure, axes = plt.subplots(3, 2 * len(shown) - 1, figsize=(14, 6.4), layout="constrained")
largest = truth[0].abs().max().item()
for row, k in zip(axes, times, strict=True):
    pictures = [flow[k] for flow in shown.values()]
    errors = [picture - truth[0, k] for picture in pictures[1:]]
    for axis, picture in zip(row, [*pictures, *errors], strict=True):
        scale = largest if axis in row[: len(shown)] else largest / 4
        axis.imshow(picture.T, origin="lower", cmap="RdBu_r", vmin=-scale, vmax=scale)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"t = {problem.t[k]:.2f}")
for axis, title in zip(axes[0], [*shown, *(f"error (× 4):\n{name}" for name in list(shown)[1:])], strict=True):
    axis.set_title(title, fontsize=9)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "navier_stokes_experts.png", dpi=150)
print("figure saved: figures/navier_stokes_experts.png")
