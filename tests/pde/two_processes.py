"""What must hold on two processes; each of them computes the answer of one process as well, and compares.

Run by ``torch.multiprocessing.spawn`` (:func:`spawned`: all checks) or by torchrun (as a script: a training step).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.pde import HardConstraint, MixtureOfConstraints, dirichlet, finite_difference
from difflayers.pde.sharding import Slots


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.stack(parts).sum(0)


def check_slots() -> None:
    slots = Slots(5, dist.group.WORLD)
    assert slots.counts == (3, 2)
    assert slots.own == (slice(0, 3), slice(3, 5))[dist.get_rank()]
    with pytest.raises(ShapeError, match="1 experts can't be spread over 2"):
        Slots(1, dist.group.WORLD)


def check_gathering() -> None:
    """The mean over the processes of the gradients is the gradient."""
    slots, full = Slots(5, dist.group.WORLD), randn(0, 2, 5, 3)
    own = full[:, slots.own].clone().requires_grad_()
    gathered = slots.gather(own)
    assert torch.equal(gathered, full)
    share = torch.zeros_like(full)
    share[:, slots.own] = torch.autograd.grad(gathered.square().prod(-1).sum(), own)[0]
    torch.testing.assert_close(summed(share) / 2, 2 * full.square().prod(-1, keepdim=True) / full)


class Network(nn.Module):
    """Initial values ``(batch, points)`` → basis functions ``(batch, points, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(POINTS, 2 * POINTS, dtype=torch.float64)

    def forward(self, u0: Tensor) -> Tensor:
        return torch.sin(3 * self.linear(u0)).unflatten(-1, (POINTS, 2))


POINTS = 11
PARTITION = ((4, 4, 3),)  # three experts: two in one process, one in the other


def features(basis: Tensor, u0: Tensor) -> dict[str, Tensor]:
    return {"u": basis, "u_x": finite_difference(basis, 0.3, dim=-2)}


def residual(z: dict[str, Tensor], u0: Tensor) -> Tensor:
    return z["u_x"] + z["u"] ** 2 - u0


def mixture(group: dist.ProcessGroup | None, interface_weight: float = 0.0, **options: Any) -> MixtureOfConstraints:
    constraint = HardConstraint(residual, features=features, rows=[dirichlet(0.5, dim=0)], **({"ridge": 0.1, "tol": 1e-12} | options))
    return MixtureOfConstraints(constraint, PARTITION, interface_weight=interface_weight, group=group)


def gradient(network: nn.Module, layer: MixtureOfConstraints, u0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The field, and the gradient of a loss on the field and on the basis itself."""
    network.zero_grad()
    basis = network(u0)
    u = layer(basis, u0, **options)
    (u.sin().sum() + 0.1 * basis.square().sum()).backward()
    return u.detach(), torch.cat([parameter.grad.flatten().clone() for parameter in network.parameters()])


def close(values: Tensor, exact: Tensor) -> None:
    assert float((values - exact).norm()) <= 1e-10 * float(exact.norm())


def check_training_step() -> None:
    """Experts on two processes under DistributedDataParallel have the gradient of one, with sampled points and coupled experts, too."""
    network, u0 = Network(), randn(1, 2, POINTS)
    parallel = DistributedDataParallel(Network())
    for options in ({}, {"points": 6}, {"interface_weight": 0.7}, {"interface_weight": 0.7, "on_failure": "nan"}):
        exact, found = (
            gradient(net, mixture(group, **options), u0, generator=torch.Generator().manual_seed(2))
            for net, group in ((network, None), (parallel, dist.group.WORLD))
        )
        close(found[0], exact[0])
        close(found[1], exact[1])


def check_solutions_are_the_same_everywhere() -> None:
    basis, u0 = Network()(randn(1, 2, POINTS)).detach(), randn(1, 2, POINTS)
    for interface_weight in (0.0, 0.7):
        alone, found = (mixture(group, interface_weight).solve(basis, u0) for group in (None, dist.group.WORLD))
        for part, other in zip(found, alone, strict=True):
            assert part.dtype == other.dtype
            torch.testing.assert_close(part, other, rtol=1e-10, atol=1e-10)
        assert torch.equal(summed(found.weights), 2 * found.weights)


def check_failures_are_heard_everywhere() -> None:
    """A bad expert of the first process: both raise, and neither waits for the other."""
    basis, u0 = Network()(randn(1, 2, POINTS)).detach(), randn(1, 2, POINTS)
    u0[1, 0] = torch.nan
    group = dist.group.WORLD
    with pytest.raises(NotConvergedError) as caught:
        mixture(group)(basis, u0)
    assert caught.value.indices == [(1, 0)]
    with pytest.raises(NotConvergedError) as caught:
        mixture(group, 0.7)(basis, u0)
    assert caught.value.indices == [(1,)]
    u = mixture(group, on_failure="nan")(basis, u0)
    assert u.isnan().sum() == 4
    torch.testing.assert_close(u, mixture(None, on_failure="nan")(basis, u0), rtol=1e-10, atol=1e-10, equal_nan=True)


def run(*checks: Callable[[], None]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # as in pyproject.toml
    torch.set_num_threads(1)
    try:
        for check in checks:
            check()
        print("all checks passed", flush=True)
    finally:
        dist.destroy_process_group()


def spawned(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    run(check_slots, check_gathering, check_training_step, check_solutions_are_the_same_everywhere, check_failures_are_heard_everywhere)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(check_training_step)
