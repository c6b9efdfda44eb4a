r"""What a re-basin makes small: the three objectives of Sinkhorn re-basin.

With the weights :math:`π(θ_A)` of the permuted network and :math:`θ_B` of the target,

.. math::
    ‖π(θ_A) - θ_B‖^2, \qquad
    L\bigl(\tfrac12 π(θ_A) + \tfrac12 θ_B\bigr), \qquad
    L\bigl((1-λ)\,π(θ_A) + λ\,θ_B\bigr),\; λ \sim U(0, 1).

The first needs no data. The other two lower the loss of networks on the line, which is what the barrier measures. They evaluate the
interpolated network by ``torch.func.functional_call``, so that they are differentiable in both ends, to any order.

BatchNorm layers normalize by the statistics of the batch at the interpolated point, whatever the mode of the model: running statistics
belong to the ends of the line, and an average of them to no network at all. All other layers stay in the mode of the model.

Reference: Peña et al., Re-basin via implicit Sinkhorn differentiation, CVPR 2023, arXiv:2212.12042.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..errors import ShapeError
from .barrier import interpolate
from .running import STATISTICS

__all__ = ["L2Objective", "MidpointObjective", "RandomPointObjective", "l2_distance"]


def l2_distance(params: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """The squared Euclidean distance ‖params − target‖² of two networks, a scalar. Differentiable in both.

    Counters and the running statistics of normalization layers do not count: they are no weights.

    Args:
        params: name → weight, as from :class:`~difflayers.rebasin.SinkhornRebasin`.
        target: the same names and shapes.

    Raises:
        ShapeError: names or shapes differ.

    Example:
        >>> import torch
        >>> from difflayers.rebasin import l2_distance
        >>> l2_distance({"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.0, 5.0])})
        tensor(9.)
    """
    if params.keys() != target.keys():
        raise ShapeError(f"the networks must have the same names; only one of them has {', '.join(sorted(params.keys() ^ target.keys()))}")
    total = torch.zeros(())
    for name, tensor in params.items():
        if tuple(tensor.shape) != tuple(target[name].shape):
            raise ShapeError(f"{name} has the shape {tuple(tensor.shape)} in one network and {tuple(target[name].shape)} in the other")
        if tensor.is_floating_point() and name.rpartition(".")[-1] not in STATISTICS:
            total = total.to(tensor) + (tensor - target[name].to(tensor)).square().sum()
    return total


class L2Objective:
    """The squared distance to the target, :func:`l2_distance`. A batch, if one is given, does not matter.

    Args:
        target_params: name → weight or buffer of the target (``state_dict()``).

    Example:
        >>> import torch
        >>> from difflayers.rebasin import L2Objective
        >>> objective = L2Objective({"weight": torch.ones(3)})
        >>> objective({"weight": torch.zeros(3)})
        tensor(3.)
    """

    def __init__(self, target_params: Mapping[str, Tensor]) -> None:
        self.target_params = dict(target_params)

    def __call__(self, params: Mapping[str, Tensor], *batch: Any) -> Tensor:
        """The scalar objective of the permuted weights."""
        return l2_distance(params, self.target_params)


class MidpointObjective:
    """The loss of the network halfway between the permuted one and the target.

    Args:
        model: the network, for its structure and its mode. It is copied, never changed.
        target_params: name → weight or buffer of the target (``state_dict()``).
        loss_fn: ``loss_fn(network, *batch) -> scalar``, with a network that can be called like the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import MidpointObjective
        >>> model = nn.Linear(2, 1, bias=False)
        >>> objective = MidpointObjective(model, {"weight": torch.tensor([[2.0, 0.0]])}, lambda network, x: network(x).sum())
        >>> objective({"weight": torch.tensor([[0.0, 2.0]])}, torch.tensor([[1.0, 3.0]]))
        tensor(4.)
    """

    def __init__(self, model: nn.Module, target_params: Mapping[str, Tensor], loss_fn: Callable[..., Tensor]) -> None:
        self.target_params = dict(target_params)
        network = copy.deepcopy(model).requires_grad_(False)
        for module in network.modules():
            if isinstance(module, _NormBase):
                # Without running statistics a layer takes those of the batch, in either mode.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self._loss = _Loss(network, loss_fn)
        self._names = {name.removeprefix("network.") for name in self._loss.state_dict()}

    def __call__(self, params: Mapping[str, Tensor], *batch: Any) -> Tensor:
        """The scalar objective of the permuted weights on a batch."""
        return self.at(params, 0.5, *batch)

    def at(self, params: Mapping[str, Tensor], lam: float | Tensor, *batch: Any) -> Tensor:
        """The loss of the network (1 − λ) params + λ target on a batch.

        Args:
            params: name → weight or buffer, the names of the target.
            lam: λ, a number or a tensor of one entry.
            *batch: what ``loss_fn`` takes after the network.

        Raises:
            ShapeError: names or shapes of params and target differ.
        """
        between = interpolate(params, self.target_params, lam)
        given = {f"network.{name}": tensor for name, tensor in between.items() if name in self._names}
        # Tied weights are interpolated one by one to equal values: there is nothing left to tie.
        return functional_call(self._loss, given, batch, tie_weights=False)


class RandomPointObjective(MidpointObjective):
    """The loss of the network at a random point of the line, drawn anew at each call: its mean is the mean loss along the line.

    Args:
        model: as in :class:`MidpointObjective`.
        target_params: as in :class:`MidpointObjective`.
        loss_fn: as in :class:`MidpointObjective`.
        generator: source of randomness, on the CPU.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import RandomPointObjective
        >>> target = {"weight": torch.tensor([[1.0]])}
        >>> objective = RandomPointObjective(
        ...     nn.Linear(1, 1, bias=False), target, lambda network, x: network(x).sum(), generator=torch.Generator().manual_seed(0)
        ... )
        >>> float(objective({"weight": torch.tensor([[0.0]])}, torch.tensor([[1.0]])))  # λ
        0.496...
    """

    def __init__(
        self,
        model: nn.Module,
        target_params: Mapping[str, Tensor],
        loss_fn: Callable[..., Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, target_params, loss_fn)
        self.generator = generator

    def __call__(self, params: Mapping[str, Tensor], *batch: Any) -> Tensor:
        """The scalar objective of the permuted weights on a batch, at a λ of its own."""
        return self.at(params, float(torch.rand((), generator=self.generator)), *batch)


class _Loss(nn.Module):
    """A loss of a network as a module, so that ``functional_call`` swaps the weights of the network inside it."""

    def __init__(self, network: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.loss_fn = network, loss_fn

    def forward(self, *batch: Any) -> Tensor:
        return self.loss_fn(self.network, *batch)
