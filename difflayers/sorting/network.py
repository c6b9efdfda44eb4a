r"""Differentiable sorting networks: every comparator of a sorting network is a relaxed swap.

With the shares :math:`q_l` that the comparators of layer l swap, and :math:`S_l^T y` the differences of the pairs that they compare, the
network is

.. math:: P^T = \prod_{l = L}^{1} \bigl(I - S_l \operatorname{diag}(q_l)\, S_l^T\bigr), \qquad \mathrm{values} = P^T x,

a relaxed permutation matrix, doubly stochastic. The shares depend on x: the values are the solution of a triangular system
(:mod:`difflayers.sorting.values`). Given the shares, payloads :math:`P^T y` and ranks :math:`P\,(1, …, n)^T` run through the network
without P (:mod:`difflayers.sorting.carry`), and P of a bitonic network is a product of small blocks
(:mod:`difflayers.sorting.butterfly`).

References: Petersen, Borgelt, Kuehne and Deussen, Differentiable sorting networks for scalable sorting and ranking supervision, ICML
2021, arXiv:2105.04019; Monotonic differentiable sorting networks, ICLR 2022, arXiv:2203.09630.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..convex.projections.arguments import check_rows
from ..errors import ShapeError
from .butterfly import bitonic_permutation
from .carry import carry
from .comparators import Wiring, bitonic, odd_even
from .relaxations import DISTRIBUTIONS, ConditionalSwap
from .values import sorted_values

__all__ = ["SortResult", "SortingNetwork"]

_NETWORKS = {"bitonic": bitonic, "odd_even": odd_even}


class SortResult(NamedTuple):
    """Sorted values and the relaxed permutation that sorts: ``values = x @ permutation``.

    Attributes:
        values: ``(*batch, n)``.
        permutation: ``(*batch, n, n)``; entry (i, j) is the weight of input i in output j. Rows and columns sum to one.
    """

    values: Tensor
    permutation: Tensor


class SortingNetwork(nn.Module):
    """A differentiable sorting network.

    The values are a relaxation: they sum to the sum of the inputs and stay within their range, but they are not promised to be in order.
    The steeper, the closer to sorting and the smaller the gradients of inputs that are far apart; a steepness that grows with the size
    is usual. ``cauchy``, ``reciprocal`` and ``optimal`` are monotone: no derivative of a value in an input is negative.

    Args:
        size: n, how many values are sorted; any number for both networks.
        network: ``"bitonic"``, with about log₂(n)²/2 layers, or ``"odd_even"``, with n.
        distribution: ``"cauchy"``, ``"logistic"``, ``"logistic_phi"``, ``"gaussian"``, ``"reciprocal"`` or ``"optimal"``.
        steepness: s, the inverse of a temperature, in units of one over the inputs'.
        art_lambda: λ in [0, 1) of ``logistic_phi``, the activation replacement trick.
        descending: the largest value first; the mirror image of sorting −x.

    Shapes: x is ``(*batch, size)``. A row that is not finite gives a row of NaN, with zero gradient.

    Example:
        >>> import torch
        >>> from difflayers import SortingNetwork
        >>> layer = SortingNetwork(3, steepness=20.0)
        >>> x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
        >>> values, permutation = layer.sort(x)
        >>> values.detach()
        tensor([1.0318, 2.0000, 2.9682])
        >>> torch.autograd.grad(permutation[1, 0], x)[0]    # the weight of the second input in the first place
        tensor([ 0.0039, -0.0197,  0.0157])
        >>> layer.rank(x).detach()
        tensor([2.9679, 1.0316, 2.0005])

    References: Petersen, Borgelt, Kuehne and Deussen, Differentiable sorting networks for scalable sorting and ranking supervision,
    ICML 2021; Monotonic differentiable sorting networks, ICLR 2022.
    """

    def __init__(
        self,
        size: int,
        network: str = "bitonic",
        distribution: str = "cauchy",
        steepness: float = 10.0,
        art_lambda: float = 0.25,
        descending: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive int, the number of values to sort, got {size!r}")
        if network not in _NETWORKS:
            raise ValueError(f"the network {network!r} is not known; choose one of {', '.join(map(repr, _NETWORKS))}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"the distribution {distribution!r} is not known; choose one of {', '.join(map(repr, DISTRIBUTIONS))}")
        if not 0 < steepness < float("inf"):
            raise ValueError(f"steepness must be positive and finite, got {steepness}")
        if not 0 <= art_lambda < 1:
            raise ValueError(f"art_lambda must be in [0, 1), got {art_lambda}: from 1 on the swap would not get steeper with the distance")
        self.size, self.network, self.distribution = size, network, distribution
        self.steepness, self.art_lambda, self.descending = float(steepness), float(art_lambda), descending
        self._wiring: Wiring = _NETWORKS[network](size)
        self._swap = ConditionalSwap(distribution, self.steepness, self.art_lambda)

    def forward(self, x: Tensor, payload: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The values in order; with a payload, also the payload in the order of the values.

        Args:
            x: ``(*batch, size)``.
            payload: ``(*batch, size)`` or ``(*batch, size, *features)``: what belongs to each value, mixed with the same weights.

        Returns:
            ``(*batch, size)``, or ``(values, payload)``.

        Raises:
            ShapeError: a shape or dtype does not fit.
        """
        values, weights = self._run(x)
        if payload is None:
            return values
        if not isinstance(payload, Tensor) or payload.dtype != x.dtype or payload.shape[: x.dim()] != x.shape:
            came = f"{tuple(payload.shape)} of {payload.dtype}" if isinstance(payload, Tensor) else type(payload).__name__
            raise ShapeError(f"payload must have the shape {(*x.shape, '*features')} and the dtype {x.dtype} of x, got {came}")
        wires = payload.flatten(x.dim()) if payload.dim() > x.dim() else payload.unsqueeze(-1)
        return values, carry(wires, weights, self._wiring).reshape(payload.shape)

    def sort(self, x: Tensor) -> SortResult:
        """The values in order, and the relaxed permutation.

        Args:
            x: ``(*batch, size)``.

        Returns:
            ``SortResult(values, permutation)`` of shapes ``(*batch, size)`` and ``(*batch, size, size)``.

        Raises:
            ShapeError: a shape or dtype does not fit.
        """
        values, weights = self._run(x)
        if self.network == "bitonic":
            return SortResult(values, bitonic_permutation(self._wiring, weights))
        return SortResult(values, carry(torch.eye(self.size, dtype=x.dtype, device=x.device), weights, self._wiring).mT)

    def rank(self, x: Tensor) -> Tensor:
        """The relaxed rank of every input, from 1 on: ``(*batch, size)``.

        Args:
            x: ``(*batch, size)``.

        Raises:
            ShapeError: a shape or dtype does not fit.
        """
        places = torch.arange(1, self.size + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
        return carry(places, self._run(x)[1], self._wiring, backwards=True).squeeze(-1)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and the share that every comparator swaps."""
        check_rows(x, "x", size=self.size)
        values, differences = sorted_values(-x if self.descending else x, self._wiring, self._swap)
        weights = self._wiring.only_active(self._swap.weight(differences).movedim(-1, 0)).movedim(0, -1)
        return -values if self.descending else values, weights

    def extra_repr(self) -> str:
        """The options."""
        shown = f"{self.size}, network={self.network!r}, distribution={self.distribution!r}, steepness={self.steepness:g}"
        if self.distribution == "logistic_phi":
            shown += f", art_lambda={self.art_lambda:g}"
        return shown + (", descending=True" if self.descending else "")
