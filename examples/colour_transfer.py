r"""
Give a photograph the colours of another
========================================

A pagoda at noon, and a cup of coffee. How would the pagoda look in the light of the café, and the cup at noon? The colours of a photograph
are a cloud of points, a pixel each, and one cloud has to be sent onto the other. The recipes for that are fixed: match means and
deviations; match the histogram of each channel; transport the cloud as cheaply as possible. What is good and what is bad about their result
is for the eye to say, because nothing in them can be told to be different.

With a transport cost that has a gradient there is no need for a recipe. Write down what is wanted of the map T, and let it be learned:

.. math:: \min_T \; S_ε\big(T(\text{colours of one}), \text{colours of the other}\big) + λ \, \|\text{curvature of } T\|^2 .

The Sinkhorn divergence S, zero if the two clouds are equal, says that the colours are right. The second term says that the map is smooth:
neighbouring colours stay neighbours, or the grain of a clear sky would be torn apart. The map is a table of 9 × 9 × 9 colours
with interpolation between them, which every camera and every editor of photographs can apply (a "3D LUT").

All methods see one half of each photograph, the white squares of a chessboard, and are judged on the other.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from skimage import color, data
from skimage.exposure import match_histograms
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import grid_sample
from tqdm.auto import tqdm

from difflayers.transport import sinkhorn, sinkhorn_divergence

parser = argparse.ArgumentParser(description="Colour transfer between two photographs: a map learned on the Sinkhorn divergence.")
parser.add_argument("--steps", type=int, default=120, help="training steps of the tables")
parser.add_argument("--smoothness", type=float, nargs="+", default=[1.0, 10.0, 100.0], help="weights of the curvature, one table each")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 12
    print("DIFFLAYERS_SHORT=1: 12 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The photographs
# ---------------
# Colours are compared in the Lab space, where distances are nearly as large as they look. A tenth here is 10 of its usual units,
# ΔE; a difference of 2 can just be seen.

SQUARE, BATCH, SAMPLE, JUDGED, EPSILON = 32, 128, 800, 500, 3e-3
TO_XYZ = torch.from_numpy(color.rgb2xyz(torch.eye(3).numpy())).float()
WHITE = TO_XYZ.sum(0)


def lab(rgb: Tensor) -> Tensor:
    """Lab / 100 of colours ``(*, 3)`` between 0 and 1, differentiable."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0.04) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ TO_XYZ / WHITE
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], -1)


