r"""
Learn what a controller wants from three demonstrations
=======================================================

An expert balances a pole on a cart. It pushes with at most 6 N and keeps the cart on its track. We see it do so three times, for three
seconds each, and want a controller that does the same, from other initial states, too.

A network can imitate it: state in, force out. The other way is to suppose that the expert solves a problem, and to learn the problem.
Model predictive control solves, at each instant, a quadratic program over the forces :math:`u` of the next second,

.. math:: \min_{u, s} \sum_{k=1}^{N-1} x_k^T Q x_k + x_N^T Q_N x_N + r \sum_k u_k^2 + \text{penalty}(s)
          \quad\text{subject to}\quad x_{k+1} = A x_k + B u_k,\; |u_k| \le 6,\; |p_k| \le 1 + s,\; s \ge 0,

and applies the first force (:math:`p` is the position of the cart, :math:`s` a slack that keeps the problem feasible). The model
:math:`A, B` and the limits are known. What the expert wants, :math:`Q`, :math:`Q_N` and :math:`r`, is not, and is learned by gradient
descent on the error in its forces, through the layer. Amos et al. do this in Differentiable MPC (NeurIPS 2018, arXiv:1810.13400).
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers import QPLayer

parser = argparse.ArgumentParser(description="Imitate an expert on the cart-pole with networks and with a learned quadratic program.")
parser.add_argument("--steps", type=int, default=120, help="training steps of the controller; the networks get ten times as many")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other demonstrations, other initial networks")
parser.add_argument("--demonstrations", type=int, default=3, help="how often the expert is seen")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The cart and the pole
# ---------------------
# The state is the position of the cart, the angle of the pole (zero is upright) and their velocities. The simulation is nonlinear,
# Runge and Kutta's method with four steps in each of the 50 ms between two decisions. Controllers know only a linear model, its
# derivative at rest, and the one to be learned thinks that the pole is a fifth longer and heavier than it is.

FORCE, TRACK, PERIOD = 6.0, 1.0, 0.05


def acceleration(state: Tensor, force: Tensor, pole_scale: float) -> Tensor:
    cart, pole, half_length, gravity = 1.0, 0.2 * pole_scale, 0.5 * pole_scale, 9.81
    _, angle, velocity, spin = state.unbind(-1)
    push = (force + pole * half_length * spin.square() * angle.sin()) / (cart + pole)
    turn = (gravity * angle.sin() - angle.cos() * push) / (half_length * (4 / 3 - pole * angle.cos().square() / (cart + pole)))
    return torch.stack([velocity, spin, push - pole * half_length * turn * angle.cos() / (cart + pole), turn], dim=-1)


def simulate(state: Tensor, force: Tensor, pole_scale: float = 1.0, substeps: int = 4) -> Tensor:
    """The state after 50 ms of constant force."""
    step = PERIOD / substeps
    for _ in range(substeps):
        k1 = acceleration(state, force, pole_scale)
        k2 = acceleration(state + step / 2 * k1, force, pole_scale)
        k3 = acceleration(state + step / 2 * k2, force, pole_scale)
        k4 = acceleration(state + step * k3, force, pole_scale)
        state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def draw_states(count: int, scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.tensor([0.7, 0.2, 0.5, 0.5]) * (2 * torch.rand(count, 4, generator=generator) - 1)


# %%
# The controller
# --------------
# With the states eliminated, :math:`x = \Phi x_0 + \Gamma u`, the unknowns are the forces and the slack. All matrices are shared by the
# batch; :math:`q` and the right-hand side of the track limits depend on the state.


class Controller(nn.Module):
    """Model predictive control; its weights are the parameters."""

    def __init__(self, horizon: int, pole_scale: float) -> None:
        super().__init__()
        A, B = torch.func.jacrev(simulate, argnums=(0, 1))(torch.zeros(4), torch.zeros(()), pole_scale)
        powers = [torch.linalg.matrix_power(A, k) for k in range(horizon + 1)]
        response = torch.zeros(horizon, 4, horizon)
        for k in range(horizon):
            for earlier in range(k + 1):
                response[k, :, earlier] = powers[k - earlier] @ B
        self.free, self.response = torch.stack(powers[1:]), response
        self.log_state, self.log_force = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.tensor(0.1).log())
        self.final_root = nn.Parameter(torch.eye(4))
        self.horizon, self.qp = horizon, QPLayer()

    def forward(self, state: Tensor) -> Tensor:
        running = torch.diag(self.log_state.exp()).expand(self.horizon - 1, 4, 4)
        weights = torch.cat([running, (self.final_root @ self.final_root.T)[None]])
        weighted = weights @ self.response
        P = torch.einsum("kis,kit->st", self.response, weighted) + self.log_force.exp() * torch.eye(self.horizon)
        q = torch.einsum("kij,bj,kit->bt", self.free, state, weighted)
        scale = P.diagonal().mean()
        penalty = torch.tensor([30.0])
        P, q = torch.block_diag(P / scale, penalty[None]), torch.cat([q / scale, penalty.expand(len(state), 1)], dim=-1)
        position, slack = self.response[:, 0], torch.ones(self.horizon, 1)
        drift = state @ self.free[:, 0].T
        G = torch.cat([torch.cat([position, -slack], dim=1), torch.cat([-position, -slack], dim=1)])
        h = torch.cat([TRACK - drift, TRACK + drift], dim=-1)
        limit = torch.full((self.horizon,), FORCE)
        lb, ub = torch.cat([-limit, torch.zeros(1)]), torch.cat([limit, torch.tensor([torch.inf])])
        return self.qp(P, q, G, h, lb=lb, ub=ub)[:, 0]


def make_expert() -> Controller:
    """It knows the true pole, looks further ahead, and knows what it wants."""
    expert = Controller(horizon=30, pole_scale=1.0)
    wish = torch.tensor([3.0, 5.0, 0.1, 0.1])
    expert.load_state_dict({"log_state": wish.log(), "log_force": torch.tensor(0.02).log(), "final_root": torch.diag((10 * wish).sqrt())})
    return expert.requires_grad_(False)


# %%
# Demonstrations, networks, training
# ----------------------------------
# Three demonstrations of 60 decisions are all there is. The networks' forces are cut at 6 N, as the motor does. Networks are cheap, so
# they get ten times as many steps; all see the same examples and the squared error of the force.

Policy = Callable[[Tensor], Tensor]


@torch.no_grad()
def drive(policy: Policy, state: Tensor, decisions: int = 60) -> tuple[Tensor, Tensor]:
    """States ``(decisions + 1, batch, 4)`` and forces ``(decisions, batch)``. A pole that has fallen stays where it is."""
    states, forces = [state], []
    for _ in range(decisions):
        fallen = states[-1][:, 1].abs() > 1
        force = policy(states[-1].where(~fallen[:, None], 0.0)).clamp(-FORCE, FORCE)
        states.append(simulate(states[-1], force).where(~fallen[:, None], states[-1]))
        forces.append(force)
    return torch.stack(states), torch.stack(forces)


def perceptron(width: int, depth: int) -> nn.Sequential:
    sizes = [4] + [width] * depth
    hidden = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1), nn.Flatten(0))


def train(policy: nn.Module, rate: float, steps: int, states: Tensor, forces: Tensor, generator: torch.Generator, label: str) -> None:
    optimizer = torch.optim.Adam(policy.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    with tqdm(range(steps), desc=label) as bar:
        for _ in bar:
            chosen = torch.randint(len(states), (64,), generator=generator)
            loss = (policy(states[chosen]) - forces[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)


expert = make_expert()
NAMES = ("expert", "controller, untrained", "small network", "large network", "learned controller")
wish, effort = expert.log_state.exp(), expert.log_force.exp()


def judge(states: Tensor, forces: Tensor) -> Tensor:
    """For each test: per cent that fell, per cent that did not but left the track by more than 1 cm, median of the expert's cost."""
    fell = states[-1, :, 1].abs() > 0.6
    left = (states[..., 0].abs().amax(0) > TRACK + 0.01) & ~fell
    price = (states[1:].square() @ wish + effort * forces.square()).sum(0)
    each = torch.stack([100.0 * fell, 100.0 * left, price]).unflatten(1, (len(TESTS), -1))
    return torch.stack([each[0].mean(-1), each[1].mean(-1), each[2].median(-1).values], dim=-1)


