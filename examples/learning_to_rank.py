r"""
Who needs treatment first? Learning to rank
===========================================

Fifteen clinics record the progression of diabetes in their patients, and we want one rule for all of them: from ten measurements, such as
age, blood pressure and blood values, a score that says who is to be seen first. The patients and what happened to them are
real: 442, a data set that comes with scikit-learn. The clinics are ours, and they have two habits that data from many sources have:

- **each writes on a scale of its own**: one in points, one in per cent, one counts days. Within a clinic a larger number is a worse
  disease; between clinics the numbers can't be compared;
- **each has patients of its own**: the village doctor sees the mild cases, the university hospital the severe ones.

The first habit ruins a regression on the numbers. The remedy that comes to mind is to standardize them in each clinic, or to
replace them by their ranks there. Then the second habit ruins it: a patient of average rank in the hospital is worse off than the worst
one in the village. What can be trusted is the *order* within each clinic, and a model should be trained on just that: on Spearman's
rank correlation between its scores and the records, in each clinic by itself,

.. math:: \rho = \operatorname{corr}\bigl(\operatorname{rank}(s),\; \operatorname{rank}(y)\bigr).

Ranks have no useful derivative. Soft ranks have: they are the solution of a quadratic program, the projection of the scores on the
permutahedron (Blondel et al. 2020, arXiv:2002.08871).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from difflayers.sorting import average_rank, ndcg, spearman, spearman_loss

parser = argparse.ArgumentParser(description="Rank patients of clinics that write on different scales.")
parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
parser.add_argument("--seeds", type=int, default=8, help="repetitions: other patients held out, other clinics, other scales")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 5
    print("DIFFLAYERS_SHORT=1: 5 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The clinics
# -----------
# Three hundred patients go to fifteen clinics with 10 to 30 patients each, the other 142 are held out. A patient's clinic depends on the
# progression of the disease and on chance. A clinic writes :math:`b \, y^a`, with its own a and b. Lists of different lengths are padded
# to the longest, and a mask says which entries count.

SIZES = torch.linspace(10, 30, 15).round().long()
MASK = torch.arange(int(SIZES.max())) < SIZES[:, None]

diabetes = load_diabetes()
measurements = torch.from_numpy(diabetes.data / diabetes.data.std(0)).float()
progression = torch.from_numpy(diabetes.target).float()


def padded(values: Tensor) -> Tensor:
    lists = values.new_zeros(*MASK.shape, *values.shape[1:])
    lists[MASK] = values
    return lists


def found_clinics(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Measurements, records and true progression in each clinic, ``(clinics, patients, ...)``, and the patients held out."""
    shuffled = torch.randperm(len(progression), generator=generator)
    here, held_out = shuffled[: SIZES.sum()], shuffled[SIZES.sum() :]
    severity = (progression[here] - progression[here].mean()) / progression[here].std()
    here = here[(0.7 * severity + 0.3 * torch.randn(len(here), generator=generator)).argsort()]
    true = padded(progression[here])
    power = 0.5 + 2 * torch.rand(len(SIZES), 1, generator=generator)
    unit = torch.randn(len(SIZES), 1, generator=generator).exp()
    return padded(measurements[here]), unit * (true / 100) ** power, true, held_out


# %%
# Ways to train a linear score
# ---------------------------------
# The model is always the same, ten weights. The squared error meets the records as they are, standardized in each clinic, or replaced by
# their ranks there. RankNet (Burges et al. 2005) asks every pair of patients of a clinic who is worse: a logistic regression on
# differences of scores, and a strong baseline, at the cost of :math:`n^2` pairs. Then the rank correlation, by soft ranks, at the cost
# of sorting. Last comes what can't be had in practice: the squared error of the true progression, on one scale.


