"""Derivatives on meshes beside ``torch.gradient``, and of coordinate networks beside nested reverse mode and ``torch.func.jacfwd``.

``python -m benchmarks.derivatives``. The functions are analytic, so the error is known: the largest, edges included, relative to the
largest value. A gradient is that of a weighted sum of the derivatives, in the values on the mesh or in the parameters of the network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from benchmarks.timing import Contestant, Table, describe_machine, one_thread, race
from difflayers.pde import chebyshev_derivative, chebyshev_points, coordinate_derivatives, finite_difference, spectral_derivative


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def with_gradient(derivative: Callable[[Tensor], Tensor], u: Tensor) -> Callable[[], Tensor]:
    leaf, weights = u.clone().requires_grad_(), torch.rand(u.shape)
    return lambda: torch.autograd.grad(derivative(leaf), leaf, weights)[0]


def meshes(short: bool) -> None:
    columns = [
        ("basis", 18),
        ("dim", -3),
        ("derivative", 41),
        ("error", -7),
        ("ms", -6),
        ("× ours", -6),
        ("with gradient", -13),
        ("× ours", -6),
    ]
    table = Table("The first derivative of a basis on a mesh; a copy of it is the floor", columns)
    shape = (2, 21, 64, 4) if short else (6, 101, 1024, 16)
    for dim in (1, 2):
        n = shape[dim]
        x = torch.arange(n) / (n - 1)
        gaps = torch.rand(n - 1, generator=torch.Generator().manual_seed(0)) + 0.5
        uneven = torch.cat([torch.zeros(1), gaps.cumsum(0) / gaps.sum()])
        across = [1] * len(shape)
        across[dim] = n
        phase = torch.rand([1 if i == dim else size for i, size in enumerate(shape)], generator=torch.Generator().manual_seed(1))

        def wave(x: Tensor, across: list[int] = across, phase: Tensor = phase) -> tuple[Tensor, Tensor]:
            angle = 4 * x.reshape(across) + phase
            return torch.sin(angle), 4 * torch.cos(angle)

        groups: list[tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]] = [
            (
                x,
                {
                    "ours": lambda u, dim=dim, n=n: finite_difference(u, 1 / (n - 1), dim=dim),
                    "ours, accuracy 4": lambda u, dim=dim, n=n: finite_difference(u, 1 / (n - 1), dim=dim, accuracy=4),
                    "torch.gradient, edge_order=2": lambda u, dim=dim, n=n: torch.gradient(u, spacing=1 / (n - 1), dim=dim, edge_order=2)[
                        0
                    ],
                    "clone": torch.clone,
                },
            ),
            (
                uneven,
                {
                    "ours": lambda u, dim=dim, x=uneven: finite_difference(u, x, dim=dim),
                    "torch.gradient, edge_order=2": lambda u, dim=dim, x=uneven: torch.gradient(u, spacing=(x,), dim=dim, edge_order=2)[0],
                },
            ),
        ]
        for points, derivatives in groups:
            u, exact = wave(points)
            contestants: dict[str, Contestant] = {name: lambda u=u, d=d: d(u) for name, d in derivatives.items()}
            forward = race(contestants, budget=4.0)
            both = race({name: with_gradient(d, u) for name, d in derivatives.items()}, budget=6.0)
            for name, derivative in derivatives.items():
                table.row(
                    str(shape),
                    dim,
                    name + (", coordinates" if points is uneven else ""),
                    None if name == "clone" else error(derivative(u), exact),
                    1e3 * forward.seconds(name),
                    forward.ratio(name, "ours"),
                    1e3 * both.seconds(name),
                    both.ratio(name, "ours"),
                )


def accuracies(short: bool) -> None:
    table = Table(
        "exp(sin 2πx) on one period: error and time of 64 functions", [("points", -6), ("derivative", 28), ("error", -7), ("ms", -7)]
    )
    for n in (16, 64) if short else (16, 32, 64, 256, 1024):
        x = torch.arange(n) / n
        ends = chebyshev_points(n, (0.0, 1.0))

        def wave(x: Tensor) -> tuple[Tensor, Tensor]:
            u = torch.exp(torch.sin(2 * math.pi * x)).expand(64, -1).contiguous()
            return u, 2 * math.pi * torch.cos(2 * math.pi * x) * u

        u, exact = wave(x)
        u_ends, exact_ends = wave(ends)
        runs: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
            f"finite_difference, accuracy {p}": (
                exact,
                lambda u=u, n=n, p=p: finite_difference(u, 1 / n, accuracy=p, boundary="periodic"),
            )
            for p in (2, 4, 8)
        }
        runs["spectral_derivative"] = exact, lambda u=u: spectral_derivative(u, 1.0)
        runs["chebyshev_derivative"] = exact_ends, lambda u=u_ends: chebyshev_derivative(u, (0.0, 1.0))
        times = race({name: run for name, (_, run) in runs.items()}, budget=1.0)
        for name, (true, run) in runs.items():
            table.row(n, name, error(run(), true), 1e3 * times.seconds(name))


def by_reverse_mode(network: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """u_t and u_xx, output by output."""
    p = points.detach().requires_grad_()
    firsts = [torch.autograd.grad(u.sum(), p, create_graph=True)[0] for u in network(p).unbind(-1)]
    seconds = [torch.autograd.grad(first[:, 1].sum(), p, create_graph=True)[0][:, 1] for first in firsts]
    return torch.stack([first[:, 0] for first in firsts], -1), torch.stack(seconds, -1)


def by_jacfwd(network: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """u_t and u_xx out of the whole Jacobian and Hessian."""

    def both(p: Tensor) -> tuple[Tensor, Tensor]:
        slope = jacfwd(network)(p)
        return slope, slope

    second, first = vmap(jacfwd(both, has_aux=True))(points)
    return first[..., 0], second[..., 1, 1]


def networks(short: bool) -> None:
    columns = [
        ("outputs", -7),
        ("derivatives", 22),
        ("difference", -10),
        ("ms", -6),
        ("× ours", -6),
        ("with gradient", -13),
        ("× ours", -6),
    ]
    table = Table("u_t and u_xx of a network of the coordinates, 2 – 64 – 64 – N, tanh", columns)
    points = torch.rand(100 if short else 2000, 2, generator=torch.Generator().manual_seed(0))
    for outputs in (1, 4) if short else (1, 4, 16):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))

        def ours(network: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
            found = coordinate_derivatives(network, points, [(0,), (1, 1)])
            return found[0,], found[1, 1]

        def reverse(network: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
            found = coordinate_derivatives(network, points, [(0,), (1, 1)], mode="reverse")
            return found[0,], found[1, 1]

        ways = {
            "ours": ours,
            **({"ours, reverse mode": reverse} if outputs == 1 else {}),
            "nested reverse mode": by_reverse_mode,
            "torch.func.jacfwd": by_jacfwd,
        }

        def step(way: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]], network: nn.Module = network) -> tuple[Tensor, ...]:
            u_t, u_xx = way(network, points)
            # The last bias is in neither derivative.
            return torch.autograd.grad((u_t - u_xx).square().mean(), list(network.parameters())[:-1])

        forward = race({name: lambda way=way, network=network: way(network, points) for name, way in ways.items()}, budget=3.0)
        both = race({name: lambda way=way, step=step: step(way) for name, way in ways.items()}, budget=3.0)
        exact = [part.detach() for part in by_reverse_mode(network, points)]
        for name, way in ways.items():
            difference = max(error(a.detach(), b) for a, b in zip(way(network, points), exact, strict=True))
            ratios = (forward.ratio(name, "ours"), both.ratio(name, "ours"))
            table.row(outputs, name, difference, 1e3 * forward.seconds(name), ratios[0], 1e3 * both.seconds(name), ratios[1])


def main(*, short: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine([])
    meshes(short)
    accuracies(short)
    networks(short)
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