TESTS = {"states as in the demonstrations": 0.8, "states up to 60 % further out": 1.3}
COUNT = 64
starts = torch.cat([draw_states(COUNT, scale, torch.Generator().manual_seed(99)) for scale in TESTS.values()])
generators = [torch.Generator().manual_seed(seed) for seed in range(options.seeds)]
first = torch.stack([draw_states(options.demonstrations, 0.8, generator) for generator in generators])
shown, exerted = drive(expert, first.flatten(0, 1))  # all seeds in one batch
shown, exerted = (value.unflatten(1, first.shape[:2]) for value in (shown[:-1], exerted))
driven = {name: drive(policy, starts) for name, policy in (("expert", expert), ("controller, untrained", Controller(20, 1.2)))}
scores = {name: [judge(*run)] for name, run in driven.items()}
parameters = {name: sum(p.numel() for p in expert.parameters()) for name in driven}
for seed, generator in enumerate(generators):
    torch.manual_seed(seed)
    examples = shown[:, seed].flatten(0, 1), exerted[:, seed].flatten()
    policies = dict(zip(NAMES[2:], (perceptron(3, 1), perceptron(32, 2), Controller(20, 1.2)), strict=True))
    for (name, policy), rate in zip(policies.items(), (0.03, 0.01, 0.1), strict=True):
        steps = options.steps if name == "learned controller" else 10 * options.steps
        train(policy, rate, steps, *examples, generator, f"seed {seed}, {name:18}")
        parameters[name] = sum(p.numel() for p in policy.parameters())
        run = drive(policy, starts)
        driven.setdefault(name, run)  # the first seed's, for the figure
        scores.setdefault(name, []).append(judge(*run))

