r"""The loss along the line between two networks, and the BatchNorm statistics of the networks on it.

With :math:`θ_λ = (1-λ)\,θ_A + λ\,θ_B`, the barrier between two networks is

.. math::  \max_{λ ∈ [0, 1]} L(θ_λ) - (1-λ)\,L(θ_A) - λ\,L(θ_B),

on an even grid of λ that includes both ends, so that it is never negative. It is 0 where the line runs through one basin.

A network on the line has the average of two sets of BatchNorm statistics, and those are not its own: its hidden units have smaller
variances than either, and the loss says more about that than about the weights. :func:`repair_batchnorm` measures the statistics anew.

References: Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, ICML 2020, arXiv:1912.05671. Jordan et al., REPAIR:
REnormalizing Permuted Activations for Interpolation Repair, ICLR 2023, arXiv:2211.08403.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ShapeError
from .running import inputs, kept_modes

__all__ = ["LossCurve", "barrier", "interpolate", "loss_curve", "repair_batchnorm"]


class LossCurve(NamedTuple):
    """The loss along the line between two networks.

    Attributes:
        lambdas: float64 ``(points,)``, from 0 (the first network) to 1 (the second).
        losses: float64 ``(points,)``.
    """

    lambdas: Tensor
    losses: Tensor

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its ends; NaN if a loss is NaN."""
        straight = (1 - self.lambdas) * self.losses[0] + self.lambdas * self.losses[-1]
        return float((self.losses - straight).max())


def barrier(
    model: nn.Module,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module], Any],
    points: int = 25,
    *,
    repair: Iterable[Any] | None = None,
) -> float:
    """The barrier between two networks. Arguments as in :func:`loss_curve`, whose ``.barrier`` it is.

    Args:
        model: the network.
        params_a: its weights at λ = 0.
        params_b: its weights at λ = 1.
        loss_fn: the loss of a network.
        points: how many values of λ.
        repair: a loader of inputs, for networks with BatchNorm.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import barrier
        >>> model = nn.Linear(1, 1, bias=False)
        >>> a, b = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[1.0]])}
        >>> barrier(model, a, b, lambda model: 1 - model.weight.square().sum())
        1.0
    """
    return loss_curve(model, params_a, params_b, loss_fn, points, repair=repair).barrier


def loss_curve(
    model: nn.Module,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module], Any],
    points: int = 25,
    *,
    repair: Iterable[Any] | None = None,
) -> LossCurve:
    """The loss at evenly spaced points of the line from one network to another. The model, its mode included, is left as it was.

    Args:
        model: the network. ``loss_fn`` sees it in the mode that it is in: call ``model.eval()`` first where that matters.
        params_a: name → weight or buffer at λ = 0 (``state_dict()``). What is not there stays as in the model.
        params_b: the same names at λ = 1, as from :meth:`PermutationSpec.apply <difflayers.rebasin.PermutationSpec.apply>`.
        loss_fn: ``loss_fn(model)``, a float or a tensor of one entry. No gradient is recorded.
        points: how many values of λ, 2 or more.
        repair: a loader of inputs. At each λ, the ends included, :func:`repair_batchnorm` reads it once before the loss is asked.

    Raises:
        ShapeError: the two networks differ in names or shapes, or do not fit the model.
        ValueError: fewer than two points, or nothing to repair.
    """
    if points < 2:
        raise ValueError(f"points must be 2 or more, both ends are among them; got {points}")
    lambdas, losses = torch.linspace(0, 1, points, dtype=torch.float64), []
    # Copies: `model.state_dict()` as an end would change with the model.
    a, b = ({name: tensor.detach().clone() for name, tensor in params.items()} for params in (params_a, params_b))
    with torch.no_grad(), _restored(model):
        for lam in lambdas.tolist():
            _load(model, interpolate(a, b, lam))
            if repair is not None:
                repair_batchnorm(model, repair)
            losses.append(float(loss_fn(model)))
    return LossCurve(lambdas, torch.tensor(losses, dtype=torch.float64))


def interpolate(params_a: Mapping[str, Tensor], params_b: Mapping[str, Tensor], lam: float | Tensor) -> dict[str, Tensor]:
    """The network (1 − λ) a + λ b. Differentiable in both and in λ.

    Args:
        params_a: name → weight or buffer. Those that are not floating point, such as counters, are taken from here.
        params_b: the same names and shapes.
        lam: λ, a number or a tensor of one entry; 0.5 is the average of the two.

    Raises:
        ShapeError: names or shapes differ.
    """
    if params_a.keys() != params_b.keys():
        differing = sorted(params_a.keys() ^ params_b.keys())
        raise ShapeError(f"the two networks must have the same names; only one of them has {', '.join(differing)}")
    found = {}
    for name, a in params_a.items():
        b = params_b[name].to(a.device)
        if a.shape != b.shape:
            raise ShapeError(f"{name} has the shape {tuple(a.shape)} in one network and {tuple(b.shape)} in the other")
        weight = lam.to(a) if isinstance(lam, Tensor) else lam
        found[name] = torch.lerp(a, b.to(a.dtype), weight) if a.is_floating_point() else a
    return found


def repair_batchnorm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Measures the running statistics of all BatchNorm layers anew, in place, as the average over the batches of a loader.

    Weights do not change, and neither do momentum and mode. All other layers are in evaluation mode meanwhile: no dropout. Each
    batch counts alike, so a last batch of a few inputs is better dropped (``drop_last=True``).

    Args:
        model: a network with ``BatchNorm1d``, ``2d`` or ``3d`` layers.
        loader: batches of inputs; of a tuple or list the first entry is the input. Read once.

    Raises:
        ValueError: there is no BatchNorm with running statistics, or no batch. The statistics are as before then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import repair_batchnorm
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> repair_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> model[0].running_mean
        tensor([4.])
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        raise ValueError("the model has no BatchNorm layer with running statistics: there is nothing to repair, leave `repair` out")
    before = [{name: tensor.clone() for name, tensor in norm.state_dict().items()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        with kept_modes(model), torch.no_grad():
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # which means the average over all calls
                norm.train()
            for batch in inputs(loader):
                model(batch)
    except BaseException:
        for norm, statistics in zip(norms, before, strict=True):
            norm.load_state_dict(statistics)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def _restored(model: nn.Module) -> Generator[None]:
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    try:
        with kept_modes(model):
            yield
    finally:
        _load(model, kept)


def _load(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name, tensor in params.items():
        if name not in own:
            raise ShapeError(f"the model has no weight or buffer {name!r}; it has {', '.join(own)}")
        if own[name].shape != tensor.shape:
            raise ShapeError(f"{name} has the shape {tuple(own[name].shape)} in the model and {tuple(tensor.shape)} in the network given")
    with torch.no_grad():
        for name, tensor in params.items():
            own[name].copy_(tensor)
