r"""Activation matching: two units are the same if they answer alike to the same inputs.

With :math:`C_{ij}` the correlation, over inputs, between the output i of a layer of one network and the output j of the same layer of the
other, the permutation of a group of units maximizes :math:`\sum_i C_{i π(i)}`, summed over the layers whose outputs are these units: a
linear assignment. Which layers these are, the spec knows: a group that is the output side of the weight of a linear map, a convolution or a
normalization labels the channels of what that module returns, before the nonlinearity. Where the channels are a product of groups (heads ×
features), each group is assigned while the others are held, until nothing changes. Groups that no module puts out (in a weight that a
network multiplies by hand) are matched by their weights, once the others are known.

References: Li et al., Convergent learning, ICLR 2016, arXiv:1511.07543. Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023,
arXiv:2209.04836, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .assignment import assign
from .axes import Axis, Group, index, leaves, positions
from .matching import ascend, comparable, touching
from .running import inputs, kept_modes
from .signatures import exchangeable, outward
from .spec import PermutationSpec

__all__ = ["activation_matching"]

_ROUNDING = 1e-12  # of a correlation


class _Layer(NamedTuple):
    """A module whose output is made of groups of units: ``axis`` says how its dimension ``channels`` is."""

    module: nn.Module
    axis: Axis
    channels: int


def activation_matching(
    spec: PermutationSpec,
    model: nn.Module,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    loader: Iterable[Any],
) -> dict[str, Tensor]:
    """Permutations that bring b to a, by what their units answer to data.

    Args:
        spec: the symmetries of the network.
        model: the network, run in evaluation mode and left as it was.
        params_a: name → weight or buffer (``state_dict()``).
        params_b: the same names and shapes.
        loader: batches of inputs; of a tuple or list the first entry is the input. Labels are not needed.

    Returns:
        group → int64 ``(n,)``, on the CPU.

    Raises:
        ShapeError: the weights do not fit the spec.
        ValueError: no batch, or an activation that is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import PermutationSpec, activation_matching
        >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(50, 2)
        >>> spec = PermutationSpec.from_module(model, x)
        >>> permutations = spec.random()
        >>> renamed = spec.apply(model.state_dict(), permutations)
        >>> found = activation_matching(spec, model, model.state_dict(), renamed, [x])
        >>> torch.equal(found["0"], spec.inverse(permutations)["0"])
        True
    """
    observed = _correlations(spec, model, spec.apply(params_a, {}), spec.apply(params_b, {}), loader)
    seen = [group for group in spec.sizes if any(positions(axis, group) for axis, _ in observed)]
    found: dict[str, Tensor] = {}
    for group in seen:
        found[group] = assign(_similarity(group, spec.sizes[group], observed, found))
    changed = True
    while changed:  # ends, since each change raises the sum of the correlations
        changed = False
        for group in seen:
            M = _similarity(group, spec.sizes[group], observed, found)
            step, units = assign(M), torch.arange(len(M))
            if float(M[units, step].sum() - M[units, found[group]].sum()) > _ROUNDING * len(M):
                found[group], changed = step, True
    a, b = comparable(spec, params_a, params_b)
    unseen = {group: places for group, places in touching(spec, a).items() if group not in found}
    return ascend(spec, a, b, unseen, outward(spec, a, b, unseen, found), max_iter=100, generator=None)


def _correlations(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor], loader: Iterable[Any]
) -> list[tuple[Axis, Tensor]]:
    """For each layer that ran: what its channels are made of, and their correlations between a and b, ``(c, c)`` on the CPU."""
    layers = _layers(spec, model)
    moments = [_Moments() for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def recorder(calls: list[Tensor], channels: int) -> Callable[..., None]:
        # A copy: what follows may work in place.
        return lambda module, args, output: calls.append(output.detach().movedim(channels, 0).flatten(1).to(torch.float64, copy=True))

    hooks = [layer.module.register_forward_hook(recorder(calls, layer.channels)) for layer, calls in zip(layers, outputs, strict=True)]
    try:
        with kept_modes(model), torch.no_grad():
            model.eval()
            for batch in inputs(loader):
                seen = []
                for params in (a, b):
                    functional_call(model, params, (batch,))
                    seen.append([list(calls) for calls in outputs])
                    for calls in outputs:
                        calls.clear()
                for total, calls_a, calls_b in zip(moments, *seen, strict=True):
                    for x, y in zip(calls_a, calls_b, strict=True):
                        total.add(x, y)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer.axis, total.correlation()) for layer, total in zip(layers, moments, strict=True) if total.count]


class _Moments:
    """Sums over samples, from which correlations follow."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Samples ``(c, N)`` of both networks."""
        sums = [x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1), x @ y.mT]
        self.sums = [total + new for total, new in zip(self.sums, sums, strict=True)] if self.count else sums
        self.count += x.shape[1]

    def correlation(self) -> Tensor:
        """``(c, c)``, 0 for a unit that is constant."""
        mean_x, mean_y, square_x, square_y, product = (total / self.count for total in self.sums)
        if not product.isfinite().all():
            raise ValueError("an activation is not finite: the inputs or the weights of one of the networks are not")
        variances = (square_x - mean_x.square(), square_y - mean_y.square())
        scales = [
            torch.where(variance > 1e-12 * square, variance.clamp_min(0).rsqrt(), 0)
            for variance, square in zip(variances, (square_x, square_y), strict=True)
        ]
        return (scales[0][:, None] * (product - mean_x[:, None] * mean_y) * scales[1]).cpu()


def _layers(spec: PermutationSpec, model: nn.Module) -> list[_Layer]:
    """The modules whose output channels are known from a weight of theirs."""
    found = []
    for name, module in model.named_modules():
        key, dim, channels = "weight", 0, 1
        if isinstance(module, nn.Linear):
            channels = -1
        elif isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
            dim = channels = -1
        elif isinstance(module, _ConvTransposeNd):
            key, channels = "bias", -1 - len(module.kernel_size)
        elif isinstance(module, _ConvNd):
            channels = -1 - len(module.kernel_size)
        elif not isinstance(module, _NormBase | nn.GroupNorm):
            continue
        axes = spec.axes.get(f"{name}.{key}" if name else key)
        if axes is not None and any(isinstance(leaf, Group) for leaf in leaves(axes[dim])):
            found.append(_Layer(module, axes[dim], channels))
    return found


def _similarity(group: str, size: int, observed: Sequence[tuple[Axis, Tensor]], found: Mapping[str, Tensor]) -> Tensor:
    """``(n, n)``: the correlation of unit i of a with unit j of b, over all channels that belong to them, the other groups held."""
    others = {name: permutation for name, permutation in found.items() if name != group}
    M = torch.zeros(size, size, dtype=torch.float64)
    for axis, C in observed:
        for place in positions(axis, group):
            pairs = C[:, index(axis, others)][place[:, None, :, None], place[None, :, None, :]]  # (n, n, r, r)
            if len(exchangeable(axis, others)[place[0]].unique()) == place.shape[1]:
                M += pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
            else:  # the channels of a unit may still be exchanged: the best that can become of it
                M += torch.stack([block.gather(1, assign(block)[:, None]).sum() for block in pairs.flatten(0, 1)]).view(size, size)
    return M
