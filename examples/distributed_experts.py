r"""
Experts on several processes
============================

Burgers' equation as a hard constraint, cut into experts, and the experts spread over processes. A network reads an initial condition and
proposes basis functions on a mesh in space and time; in every block of the mesh an expert finds the combination of them that obeys
the equation best, and the network learns to propose better ones:

.. math:: u = \sum_j w^e_j b_j \text{ in block } e, \qquad w = \operatorname{argmin}_w \tfrac12 \|r(w)\|^2, \qquad
   r = \partial_t u + u\, \partial_x u - ν\, \partial_x^2 u, \; u(0, x) - u_0(x), \; \text{jumps between the blocks}.

The least-squares problems are most of the work and of the memory. They are what is spread: each process solves its own experts,
all of them get the whole field, and ``DistributedDataParallel`` averages the gradients of the network as it always does. The
average is the gradient that one process would have found, to rounding: the first thing that is checked here.

Run as ``python examples/distributed_experts.py``, the script starts its own two processes. Or start them with
``torchrun --nproc-per-node 2 examples/distributed_experts.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from difflayers.pde import HardConstraint, MixtureOfConstraints, initial
from difflayers.pde.problems import Burgers

parser = argparse.ArgumentParser(description="Train a network with a mixture of hard constraints, spread over processes.")
parser.add_argument("--steps", type=int, default=120, help="training steps")
parser.add_argument("--processes", type=int, default=2, help="how many are started, if this is not one of them")
parser.add_argument("--results", type=Path, help="for the processes: where the first one leaves what was found")
options, _ = parser.parse_known_args()
is_worker = "TORCHELASTIC_RUN_ID" in os.environ
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 2
    if not is_worker:
        print("DIFFLAYERS_SHORT=1: 2 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # two processes share the cores

# %%
# Network and layer
# -----------------
# Every process has the whole network and the whole mesh. A group is the only thing that the layer needs to know about the others.

BATCH = 2
problem = Burgers(points=32, times=21, viscosity=0.02, duration=0.25, modes=1)


class Proposal(nn.Module):
    """Initial conditions ``(batch, points)`` → N basis functions ``(batch, times, points, N)``; the first is constant in time."""

    def __init__(self, N: int, width: int = 12) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Conv2d(4 if depth == 0 else width, width, 5) for depth in range(3)])
        self.last = nn.Conv2d(width, N - 1, 1)

    def forward(self, u0: Tensor, times: int = problem.times) -> Tensor:
        t = torch.linspace(0, 1, times).to(u0)[:, None].expand(times, u0.shape[-1])
        u = u0[:, None, :].expand(-1, times, -1)
        hidden = torch.stack([u, t * u, t.expand_as(u), torch.cos(torch.pi * t).expand_as(u)], 1)
        for layer in self.inner:
            padded = nn.functional.pad(nn.functional.pad(hidden, (2, 2, 0, 0), mode="circular"), (0, 0, 2, 2), mode="replicate")
            hidden = torch.tanh(layer(padded))
        return torch.cat([u.unsqueeze(-1), self.last(hidden).movedim(1, -1)], -1)


def make_constraint(problem: Burgers) -> HardConstraint:
    start = initial(lambda u0: u0, weight=10.0)
    return HardConstraint(problem.residual, features=problem.features, rows=[start], grid_ndim=2, ridge=1e-2, tol=1e-6, max_iter=300)


def make_layer(problem: Burgers, partition: tuple[int, int], group: Any = None) -> MixtureOfConstraints:
    return MixtureOfConstraints(make_constraint(problem), partition, interface_weight=3.0, group=group)


def loss_of(u: Tensor, u0: Tensor) -> Tensor:
    return problem.mesh_residual(u).square().mean() + 100 * (u[:, 0] - u0).square().mean()


# %%
# What each process does
# ----------------------
# It checks its gradient against that of one process, looks at what a larger mesh costs, and trains.


def gradients(network: nn.Module, layer: MixtureOfConstraints, u0: Tensor) -> Tensor:
    network.zero_grad()
    loss_of(layer(network(u0), u0), u0).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def cost(large: Burgers, group: Any) -> list[float]:
    """Forward and backward through the layer: seconds, processor seconds, and the megabytes kept in between, by autograd's own hooks."""
    u0 = large.initial(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = Proposal(16).double()(u0, large.times).detach().requires_grad_()
    layer, storages = make_layer(large, (4, 2), group), {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    dist.barrier()
    clock, processor = time.perf_counter(), time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        u = layer(basis, u0)
    u.square().sum().backward()
    return [time.perf_counter() - clock, time.process_time() - processor, sum(storages.values()) / 2**20]


def work() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network, alone, spread = Proposal(8).double(), make_layer(problem, (4, 1)), make_layer(problem, (4, 1), dist.group.WORLD)
    parallel = DistributedDataParallel(network)
    u0 = problem.initial(BATCH, generator=generator, dtype=torch.float64)
    exact = gradients(network, alone, u0).clone()
    difference = float((gradients(parallel, spread, u0) - exact).norm() / exact.norm())

    size = {"points": 32, "times": 21} if os.environ.get("DIFFLAYERS_SHORT") == "1" else {"points": 128, "times": 81}
    large = Burgers(viscosity=0.02, duration=0.25, modes=1, **size)
    torch.manual_seed(0)
    cost_alone = cost(large, None)
    torch.manual_seed(0)
    costs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(costs, cost(large, dist.group.WORLD))

    test = problem.initial(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = problem.solve(test)

    def judge(layer: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u = layer(network(test), test)
        return u, ((u - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).mean()

    before, losses = judge(spread)[1], []
    optimizer = torch.optim.Adam(parallel.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=options.steps)
    for _ in tqdm(range(options.steps), disable=True if rank else None):
        u0 = problem.initial(BATCH, generator=generator, dtype=torch.float64)  # the same in every process
        loss = loss_of(spread(parallel(u0), u0), u0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    u, after = judge(spread)
    errors = torch.stack([before, after, judge(make_constraint(problem))[1]])
    dist.barrier()
    dist.destroy_process_group()
    found = {"difference": difference, "alone": cost_alone, "costs": costs, "errors": errors}
    return found | {"losses": torch.stack(losses), "u": u, "truth": truth, "rank": rank}


if is_worker:
    found = work()
    if options.results is not None:
        if found["rank"] == 0:
            torch.save(found, options.results)
        sys.exit()
    if found["rank"] > 0:
        sys.exit()
else:
    script = Path(__file__) if "__file__" in globals() else Path("distributed_experts.py")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.pt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        arguments = ["--steps", str(options.steps), "--results", str(results)]
        subprocess.run([*torchrun, str(script.resolve()), *arguments], check=True)
        found = torch.load(results)

# %%
# What was found
# --------------
# A process keeps the features of its own experts only, and assembles their part of the matrices. The basis, the rows between the experts
# and the factor of the coupled system are in every process: with more points, and fewer functions, it comes nearer to half. What a
# process waits for the other is in the first column only.

print(f"gradient of the network, {len(found['costs'])} processes against one: relative difference {found['difference']:.1e}")
print(f"\n{'forward and backward':22}{'seconds':>10}{'processor s':>13}{'MB kept':>10}")
for label, cost in [("one process", found["alone"]), *((f"process {rank}", cost) for rank, cost in enumerate(found["costs"]))]:
    print(f"{label:22}{cost[0]:10.2f}{cost[1]:13.2f}{cost[2]:10.2f}")
before, after, single = found["errors"].tolist()
print(f"\nerror on initial conditions never seen: {before:.4f} before training, {after:.4f} after {options.steps} steps")
print(f"the same network, trained for four experts, with one constraint: {single:.4f}")

figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
error = found["u"] - found["truth"]
worst = int(error.flatten(1).norm(dim=1).argsort()[len(error) // 2])
extent = (0, problem.length, 0, problem.duration)
shown = (("solution", found["truth"][worst]), ("network + experts", found["u"][worst]), ("error", error[worst]))
scale = float(found["truth"][worst].abs().max())
for axis, (title, field) in zip(axes, shown, strict=False):
    limit = float(field.abs().max()) if title == "error" else scale
    image = axis.imshow(field, origin="lower", aspect="auto", extent=extent, cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axis)
    for times in (6, 11, 16):  # 21 points over four experts are 6, 5, 5 and 5
        axis.axhline(times / 21 * problem.duration, color="black", linewidth=0.5)
    axis.set(title=title, xlabel="x", ylabel="t")
axes[3].semilogy(found["losses"])
axes[3].set(title="loss", xlabel="training step")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "distributed_experts.png", dpi=150)
print("figure saved: figures/distributed_experts.png")
