"""What must hold on two processes; each of them computes the answer of one process as well, and compares.

Run by ``torch.multiprocessing.spawn`` (:func:`spawned`) or by torchrun (as a script).
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from difflayers.errors import ShapeError
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


def run() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    check_slots()
    check_gathering()
    print("all checks passed", flush=True)


def spawned(rank: int, meeting_point: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    try:
        run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        run()
    finally:
        dist.destroy_process_group()