def squared_error(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda scores: (scores - target)[MASK].square().mean()


def standardized(records: Tensor, each: bool) -> Tensor:
    """Zero mean and unit deviation, in each clinic or in all of them together."""
    if not each:
        return (records - records[MASK].mean()) / records[MASK].std()
    mean = torch.where(MASK, records, 0).sum(-1, keepdim=True) / SIZES[:, None]
    variance = torch.where(MASK, records - mean, 0).square().sum(-1, keepdim=True) / SIZES[:, None]
    return (records - mean) / variance.sqrt()


def ranknet(records: Tensor) -> Callable[[Tensor], Tensor]:
    worse = (records[:, :, None] > records[:, None, :]) & MASK[:, :, None] & MASK[:, None, :]
    return lambda scores: softplus(scores[:, None, :] - scores[:, :, None])[worse].mean()


def losses(records: Tensor, true: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "squared error": squared_error(standardized(records, each=False)),
        "standardized in clinics": squared_error(standardized(records, each=True)),
        "ranks in clinics": squared_error(standardized(average_rank(records, mask=MASK), each=True)),
        "RankNet": ranknet(records),
        "Spearman loss": lambda scores: spearman_loss(scores, records, mask=MASK),
        "true scale": squared_error(standardized(true, each=False)),
    }


def train(loss_fn: Callable[[Tensor], Tensor], patients: Tensor, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    model = nn.Linear(measurements.shape[1], 1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=options.steps, pct_start=0.1)
    for _ in range(options.steps):
        loss = loss_fn(model(patients)[..., 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


# %%
# Patients that no clinic has seen
# --------------------------------
# The scores are judged on the patients held out, of all degrees of severity: by Spearman's correlation with their true progression, and by
# NDCG of the first ten, the gain being the progression: are those at the top of the list really the ones that need it?

results: dict[str, list[tuple[float, float]]] = {}
ranked: dict[str, list[Tensor]] = {}
with tqdm(total=6 * options.seeds) as bar:
    for seed in range(options.seeds):
        patients, records, true, held_out = found_clinics(torch.Generator().manual_seed(seed))
        for name, loss_fn in losses(records, true).items():
            bar.set_description(f"seed {seed}, {name:23}")
            model = train(loss_fn, patients, seed)
            with torch.no_grad():
                scores = model(measurements[held_out])[:, 0]
            worst = progression[held_out]
            results.setdefault(name, []).append((spearman(scores, worst).item(), ndcg(scores, worst - worst.min(), k=10).item()))
            ranked.setdefault(name, []).append(average_rank(scores))
            bar.update()

table = {name: torch.tensor(values) for name, values in results.items()}
print(f"\n{len(held_out)} patients held out, {options.seeds} seeds, {options.steps} steps: mean ± standard deviation")
print(f"{'':25}Spearman's correlation    NDCG of the first 10")
for name, values in table.items():
    (rho, first), (rho_deviation, first_deviation) = values.mean(0), values.std(0, correction=0)
    print(f"{name:25}{rho:9.3f} ± {rho_deviation:.3f} {first:18.3f} ± {first_deviation:.3f}")

# %%
# What the clinics taught
# -----------------------
# The whole list gets into better order than by any squared error, close to what the true scale would give, and reliably so: the squared
# error of the raw records depends on the clinic that happens to write the largest numbers. RankNet, which sees the order, too, ranks as
# well as the Spearman loss. Among the first ten it is ahead, and the Spearman loss has no advantage there at all: a correlation
# of the whole list takes no special interest in its top.

figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(1, 1, 1.3))
colours = dict(zip(table, ("0.6", "tab:orange", "tab:brown", "tab:blue", "tab:red", "0.2"), strict=True))
# The seed shown is the median of the squared error, neither its best nor its worst.
typical = int(table["squared error"][:, 0].argsort()[options.seeds // 2])
_, records, true, held_out = found_clinics(torch.Generator().manual_seed(typical))
shades = plt.get_cmap("viridis")(torch.linspace(0, 1, len(SIZES)).numpy())
for clinic, keep in enumerate(MASK):
    axes[0].plot(true[clinic, keep], records[clinic, keep], ".", color=shades[clinic], markersize=5)
axes[0].set(title="what fifteen clinics write (colours)", xlabel="true progression", ylabel="record", yscale="log")
for name in ("squared error", "Spearman loss"):
    label = f"{name}, ρ = {table[name][typical, 0]:.2f}"
    axes[1].plot(average_rank(progression[held_out]), ranked[name][typical], ".", color=colours[name], label=label)
axes[1].set(title=f"patients held out, seed {typical}", xlabel="true rank", ylabel="rank by score", ylim=(-4, 170))
axes[1].legend(frameon=False, fontsize=9, loc="upper left")
for place, (name, values) in enumerate(table.items()):
    axes[2].barh(place, values[:, 0].mean(), color=colours[name], alpha=0.75)
    axes[2].plot(values[:, 0], [place] * len(values), "o", color="black", markersize=3)
axes[2].set(title="rank correlation on patients held out (dots: seeds)", yticks=range(len(table)))
axes[2].set_yticklabels(table)
axes[2].invert_yaxis()

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "learning_to_rank.png", dpi=150)
print("figure saved: figures/learning_to_rank.png")