print(f"\n{COUNT} unseen initial states, mean of {options.seeds} seeds ({options.steps} steps, {10 * options.steps} for the networks)")
print(f"{'':23}{'parameters':>10}" + "".join(f"{test:>35}" for test in TESTS))
print(f"{'':33}" + f"{'fell':>13}{'left track':>12}{'cost':>10}" * len(TESTS))
for name, results in scores.items():
    means = torch.stack(results).mean(0)
    columns = "".join(f"{fell:11.1f} %{left:10.1f} %{price:10.2f}" for fell, left, price in means)
    print(f"{name:23}{parameters[name]:10}{columns}")
for name in NAMES[2:]:
    shares = ", ".join(f"{result[1, 0]:.1f} %" for result in scores[name])
    print(f"{name}, further out: fell {shares} (each seed)")

# %%
# The limits are in the problem
# -----------------------------
# The controller has learned 21 numbers, and all else it knows: how the cart moves, roughly, and where the track ends. So three
# demonstrations are enough. The networks have seen a thin set of states and fail where they leave it; more demonstrations help them
# (try ``--demonstrations 30``). Further out, the large network falls in about a quarter of the cases and the learned controller in none.
# It does leave the track there, in one case of five, as the expert does. The paths are the
# first seed's.

figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained", width_ratios=(1.25, 1, 1, 1))
colours = {
    "expert": "black",
    "controller, untrained": "0.6",
    "small network": "tab:orange",
    "large network": "tab:red",
    NAMES[-1]: "tab:blue",
}
for place, (name, results) in enumerate(scores.items()):
    failed = torch.stack(results)[..., :2]  # fell, left the track
    for test, height in enumerate((-0.19, 0.19)):
        low, high = failed[:, test, 0].mean(), failed[:, test, 1].mean()
        shade = 0.55 if test == 0 else 1.0
        axes[0].barh(place + height, low, 0.36, color=colours[name], alpha=shade)
        axes[0].barh(place + height, high, 0.36, left=low, color="white", edgecolor=colours[name], alpha=shade, hatch="////")
        axes[0].plot(failed[:, test].sum(-1), [place + height] * len(results), "o", color="black", markersize=3)
axes[0].set(
    title="failed: fell (full), left the track (hatched)\nupper bars: as demonstrated, lower: further out", xlabel="per cent (dots: seeds)"
)
axes[0].set_yticks(range(len(scores)), labels=list(scores))
axes[0].invert_yaxis()
seconds = PERIOD * torch.arange(61)
for axis, name in zip(axes[1:], ("expert", "large network", "learned controller"), strict=True):
    paths = driven[name][0][:, COUNT : COUNT + 40]
    fallen = paths[-1, :, 1].abs() > 0.6
    axis.plot(seconds, paths[..., 0].where(paths[..., 1].abs() < 1, torch.nan)[:, ~fallen], color=colours[name], linewidth=0.7, alpha=0.7)
    if fallen.any():
        axis.plot(seconds, paths[..., 0].where(paths[..., 1].abs() < 1, torch.nan)[:, fallen], color="tab:pink", linewidth=0.7)
    for side in (-TRACK, TRACK):
        axis.axhline(side, color="black", linewidth=0.8, linestyle="--")
    axis.set(title=f"{name}:\n{int(fallen.sum())} of 40 fell", xlabel="seconds", ylim=(-1.5, 1.5))
axes[1].set(ylabel="position of the cart (m)")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "mpc_learned_cost.png", dpi=150)
print("figure saved: figures/mpc_learned_cost.png")
