r"""
Skeletons in pictures, and what they keep
=========================================

A skeleton is what is left of a shape when it is peeled until it is thin. It is worth something if it still tells what hangs together: as
many components as the shape, as many holes or tunnels, as many cavities. Those are its Betti numbers :math:`b_0, b_1, b_2`, and deleting
only *simple* voxels, one after the other, keeps all of them. Segmentation losses often take a soft skeleton instead, a chain of
minima and maxima that is differentiable by itself. Here both are looked at beside scikit-image, on the vessels of a retina, a page of
text, a horse, and in space on a knot, a hollow ball and a sponge.

The last picture shows what only a skeleton with a gradient can do: read the vessels' probabilities as probabilities, and send a derivative
back to each of them.

Reference: Menten et al., A skeletonization algorithm for gradient-based optimization, ICCV 2023, arXiv:2309.02527.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data, filters, measure
from skimage.morphology import skeletonize as scikit_skeletonize
from torch import Tensor
from torch.nn.functional import avg_pool3d
from tqdm.auto import tqdm

from difflayers.morphology import betti_numbers, skeleton_radius, skeletonize, soft_skeletonize

parser = argparse.ArgumentParser(description="Skeletons beside scikit-image's and soft ones.")
parser.add_argument("--samples", type=int, default=50, help="skeletons drawn from the vessels' probabilities")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.samples = 3
    print("DIFFLAYERS_SHORT=1: 3 skeletons of the vessels, to see that everything runs")
torch.set_num_threads(1)

# %%
# Shapes
# ------
# The vessels are the darkest ridges of the green channel of a photograph that comes with scikit-image.

photograph = data.retina()[30:1380, 30:1380, 1] / 255.0
fundus = measure.block_reduce(photograph, (3, 3), np.mean)
rows, columns = np.indices(fundus.shape)
disc = np.hypot(rows - 225, columns - 225) < 205
ridges = torch.from_numpy(filters.sato(fundus, sigmas=(1, 1.5, 2), black_ridges=True) * disc).float()
level = float(ridges[torch.from_numpy(disc)].quantile(0.9))
probabilities = torch.sigmoid(8 * (ridges / level - 1))


def page() -> Tensor:
    """The ink of a page, whose light comes from one side."""
    image = data.page()
    return torch.from_numpy(image < filters.threshold_local(image, 35, offset=15))


def knot(points: Tensor) -> Tensor:
    """A tube around a trefoil."""
    t = torch.linspace(0, 2 * torch.pi, 400)
    curve = torch.stack([torch.sin(3 * t), torch.sin(t) + 2 * torch.sin(2 * t), torch.cos(t) - 2 * torch.cos(2 * t)], -1)
    return torch.cdist(points.flatten(0, 2), 0.29 * curve).amin(1).reshape(points.shape[:3]) < 0.13


def sponge(size: int) -> Tensor:
    """Smoothed noise above its 60 % quantile."""
    field = torch.randn(1, 1, size, size, size, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        field = avg_pool3d(field, 5, stride=1, padding=2)
    return field[0, 0] > field.quantile(0.6)


axis = torch.linspace(-1, 1, 64)
points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
shell = ((points.norm(dim=-1) - 0.7).abs() < 0.2) & (points[..., 1:].norm(dim=-1) > 0.25)
hollow = (points.norm(dim=-1) - 0.65).abs() < 0.25
SHAPES = {
    "vessels": probabilities > 0.5,
    "page": page(),
    "horse": torch.from_numpy(~data.horse()),
    "knot": knot(points),
    "pierced ball": shell,
    "hollow ball": hollow,
    "sponge": sponge(40),
}

# %%
# Three skeletons
# ---------------
# All of them go on until nothing changes; the soft one takes as many rounds as the thickest shape needs.


def ours(shape: Tensor) -> Tensor:
    """As a bool."""
    return skeletonize(shape.float()[None, None], probabilistic=False, num_iter=None)[0, 0] > 0.5


def soft(shape: Tensor) -> Tensor:
    """What is above one half, after enough rounds for every shape here."""
    return soft_skeletonize(shape.float()[None, None], num_iter=40 if shape.dim() == 2 else 15)[0, 0] > 0.5


METHODS = {"skeletonize": ours, "scikit-image": lambda shape: torch.from_numpy(scikit_skeletonize(shape.numpy()) > 0), "soft": soft}


def betti(shape: Tensor) -> str:
    """Betti numbers, separated by spaces."""
    return " ".join(f"{number}" for number in betti_numbers(shape[None, None])[0, 0].tolist())


skeletons = {name: {method: run(shape) for method, run in METHODS.items()} for name, shape in tqdm(SHAPES.items())}
print(
    f"\nBetti numbers: components, holes; in space components, tunnels, cavities\n\n{'':14}{'shape':>14}"
    + "".join(f"{m:>16}" for m in METHODS)
)
for name, shape in SHAPES.items():
    print(f"{name:14}{betti(shape):>14}" + "".join(f"{betti(skeletons[name][method]):>16}" for method in METHODS))

# %%
# A soft skeleton falls apart where a shape gets wider, and a wall in space becomes a lattice. Ours and scikit-image's keep all the numbers
# here; where a thick wall is peeled, as in the pierced ball, ours keeps more of the ends that appear on the way, as spurs.

figure, axes = plt.subplots(len(SHAPES), 4, figsize=(13, 3.1 * len(SHAPES)), layout="constrained")
for panels, (name, shape) in zip(axes, SHAPES.items(), strict=True):
    for panel, (title, skeleton) in zip(panels, {"shape": shape, **skeletons[name]}.items(), strict=True):
        if shape.dim() == 2:
            panel.imshow(torch.where(skeleton, 1.0, 0.35 * shape).numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
        else:  # seen from one side, the nearer the brighter, before the shadow of the shape
            depth = torch.linspace(1, 0.45, shape.shape[0])[:, None, None]
            seen = (skeleton * depth).amax(0)
            panel.imshow(torch.where(seen > 0, seen, 0.2 * shape.any(0)).numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(f"{name}: {title}\nBetti numbers {betti(skeleton)}", fontsize=9)
        panel.set_axis_off()
here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "skeletons.png", dpi=110)

# %%
# Where the vessels are uncertain
# -------------------------------
# A grey image is made binary at random, and then peeled. The mean of many such skeletons says how sure each branch is. The gradient of
# their length, with the weights of a mask, says where a loss can act: on the skeletons and on the background, but not on the flesh of a
# vessel, which is deleted and so gets none.

generator = torch.Generator().manual_seed(0)
leaf = probabilities[None, None].expand(options.samples, -1, -1, -1).clone().requires_grad_()
drawn = skeletonize(leaf, num_iter=10, gradient="mask", generator=generator)
drawn.sum().backward()
assert leaf.grad is not None
mean, slope = drawn.detach().mean(0)[0], leaf.grad.mean(0)[0]
radius = skeleton_radius(skeletons["vessels"]["skeletonize"][None, None].float(), SHAPES["vessels"][None, None].float())[0, 0]
print(f"\nlength of the vessels' skeleton: {drawn.detach().sum((1, 2, 3)).mean():.1f} ± {drawn.detach().sum((1, 2, 3)).std():.1f} pixels")
print(f"radius along it: median {radius[radius > 0].median():.2f}, at most {radius.max():.2f} pixels")

figure, axes = plt.subplots(2, 2, figsize=(11, 11), layout="constrained")
pictures = {
    "photograph, green channel": (fundus, "gray"),
    "mean of the skeletons": (mean.sqrt(), "magma"),
    "gradient of their length": (slope, "magma"),
    "radius along the skeleton": (torch.where(radius > 0, radius, torch.nan), "viridis"),
}
for panel, (title, (picture, colours)) in zip(axes.flat, pictures.items(), strict=True):
    panel.imshow(np.asarray(picture), cmap=colours, interpolation="nearest")
    panel.set_title(title)
    panel.set_axis_off()
figure.savefig(here / "figures" / "skeletons_vessels.png", dpi=110)
print("figures saved: figures/skeletons.png, figures/skeletons_vessels.png")
