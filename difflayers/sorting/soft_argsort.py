r"""Relaxed permutation matrices: P with the sorted values ≈ x P.

``P[..., i, j]`` is the weight of input i in output j, so the columns of P are weights that sum to one. With the sorted values s, for
j = 1 … n and in ascending order,

.. math::
   \text{SoftSort:} \quad & P_{ij} = \operatorname{softmax}_i\bigl(-|x_i - s_j| / τ\bigr), \\
   \text{NeuralSort:} \quad & P_{ij} = \operatorname{softmax}_i\Bigl(\bigl((2j - n - 1)\, x_i - \sum_l |x_i - x_l|\bigr) / τ\Bigr).

Both are the transposes of the matrices in their papers, which have one output a row. The largest weights of different columns lie in
different rows (the matrix is *unimodal*), but rows need not sum to one. Rows and columns do in a product of the relaxed swaps of a sorting
network, and in a transport plan between the inputs and the places 1 … n,

.. math:: P = \arg\max_{P 1 = P^T 1 = 1} \; \sum_{ij} P_{ij}\, x_i\, j - τ \sum_{ij} P_{ij} \log P_{ij},

the linear program that sorts, on doubly stochastic matrices, with an entropy.

References: Prillo and Eisenschlos, SoftSort: a continuous relaxation for the argsort operator, ICML 2020 (arXiv:2006.16038);
Grover, Wang, Zweig and Ermon, Stochastic optimization of sorting networks via continuous relaxations, ICLR 2019 (arXiv:1903.08850);
Cuturi, Teboul and Vert, Differentiable ranking and sorting using optimal transport, NeurIPS 2019 (arXiv:1905.11885).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ShapeError
from ..transport.sinkhorn import sinkhorn
from .arguments import Strength, check_choice, rows_and_strength
from .network import SortingNetwork

__all__ = ["soft_argsort"]


def soft_argsort(
    x: Tensor,
    *,
    method: Literal["softsort", "neuralsort", "network", "sinkhorn"] = "softsort",
    regularization_strength: Strength = 1.0,
    dim: int = -1,
    descending: bool = False,
    **options: Any,
) -> Tensor:
    """A relaxed permutation matrix that sorts x: ``x @ P`` are the soft values, in order but for a network's.

    With ``"softsort"`` and ``"neuralsort"``, ``P.argmax(-2)`` is ``x.argsort()``, whatever the temperature.

    Args:
        x: ``(*batch, n)``, or n in another place: see ``dim``.
        method: ``"softsort"`` or ``"neuralsort"``, n² numbers and one softmax; ``"network"``, a :class:`SortingNetwork`; or ``"sinkhorn"``,
            a transport plan by :func:`~difflayers.transport.sinkhorn`.
        regularization_strength: the temperature τ > 0; a tensor is of shape ``(*batch,)``, and is differentiated, too. For a network it
            is a number, one over the steepness.
        dim: what is sorted; it is moved behind the batch dimensions.
        descending: from the largest to the smallest.
        **options: of the network: ``network``, ``distribution``, ``art_lambda``, or ``steepness`` in the place of the strength. Of the
            transport: ``tol``, ``max_iter`` and ``on_failure``.

    Returns:
        ``(*batch, n, n)``: the weight of input i in output j. Columns sum to one; rows, too, with ``"network"`` and ``"sinkhorn"``. A row
        of x that has a NaN or an infinite entry, or a strength in a tensor that is not positive, gives NaN.

    Raises:
        NotConvergedError: the transport is not solved (``"sinkhorn"`` with ``on_failure="raise"``).
        ShapeError: x is not a floating tensor of at least one dimension, or the strength has not the shape of its batch.
        TypeError: the method has no such option.
        ValueError: the strength is a number that is not positive, or the method is not known.

    References:
        Prillo and Eisenschlos, ICML 2020; Grover, Wang, Zweig and Ermon, ICLR 2019; Cuturi, Teboul and Vert, NeurIPS 2019.

    Example:
        >>> import torch
        >>> from difflayers.sorting import soft_argsort
        >>> x = torch.tensor([3.0, 1.0, 2.5])
        >>> P = soft_argsort(x, regularization_strength=0.1)
        >>> P
        tensor([[0.0000, 0.0067, 0.9933],
                [1.0000, 0.0000, 0.0000],
                [0.0000, 0.9933, 0.0067]])
        >>> x @ P
        tensor([1.0000, 2.5033, 2.9967])
    """
    check_choice(method, "method", ("softsort", "neuralsort", "network", "sinkhorn"))
    rows, strength, wanted = rows_and_strength(x, regularization_strength, dim)
    if method == "network":
        return _network(rows.to(wanted), strength, descending, options)
    if method == "sinkhorn":
        return _transport(rows, strength, descending, options).to(wanted)
    if options:
        raise TypeError(f"method {method!r} has no options, got {', '.join(options)}")
    if isinstance(strength, Tensor):
        strength = strength.unsqueeze(-1)
    logits = (_softsort if method == "softsort" else _neuralsort)(rows, descending) / strength
    return torch.softmax(logits, -2).to(wanted)


def _network(x: Tensor, strength: Strength, descending: bool, options: dict[str, Any]) -> Tensor:
    if isinstance(strength, Tensor):
        raise ShapeError("regularization_strength must be a number for the method 'network'; divide x by the tensor instead")
    n = x.shape[-1]
    if n == 0:
        return x.new_zeros(*x.shape, n)
    settings: dict[str, Any] = {"steepness": 1 / strength, **options}
    return SortingNetwork(n, descending=descending, **settings).sort(x).permutation


def _transport(x: Tensor, strength: Strength, descending: bool, options: dict[str, Any]) -> Tensor:
    n = x.shape[-1]
    if n == 0:
        return x.new_zeros(*x.shape, n)
    epsilon = strength.squeeze(-1) if isinstance(strength, Tensor) else torch.full((), strength, dtype=x.dtype, device=x.device)
    usable = torch.isfinite(x).all(-1) & torch.isfinite(epsilon)
    x, epsilon = torch.where(usable.unsqueeze(-1), x, 0), torch.where(usable, epsilon, 1)
    # Centered, the products that the plan depends on lose the least digits; a shift of x or of the places changes no plan.
    place = torch.arange(1 - n, n + 1, 2, dtype=x.dtype, device=x.device) / 2
    cost = (x - x.detach().mean(-1, keepdim=True)).unsqueeze(-1) * (place if descending else -place)
    plan = sinkhorn(cost, epsilon=epsilon, **options).plan * n
    return torch.where(usable[..., None, None], plan, torch.nan)


def _softsort(x: Tensor, descending: bool) -> Tensor:
    ordered = x.sort(-1, descending=descending).values
    return -(x.unsqueeze(-1) - ordered.unsqueeze(-2)).abs()


def _neuralsort(x: Tensor, descending: bool) -> Tensor:
    n = x.shape[-1]
    place = torch.arange(1 - n, n + 1, 2, dtype=x.dtype, device=x.device)
    distances = (x.unsqueeze(-1) - x.unsqueeze(-2)).abs().sum(-1, keepdim=True)
    return x.unsqueeze(-1) * (-place if descending else place) - distances
