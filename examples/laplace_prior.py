r"""
Read the prior off a denoiser
=============================

Numbers x are drawn from a Laplace distribution, :math:`p(x) = \tfrac12 e^{-|x|}`, and seen as y = x + noise. A network learns from pairs
(y, x) to guess x. What it learns depends on the loss: squared errors make it the mean of all x that may have led to y, absolute errors the
median. The third loss, proximal matching (Fang, Buchanan and Sulam 2024, arXiv:2310.14344), makes it the most probable x,

.. math:: f(y) = \arg\max_x \; p(x \mid y) = \arg\min_x \; |x| + \tfrac12 (x - y)^2 .

That is a proximal operator: of the absolute value, so f is the soft threshold, :math:`\max(|y| - 1, 0)` with the sign of y.

The network is a :class:`~difflayers.LearnedProximalNetwork`, the gradient of a convex function. Such a network is the proximal
operator of *some* function R, whatever the loss was, and R can be computed from it. Trained by proximal matching it should be −log p,
which here is :math:`|x|`: a network that has seen samples only tells the density that they came from.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers.prox import InputConvexNN, LearnedProximalNetwork, ProximalMatchingSchedule

parser = argparse.ArgumentParser(description="The Laplace prior from three denoisers: squares, absolute values, proximal matching.")
parser.add_argument("--seed", type=int, default=0, help="of the networks and of the samples")
parser.add_argument("--published", action="store_true", help="the network and the schedule of the paper: 40,000 steps, hours")
options, _ = parser.parse_known_args()
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# Three losses
# ------------
# All three networks start alike, see the same samples and are trained as many steps with the same learning rates. Proximal matching
# begins as absolute errors, and γ falls by stages: a :class:`~difflayers.prox.ProximalMatchingSchedule`. The smaller γ, the fewer samples
# are near enough to count, so the last stages take more at once.

if options.published:
    HIDDEN, LAYERS, BATCH, LAST_BATCH = 50, 4, 2000, 2000
    schedule = ProximalMatchingSchedule.from_stages(
        [(10_000, None, 1e-3), (10_000, None, 1e-4), *((4_000, gamma, 1e-4) for gamma in (0.5, 0.4, 0.3, 0.2, 0.1))]
    )
else:
    HIDDEN, LAYERS, BATCH, LAST_BATCH = 20, 2, 4000, 16_000
    schedule = ProximalMatchingSchedule.from_stages(
        [
            *[(200, None, 1e-2), (200, None, 3e-3)],
            *[(200, 0.5, 2e-3), (200, 0.3, 1e-3), (200, 0.2, 5e-4)],
            *[(150, 0.1, 1e-3), (150, 0.1, 3e-4), (100, 0.1, 1e-4)],
        ]
    )
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    schedule = ProximalMatchingSchedule.from_stages([(10, None, 1e-2), (10, 0.1, 1e-3)])
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")

squares, absolutes = nn.MSELoss(), nn.L1Loss()
LOSSES: dict[str, Callable[[int], nn.Module]] = {
    "squares": lambda step: squares,
    "absolute values": lambda step: absolutes,
    "proximal matching": schedule.loss,
}


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy and clean samples ``(count, 1)``."""
    sign = torch.randint(2, (count, 1), generator=generator) * 2 - 1
    x = sign * torch.empty(count, 1).exponential_(generator=generator)
    return x + torch.randn(count, 1, generator=generator), x


networks: dict[str, LearnedProximalNetwork] = {}
with tqdm(total=len(LOSSES) * schedule.steps) as bar:
    for name, loss_at in LOSSES.items():
        torch.manual_seed(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        network = LearnedProximalNetwork(InputConvexNN(1, hidden=HIDDEN, layers=LAYERS, beta=10.0), strong_convexity=0.02)
        optimizer = torch.optim.Adam(network.parameters())
        bar.set_description(f"{name:17}")
        for step in range(schedule.steps):
            stage = schedule.stage(step)
            optimizer.param_groups[0]["lr"] = stage.learning_rate
            noisy, clean = draw(LAST_BATCH if stage.gamma == 0.1 else BATCH, generator)
            loss = loss_at(step)(network(noisy), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
        networks[name] = copy.deepcopy(network).double()  # to be inverted to twelve digits

# %%
# Each its own point of the posterior
# -----------------------------------
# The three networks are compared with the mean, the median and the mode of p(x | y), by quadrature and by formula. The numbers on the
# diagonal are small: each loss found its own point. Only the mode is the proximal operator of −log p.

y = torch.linspace(-4, 4, 801, dtype=torch.float64)
fine = torch.linspace(-25, 25, 10_001, dtype=torch.float64)
posterior = torch.softmax(-fine.abs() - (fine - y[:, None]).square() / 2, -1)
POINTS = {
    "mean": posterior @ fine,
    "median": fine[(posterior.cumsum(-1) < 0.5).sum(-1)],
    "mode": y.sign() * (y.abs() - 1).clamp_min(0),
}
x = torch.linspace(-3, 3, 601, dtype=torch.float64)
denoised, priors = {}, {}
for name, network in networks.items():
    with torch.no_grad():
        denoised[name] = network(y[:, None])[:, 0]
        prior = network.prior(x[:, None])
    priors[name] = prior - (prior - x.abs()).mean()  # R is known up to a constant

print(f"\n{'root mean square distance':27}{'on −4 ≤ y ≤ 4, of the network to':^34}{'on −3 ≤ x ≤ 3,':>16}")
print(f"{'trained by':20}" + "".join(f"{point:>13}" for point in POINTS) + f"{'R to |x|':>17}")
errors = {}
for name in networks:
    distances = [(denoised[name] - value).square().mean().sqrt().item() for value in POINTS.values()]
    errors[name] = (priors[name] - x.abs()).square().mean().sqrt().item()
    print(f"{name:20}" + "".join(f"{distance:13.3f}" for distance in distances) + f"{errors[name]:17.3f}")

# %%
# The prior
# ---------
# :math:`R(x) = xy - \tfrac12 x^2 - φ(y)` at the y with f(y) = x: ``prior`` finds it for all x at once. The network trained on squares is
# a proximal operator, too, of a function with a round bottom: the mean of the posterior is no soft threshold, and hardly ever zero. Whoever
# wants the smallest error takes that network. Whoever wants to know what the data are like, takes the third.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
colours = dict(zip(networks, ("tab:blue", "tab:orange", "tab:red"), strict=True))
left.plot(y, POINTS["mode"], color="black", linestyle="--", label="soft threshold")
right.plot(x, x.abs(), color="black", linestyle="--", label="−log p, up to a constant")
for name, colour in colours.items():
    left.plot(y, denoised[name], color=colour, linewidth=1.8, label=name)
    right.plot(x, priors[name], color=colour, linewidth=1.8, label=name)
left.set(title="the denoiser", xlabel="y, noisy", ylabel="f(y)")
right.set(title="the prior that it is the proximal operator of", xlabel="x", ylabel="R(x)")
for panel in (left, right):
    panel.legend(frameon=False)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "laplace_prior.png", dpi=150)
print("figure saved: figures/laplace_prior.png")
