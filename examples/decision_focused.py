r"""
Predict what matters to the decision
====================================

Every week a trading desk sets money aside for 20 stocks. Stock :math:`i` will need :math:`y_i`, its largest loss in the coming five
days, in per cent; the desk reserves :math:`z_i`. Money that is missing costs ten times as much as money that lies idle, and there is not
more than 60 to distribute, 3 for each stock:

.. math:: \text{cost}(z, y) = \tfrac{1}{20} \sum_i 10 \, (y_i - z_i)_+ + (z_i - y_i)_+, \qquad
          z(m) = \arg\min_z \tfrac12 \|z - m\|^2 \quad\text{subject to}\quad \textstyle\sum_i z_i \le 60,\; z \ge 0.

The rule :math:`z(m)` turns a prediction :math:`m` of the needs into reserves. Needs can be predicted to some degree: days of large
losses come in clusters. The usual way has two stages, a network that is trained to predict well and then the rule. But what is a good
prediction? Not the mean, since a shortfall is dear; and where the budget is too small, what counts is how the predictions of the
stocks compare. Decision-focused learning (Donti, Amos and Kolter 2017, arXiv:1703.04529; Elmachtoub and Grigas 2022,
arXiv:1710.08005) trains the same network on the cost itself, through the rule, which is a layer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skfolio.datasets import load_sp500_dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from difflayers import QPLayer

parser = argparse.ArgumentParser(description="Reserve money for the losses of 20 stocks: two stages against end to end.")
parser.add_argument("--steps", type=int, default=200, help="training steps of each network")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other initial networks, other batches")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The prices
# ----------
# Daily prices of 20 large companies, 1990 to 2022, ship with skfolio. The network sees how volatile a stock was lately, over about 5, 21,
# 63 and 252 days, and the same for the average of the stocks. It is trained on the weeks before 2008 and judged on those after.

SHORTFALL, IDLE, BUDGET, WEEK, YEAR = 10.0, 1.0, 60.0, 5, 252
prices = load_sp500_dataset()
returns = 100 * np.log(prices).diff().iloc[1:]
averages = [returns.pow(2).ewm(halflife=days).mean() for days in (5, 21, 63, 252)]
log_volatility = torch.from_numpy(np.stack(averages, axis=-1)).log().float() / 2
features = torch.cat([log_volatility, log_volatility.mean(1, keepdim=True).expand_as(log_volatility)], dim=-1)

days = torch.arange(YEAR, len(returns) - WEEK, WEEK)  # the last day that is known when the decision is made
losses = -torch.from_numpy(returns.to_numpy(copy=True)).float()
needs = torch.stack([losses[day + 1 : day + 1 + WEEK].cumsum(0).amax(0) for day in days]).clamp(min=0)
before_2008 = int((returns.index[days.numpy()] < "2008").sum())
seen, unseen = torch.arange(before_2008), torch.arange(before_2008, len(days))
features, volatility = features[days], log_volatility[days, :, 2].exp()
features = (features - features[seen].mean((0, 1))) / features[seen].std((0, 1))


def cost(reserves: Tensor, needs: Tensor) -> Tensor:
    missing = needs - reserves
    return (SHORTFALL * missing.clamp(min=0) + IDLE * (-missing).clamp(min=0)).mean(-1)


# %%
# The network and the rule
# ------------------------
# One small network predicts for every stock. The matrices of the rule are shared by all weeks; only :math:`q = -m` differs.


class Prediction(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        nn.init.zeros_(self.network[2].weight)
        nn.init.zeros_(self.network[2].bias)

    def forward(self, weeks: Tensor) -> Tensor:
        return volatility[weeks] * self.network(features[weeks])[..., 0].exp()


stocks = needs.shape[1]
qp = QPLayer()


def reserve(prediction: Tensor) -> Tensor:
    constraint, budget = torch.ones(1, stocks), torch.tensor([BUDGET])
    return qp(torch.eye(stocks), -prediction, G=constraint, h=budget, lb=torch.zeros(stocks))


# %%
# Three ways to train it
# ----------------------
# The squared error predicts the mean. The pinball loss is the cost without the budget: it knows that a shortfall is ten times as
# expensive as idle money, and predicts the quantile 10/11. The third goes through the layer.

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": lambda prediction, needs: (prediction - needs).square().mean(),
    "pinball loss": lambda prediction, needs: cost(prediction, needs).mean(),
    "end to end": lambda prediction, needs: cost(reserve(prediction), needs).mean(),
}


def train(loss_fn: Callable[[Tensor, Tensor], Tensor], seed: int, label: str) -> Prediction:
    model, generator = Prediction(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=label) as bar:
        for _ in bar:
            weeks = torch.randint(len(seen), (64,), generator=generator)
            loss = loss_fn(model(weeks), needs[weeks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return model


# %%
# Weeks that nobody has seen
# --------------------------
# For the squared error there is a cheap remedy, a safety factor on all predictions, tuned on the training weeks; it is one of the
# methods. So is the best prediction that is the same for all stocks and weeks, and the oracle, which knows the needs. The regret of a
# method is its cost minus the oracle's.


@torch.no_grad()
def safety_factor(model: Prediction) -> float:
    factors = torch.arange(1, 4, 0.125)
    return factors[torch.stack([cost(reserve(factor * model(seen)), needs[seen]).mean() for factor in factors]).argmin()].item()


def constant() -> Tensor:
    levels = torch.arange(0, 10, 0.25)
    best = levels[torch.stack([cost(reserve(level.expand(1, stocks)), needs[seen]).mean() for level in levels]).argmin()]
    return best.expand(len(unseen), stocks)


decisions = {name: [] for name in ("constant", "squared error", "squared error × factor", "pinball loss", "end to end", "oracle")}
for seed in range(options.seeds):
    models = {name: train(loss_fn, seed, f"seed {seed}, {name:13}") for name, loss_fn in LOSSES.items()}
    with torch.no_grad():
        predictions = {"constant": constant(), "oracle": needs[unseen]} | {name: model(unseen) for name, model in models.items()}
        predictions["squared error × factor"] = safety_factor(models["squared error"]) * predictions["squared error"]
        for name, found in decisions.items():
            found.append(reserve(predictions[name]))

reserves = {name: torch.stack(found) for name, found in decisions.items()}
costs = {name: cost(found, needs[unseen]).mean(-1) for name, found in reserves.items()}
first, last = (returns.index[int(days[unseen[side]])].year for side in (0, -1))
print(f"\nmean cost of {len(unseen)} weeks, {first} to {last} ({options.steps} steps)")
print(f"{'':24}" + "".join(f"  seed {seed}" for seed in range(options.seeds)) + "    mean   regret  against squared error")
for name, values in costs.items():
    regret = (values - costs["oracle"]).mean()
    change = 100 * (regret / (costs["squared error"] - costs["oracle"]).mean() - 1)
    print(f"{name:24}" + "".join(f"{value:8.3f}" for value in values) + f"{values.mean():8.3f}{regret:9.3f}{change:+10.1f} %")

# %%
# What the cost is made of
# ------------------------
# The mean of the needs is not enough money, and a factor mends most of that. Quantiles ask for more than there is, nearly always, and the
# rule then cuts all stocks by the same amount. That is nothing for a wild stock and all the margin of a calm one, which is left with less
# than its mean need. The network that was trained through the rule knows that there will be a cut, and asks accordingly.

figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(1, 1.25, 1))
shown = list(reserves)
for place, name in enumerate(shown):
    short = SHORTFALL * (needs[unseen] - reserves[name]).clamp(min=0).mean()
    idle = costs[name].mean() - short
    axes[0].barh(place, short, color="tab:red", label="missing money" if place == 0 else None)
    axes[0].barh(place, idle, left=short, color="tab:orange", label="idle money" if place == 0 else None)
    axes[0].plot(costs[name], [place] * options.seeds, "o", color="black", markersize=3, label="each seed" if place == 0 else None)
    axes[0].text(costs[name].mean() + 0.25, place, f"{costs[name].mean():.2f}", va="center")
axes[0].set(title="mean cost of unseen weeks", yticks=range(len(shown)), xlim=(0, 1.18 * max(v.mean() for v in costs.values())))
axes[0].set_yticklabels(shown)
axes[0].invert_yaxis()
axes[0].legend(frameon=False, fontsize=8, loc="lower right")

year_of = torch.tensor(returns.index[days[unseen].numpy()].year.to_numpy(copy=True))
years = year_of.unique()
for name, colour in {"pinball loss": "tab:blue", "end to end": "tab:red"}.items():
    saved = (cost(reserves["squared error × factor"], needs[unseen]) - cost(reserves[name], needs[unseen])).mean(0)
    axes[1].plot(years, [saved[year_of == year].mean() for year in years], "o-", color=colour, label=name)
axes[1].axhline(0, color="0.55", linewidth=1)
axes[1].set(title="saved each year, compared with squared error × factor", ylabel="cost")
axes[1].legend(frameon=False, fontsize=8)

colours = {"squared error × factor": "0.55", "pinball loss": "tab:blue", "end to end": "tab:red"}
order = needs[unseen].mean(0).argsort()
axes[2].plot(needs[unseen].mean(0)[order], "k.", label="need")
for name, colour in colours.items():
    axes[2].plot(reserves[name].mean((0, 1))[order], ".-", color=colour, label=f"reserve, {name}")
axes[2].set(title="mean of each stock", xticks=range(stocks), ylabel="per cent")
axes[2].set_xticklabels([prices.columns[index] for index in order.tolist()], rotation=90, fontsize=8)
axes[2].legend(frameon=False, fontsize=8)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "decision_focused.png", dpi=150)
print("figure saved: figures/decision_focused.png")