def rgb_of(colours: Tensor) -> Tensor:
    """The nearest that a screen can show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there are colours which it cannot show
        return torch.from_numpy(color.lab2rgb(100 * colours.numpy())).float().clamp(0, 1)


def seen(photograph: Tensor) -> Tensor:
    """Which pixels a method may learn from: the white squares."""
    rows, columns = (torch.arange(size) // SQUARE for size in photograph.shape[:2])
    return (rows.unsqueeze(1) + columns) % 2 == 0


def draw(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return pixels[torch.randint(len(pixels), (count,), generator=generator)]


pagoda, coffee = (torch.from_numpy(image / 255.0).float() for image in (load_sample_image("china.jpg"), data.coffee()))
TASKS = {"pagoda, colours of the coffee": (pagoda, coffee), "coffee, colours of the pagoda": (coffee, pagoda)}

# %%
# The recipes
# -----------
# Two that know nothing of transport, and the usual one that does: solve for the plan between two samples of colours, and send every pixel
# to the mean of where the plan sends a colour like it. The potential g of the plan is all that this takes.


def mean_and_deviation(source: Tensor, target: Tensor) -> Tensor:
    """Reinhard et al. 2001, in Lab."""
    here, there = lab(source[seen(source)]), lab(target[seen(target)])
    return rgb_of((lab(source) - here.mean(0)) / here.std(0) * there.std(0) + there.mean(0))


def histograms(source: Tensor, target: Tensor) -> Tensor:
    """Each channel on its own, by scikit-image (which counts all the pixels of the source)."""
    matched = match_histograms(source.numpy(), target[seen(target)].unsqueeze(0).numpy(), channel_axis=-1)
    return torch.from_numpy(matched).float().clamp(0, 1)


def entropic_plan(source: Tensor, target: Tensor, epsilon: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    here, there = (lab(draw(photograph[seen(photograph)], SAMPLE, generator)) for photograph in (source, target))
    g = sinkhorn(torch.cdist(here, there) ** 2, epsilon=epsilon).g
    pixels = lab(source).reshape(-1, 3).split(20_000)
    mapped = [torch.softmax((g - torch.cdist(part, there) ** 2) / epsilon, -1) @ there for part in pixels]
    return rgb_of(torch.cat(mapped).reshape(source.shape))


# %%
# The table
# ---------
# What is learned is where each of the 729 colours of a grid moves to; between them the moves are interpolated. Here are tables for both
# directions and for three weights of the curvature, six in all. They are one batch: one call solves their transport problems, each to its
# own tolerance, and one backward pass differentiates the six divergences. That takes no linear system and no memory of the iterations.

GRID = 9


def apply_table(table: Tensor, colours: Tensor) -> Tensor:
    """Tables ``(B, 3, GRID, GRID, GRID)`` and colours ``(B, N, 3)``; results may leave the cube of colours."""
    place = (2 * colours - 1).flip(-1)[:, None, None]
    return colours + grid_sample(table, place, align_corners=True).reshape(len(table), 3, -1).mT


def curvature(table: Tensor) -> Tensor:
    """Mean square of the second derivatives along the three axes."""
    return sum(((GRID - 1) ** 2 * table.diff(n=2, dim=axis)).square().sum(1).mean((-3, -2, -1)) for axis in (2, 3, 4))


weights = torch.tensor(options.smoothness).repeat(len(TASKS))
table = torch.zeros(len(weights), 3, GRID, GRID, GRID, requires_grad=True)
optimizer = torch.optim.Adam([table], lr=0.03)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=options.steps, pct_start=0.1)
generator = torch.Generator().manual_seed(0)
with tqdm(range(options.steps), desc="six tables") as bar:
    for _ in bar:
        pairs = [[draw(p[seen(p)], BATCH, generator) for p in pair] for pair in TASKS.values() for _ in options.smoothness]
        here, there = (torch.stack(clouds) for clouds in zip(*pairs, strict=True))
        moved = apply_table(table, here)
        shown = moved.clamp(0, 1)
        distance = sinkhorn_divergence(lab(shown), lab(there), epsilon=EPSILON, tol=1e-3).value
        loss = distance + (moved - shown).square().sum(-1).mean(-1) + 1e-4 * weights * curvature(table)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"S = {distance.mean().item():.4f}", refresh=False)

# %%
# The judgement
# -------------
# Three numbers. The distance: the root of the divergence between colours of the other halves of both photographs, in ΔE. The spread of the
# contrasts: a map multiplies the gradient of Lab at a pixel by some factor, and this is the 90th percentile of the factors over the
# 10th; it is 1 for a map that changes all contrasts alike. And the grain: by how much the gradients of the flattest quarter have
# grown, relative to all gradients.


def gradients(photograph: Tensor) -> Tensor:
    values = lab(photograph)
    down, right = values[1:, :-1] - values[:-1, :-1], values[:-1, 1:] - values[:-1, :-1]
    return (down.square().sum(-1) + right.square().sum(-1)).sqrt()


def artefacts(source: Tensor, result: Tensor) -> tuple[float, float]:
    before, after = gradients(source), gradients(result)
    visible = before > 0.003
    factors = ((after[visible] + 1e-3) / (before[visible] + 1e-3)).log()
    low, high = factors.quantile(torch.tensor([0.1, 0.9])).tolist()
    flat = before <= before.quantile(0.25)
    return torch.tensor(high - low).exp().item(), (after[flat].mean() / before[flat].mean() * before.mean() / after.mean()).item()


results: dict[str, dict[str, Tensor]] = {}
scores: dict[str, dict[str, tuple[float, float, float]]] = {}
for row, (task, (source, target)) in enumerate(TASKS.items()):
    made = {
        "untouched": source,
        "mean and deviation": mean_and_deviation(source, target),
        "histograms": histograms(source, target),
        "plan, ε = 0.001": entropic_plan(source, target, 1e-3),
        "plan, ε = 0.01": entropic_plan(source, target, 1e-2),
    }
    for column, weight in enumerate(options.smoothness):
        one = table[row * len(options.smoothness) + column].detach().unsqueeze(0)
        made[f"learned, λ = {weight:g}"] = apply_table(one, source.reshape(1, -1, 3)).clamp(0, 1).reshape(source.shape)
    generator = torch.Generator().manual_seed(1)
    which = draw((~seen(source)).reshape(-1).nonzero().squeeze(-1), JUDGED, generator)
    wanted = lab(draw(target[~seen(target)], JUDGED, generator))
    clouds = [lab(result.reshape(-1, 3)[which]) for result in made.values()]
    clouds.append(lab(draw(target[seen(target)], JUDGED, generator)))
    *distances, floor = (100 * sinkhorn_divergence(torch.stack(clouds), wanted, epsilon=EPSILON).value.clamp(min=0).sqrt()).tolist()
    results[task] = made
    scores[task] = {name: (distance, *artefacts(source, result)) for (name, result), distance in zip(made.items(), distances, strict=True)}
    print(f"\n{task} (held-out squares; two samples of the target: {floor:.1f} ΔE)")
    print(f"{'':20}distance ΔE  contrasts ×  grain ×")
    for name, values in scores[task].items():
        print(f"{name:20}{values[0]:11.1f}{values[1]:13.1f}{values[2]:9.1f}")

# %%
# The results
# -----------
# Matching means and deviations does the least harm and the least good. Matching histograms knows nothing of colours, only of channels, and
# makes new ones that neither photograph has. The plan comes nearest to the colours, and tears the sky apart: it was solved for 800
# colours, and knows nothing of neighbours. A larger ε blurs it, and pays with the colours. The learned tables come close to the plan's
# colours at a fraction of its damage; and λ says how much of one is worth how much of the other.

SHOWN = (
    "untouched",
    "mean and deviation",
    "histograms",
    "plan, ε = 0.001",
    f"learned, λ = {options.smoothness[len(options.smoothness) // 2]:g}",
)
figure, axes = plt.subplots(len(TASKS), len(SHOWN) + 1, figsize=(22, 6), layout="constrained", width_ratios=[1] * len(SHOWN) + [1.3])
for axis_row, task in zip(axes, TASKS, strict=True):
    for axis, name in zip(axis_row, SHOWN, strict=False):
        axis.imshow(results[task][name])
        distance, contrasts, _ = scores[task][name]
        axis.set(title=f"{name}\n{distance:.1f} ΔE, contrasts × {contrasts:.1f}", xticks=[], yticks=[])
    for name, (distance, contrasts, _) in scores[task].items():
        learned = name.startswith("learned")
        axis_row[-1].plot(distance, contrasts, "o" if learned else "s", color="tab:red" if learned else "0.4")
        axis_row[-1].annotate(name, (distance, contrasts), fontsize=8, xytext=(5, 3), textcoords="offset points")
    axis_row[-1].set(xlabel="distance, ΔE", ylabel="spread of the contrasts", xscale="log", yscale="log", title=task)
    for axis, ticks in ((axis_row[-1].xaxis, (5, 10, 20, 50)), (axis_row[-1].yaxis, (1, 2, 5, 10, 20))):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_minor_locator(NullLocator())
    axis_row[-1].margins(x=0.3, y=0.1)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "colour_transfer.png", dpi=110)
print("figure saved: figures/colour_transfer.png")
