"""Skeletons: time and memory of forward and backward beside the soft skeleton, time beside scikit-image, and what is left of the topology.

``python -m benchmarks.morphology``. The soft skeleton is that of clDice with as many rounds (max pooling, as published). scikit-image has
no gradient; it peels until nothing changes, as ours does in the last rows. Betti errors are those of what is above ½, against the image.
Images that are small enough are also done in the published form, by convolutions (``benchmarks/published_skeleton.py``). Its gradient is
checked to be that of "reference" without noise, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.published_skeleton import published_skeleton
from benchmarks.timing import Table, describe_machine, installed, one_thread, peak_memory, race
from difflayers.morphology import betti_error, skeletonize, soft_skeletonize

ROUNDS = 5
LARGEST_PUBLISHED = 256**2  # voxels: a larger image takes it six seconds a step and more


def blobs(size: int, ndim: int, density: float) -> Tensor:
    """Smoothed noise above a quantile, as probabilities near 0 and 1."""
    field = torch.randn((1, 1, *(size,) * ndim), generator=torch.Generator().manual_seed(0))
    pool = functional.avg_pool2d if ndim == 2 else functional.avg_pool3d
    for _ in range(6):
        field = pool(field, 5, stride=1, padding=2)
    level = field.flatten().kthvalue(round((1 - density) * field.numel())).values
    return torch.where(field > level, 0.97, 0.03)


def step(skeleton: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Forward and backward."""
    leaf = image.clone().requires_grad_()
    skeleton(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def published(image: Tensor) -> Tensor:
    """The published form, cut at ½ without noise."""
    return published_skeleton((image > 0.5).to(image) + (image - image.detach()), ROUNDS)


def run(size: int, ndim: int, density: float, table: Table, budget: float) -> None:
    """The rows of one image."""
    image = blobs(size, ndim, density)
    binary = (image > 0.5).float()
    generator = torch.Generator().manual_seed(0)
    soft = partial(soft_skeletonize, num_iter=ROUNDS)
    differentiable: dict[str, Callable[[Tensor], Tensor]] = {
        "soft": soft,
        "reference": partial(skeletonize, num_iter=ROUNDS, generator=generator),
        "mask": partial(skeletonize, num_iter=ROUNDS, gradient="mask", generator=generator),
        "mask, no noise": partial(skeletonize, num_iter=ROUNDS, gradient="mask", probabilistic=False),
        "mask, to the end": partial(skeletonize, num_iter=None, gradient="mask", probabilistic=False),
    }
    if size**ndim <= LARGEST_PUBLISHED:
        differentiable["reference, no noise"] = partial(skeletonize, num_iter=ROUNDS, probabilistic=False)
        differentiable["published form"] = published
        if not torch.equal(step(published, image), step(differentiable["reference, no noise"], image)):
            raise AssertionError("the published form has another gradient")
    times = race({name: partial(step, skeleton, image) for name, skeleton in differentiable.items()}, budget=budget)
    case = f"{size}^{ndim}, {density:.0%}"
    for name, skeleton in differentiable.items():
        error = int(betti_error(skeleton(binary).detach(), binary).sum())
        memory = peak_memory(partial(step, skeleton, image)) / 2**20
        table.row(case, name, 1e3 * times.seconds(name), times.ratio(name, "soft"), memory, error)
    if installed("scikit-image"):
        from skimage.morphology import skeletonize as scikit

        plain, array = differentiable["mask, to the end"], binary[0, 0].numpy() > 0.5
        forward = race({"ours": partial(plain, image), "scikit-image": partial(scikit, array)}, budget=budget / 2)
        left = torch.from_numpy(scikit(array).astype("float32"))[None, None]
        table.row(case, "ours, forward", 1e3 * forward.seconds("ours"), None, None, 0)
        table.row(case, "scikit-image, forward", 1e3 * forward.seconds("scikit-image"), None, None, int(betti_error(left, binary).sum()))


def main(*, short: bool = False) -> None:
    """The whole table."""
    one_thread()
    describe_machine(["scikit-image"])
    columns = [("image, foreground", 18), ("skeleton", 22), ("ms", -8), ("times soft", -11), ("MiB", -7), ("Betti error", -12)]
    table = Table(f"skeletons, {ROUNDS} rounds, float32, forward + backward unless said", columns)
    sizes = (
        [(64, 2, 0.3), (16, 3, 0.3)]
        if short
        else [(64, 2, 0.3), (256, 2, 0.3), (512, 2, 0.3), (32, 3, 0.3), (64, 3, 0.3), (128, 3, 0.05), (128, 3, 0.3)]
    )
    for size, ndim, density in sizes:
        run(size, ndim, density, table, budget=0.5 if short else 8.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
