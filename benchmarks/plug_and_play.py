"""Plug-and-play differentiated by the implicit function theorem, and by unrolling: time, memory, and how wrong image and gradient are.

``python -m benchmarks.plug_and_play``. A batch of blurred random images is reconstructed with a convolutional denoiser, and a loss of the
result is differentiated in the weights of the denoiser and in the blur kernel: forward and backward, float64, one thread. The denoiser is
a gradient step on a convex function, x − σ(c x + Wᵀ tanh(W x)), so that all algorithms converge. The errors are those of the image and of
the gradient in all parameters, relative to the largest entry, against a plain loop of 400 steps of proximal gradient through which
autograd goes, one image at a time ("hqs" has its own loop, since it stops elsewhere). "implicit" stops at 1e-10, or where it says.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Table, describe_machine, one_thread, peak_memory, race
from difflayers.prox import L2, Blur, PlugAndPlay

__all__ = ["main"]

_STEPSIZE, _LONG = 0.9, 400
_COLUMNS = [("algorithm", 9), ("by", 16), ("steps", -6), ("ms", -7), ("MB", -7), ("image error", -11), ("gradient error", -14)]


class Denoiser(nn.Module):
    """x − σ(c x + Wᵀ tanh(W x)) with W a convolution: firmly nonexpansive."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(channels, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        """The denoised x."""
        hidden = torch.tanh(nn.functional.conv2d(x, self.weight, padding=1))
        return x - sigma * (0.05 * x + nn.functional.conv_transpose2d(hidden, self.weight, padding=1))


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    describe_machine([])
    size, batch, steps, budget = (8, 2, (10,), 0.1) if short else (32, 4, (10, 30, 100, 300), 6.0)
    algorithms = ("pgd", "admm") if short else ("pgd", "fista", "hqs", "admm", "drs")
    table = Table(f"Deblurring {batch} images of {size} × {size}: implicit and unrolled", _COLUMNS)
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, size, size, generator=draw, dtype=torch.float64)
    kernel = nn.Parameter(torch.outer(*[torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)] * 2))
    problem = Problem(Denoiser(), kernel, image)
    splitting, half_quadratic = problem.by_loop("pgd"), problem.by_loop("hqs")
    for algorithm in algorithms:
        exact = half_quadratic if algorithm == "hqs" else splitting
        ways = {"implicit": {"tol": 1e-10}, "implicit, 1e-4": {"tol": 1e-4}}
        if algorithm != "fista":
            ways["anderson"] = {"tol": 1e-10, "solver": "anderson"}
        ways |= {f"unrolled, {count}": {"backward": "unroll", "max_iter": count, "tol": float("inf")} for count in steps}
        layers = {name: problem.layer(algorithm, **options) for name, options in ways.items()}
        times = race({name: lambda layer=layer: problem.gradient(layer) for name, layer in layers.items()}, budget=budget)
        for name, layer in layers.items():
            found, slope, count = problem.gradient(layer)
            megabytes = peak_memory(lambda layer=layer: problem.gradient(layer)) / 1e6
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip((found, slope), exact, strict=True)]
            table.row(algorithm, name, count, 1e3 * times.seconds(name), megabytes, *errors)


class Problem:
    """What is reconstructed, and with which denoiser."""

    def __init__(self, denoiser: Denoiser, kernel: nn.Parameter, image: Tensor) -> None:
        self.denoiser, self.kernel, self.image = denoiser, kernel, image
        self.y = Blur(kernel.detach()).A(image)
        self.sigma = 0.5

    def layer(self, algorithm: str, **options: Any) -> PlugAndPlay:
        """One contestant, with weights of its own."""
        fidelity = L2(Blur(copy.deepcopy(self.kernel)))
        return PlugAndPlay(
            algorithm, copy.deepcopy(self.denoiser), fidelity, _STEPSIZE, self.sigma, max_iter=options.pop("max_iter", 5000), **options
        )

    def gradient(self, layer: PlugAndPlay) -> tuple[Tensor, Tensor, int]:
        """The image, the gradient in all parameters as one vector, and the steps of the slowest image."""
        found = layer.solve(self.y)
        slopes = torch.autograd.grad(self.loss(found.x), [layer.denoiser.weight, layer.data_fidelity.operator.kernel])
        return found.x.detach(), torch.cat([slope.flatten() for slope in slopes]), int(found.iterations.max())

    def loss(self, x: Tensor) -> Tensor:
        """The squared error."""
        return (x - self.image).square().sum()

    def by_loop(self, algorithm: str) -> tuple[Tensor, Tensor]:
        """Image and gradient by autograd through a long loop, one image at a time."""
        images, total = [], torch.zeros(self.denoiser.weight.numel() + self.kernel.numel(), dtype=self.y.dtype)
        fidelity = L2(Blur(self.kernel))
        for y, truth in zip(self.y.split(1), self.image.split(1), strict=True):
            x = fidelity.start(y).detach()
            for _ in range(_LONG):
                x = fidelity.prox(x, y, gamma=_STEPSIZE) if algorithm == "hqs" else x - _STEPSIZE * fidelity.grad(x, y)
                x = self.denoiser(x, self.sigma)
            slopes = torch.autograd.grad((x - truth).square().sum(), [self.denoiser.weight, self.kernel])
            images.append(x.detach())
            total += torch.cat([slope.flatten() for slope in slopes])
        return torch.cat(images), total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
