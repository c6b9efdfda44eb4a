r"""Experts spread over a process group: every process solves its own, and all of them get the whole answer.

Process r of W holds a run of the experts (its *slots*). The forward pass gathers what the others have found, by ``all_gather``. The
loss behind it is the same in every process, and so is the cotangent g of what was gathered. The backward pass communicates nothing:

.. math:: \bar x_r = W \, g_r,

g's own slots, times W. So the *mean* over the processes of the gradients of anything before the layer is the full gradient, which is
what ``DistributedDataParallel`` leaves in the parameters: the part of a process's gradient that flows through its experts is its share of
the full one, W-fold; a part that flows past them is the full one in every process.

Forward mode gathers tangents in the same way, so that jvp, and forward over reverse, are right too. Reverse over reverse would need
a sum over processes inside a backward pass, of gradients that nobody has averaged yet: it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

from ..errors import DiffLayersError, ShapeError

__all__ = ["Slots", "process_group"]


def process_group(group: Any) -> Any:
    """The process group that ``group`` names: itself, or that of a DeviceMesh with one dimension; None stays None.

    Raises:
        DiffLayersError: it is neither, or this process is not in it.
    """
    if group is None:
        return None
    if hasattr(group, "get_group"):
        group = group.get_group()
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)) or dist.get_rank(group) < 0:
        raise DiffLayersError(
            f"group={group!r} is not a process group that this process is in; call torch.distributed.init_process_group and pass "
            "torch.distributed.group.WORLD, a group of new_group, or a DeviceMesh with one dimension"
        )
    return group


class Slots:
    """Which process of a group has which experts.

    Args:
        experts: how many there are.
        group: the process group; None for one process, which has them all.

    Attributes:
        count: how many there are.
        counts: for each process how many experts it has; they differ by one at the most.
        own: the experts of this process.

    Raises:
        ShapeError: there are fewer experts than processes.
    """

    def __init__(self, experts: int, group: Any = None) -> None:
        processes, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if experts < processes:
            raise ShapeError(f"{experts} experts can't be spread over {processes} processes: cut the mesh into {processes} domains or more")
        self.count, self.group = experts, group
        self.counts = tuple(experts // processes + (r < experts % processes) for r in range(processes))
        start = sum(self.counts[:rank])
        self.own = slice(start, start + self.counts[rank])

    def gather(self, own: Tensor) -> Tensor:
        """``(*batch, E, K)`` in every process, from the ``(*batch, own experts, K)`` of each; differentiable as said above."""
        return own if self.group is None else _Gather.apply(own, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(own: Tensor, slots: Slots) -> Tensor:
        *batch, count, width = own.shape
        # Collectives want equal shapes.
        sent = own.new_zeros(*batch, max(slots.counts), width)
        sent[..., :count, :] = own
        received = [torch.empty_like(sent) for _ in slots.counts]
        dist.all_gather(received, sent, group=slots.group)
        return torch.cat([part[..., :count, :] for part, count in zip(received, slots.counts, strict=True)], -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slots = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _OwnSlots.apply(cotangents[0], ctx.slots), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        # Forward mode is off inside this rule, which would silently drop the tangents of outer levels.
        with forward_ad._set_fwd_grad_enabled(True):
            return _Gather.apply(tangents[0], ctx.slots)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Tensor, int]:
        own, slots = operands
        return _Gather.apply(own.movedim(in_dims[0], 0), slots), 0


class _OwnSlots(torch.autograd.Function):
    @staticmethod
    def forward(cotangent: Tensor, slots: Slots) -> Tensor:
        return cotangent[..., slots.own, :] * len(slots.counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slots = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise DiffLayersError(
            "reverse over reverse through experts on several processes is not available; take second derivatives in one process "
            "(group=None), or forward over reverse"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            return _OwnSlots.apply(tangents[0], ctx.slots)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Tensor, int]:
        cotangent, slots = operands
        return _OwnSlots.apply(cotangent.movedim(in_dims[0], 0), slots), 0
