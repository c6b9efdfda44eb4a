r"""The relaxed permutation of a bitonic network, as a product of small dense factors.

After block b of the network every run of :math:`2^b` wires depends on :math:`2^b` inputs only: P is block-diagonal, and is kept as its
blocks. The first layer of the next block joins two of them,

.. math:: \begin{pmatrix} I - Q & Q \\ Q & I - Q \end{pmatrix} \begin{pmatrix} A & 0 \\ 0 & C \end{pmatrix}
    = \begin{pmatrix} (I - Q)A & QC \\ QA & (I - Q)C \end{pmatrix}, \qquad Q = \operatorname{diag}(q),

and the layers after it, at the distances :math:`2^{b-2}, …, 2, 1`, are a butterfly as in the fast Fourier transform. c of them in a row
mix only sets of :math:`2^c` wires, each by a matrix whose entries are products of one factor a layer, q or 1 − q,

.. math:: K_{o_1 … o_c,\; i_1 … i_c} = \prod_{j=1}^{c} W_j[o_1 … o_{j-1};\, o_j, i_j;\, i_{j+1} … i_c],

with the bits o of the output wire and i of the input wire. So four layers are one batched product of 16 × 16 matrices with P, at the
price of one pass over P. All of it is differentiable matrix algebra; what autograd keeps is P at each product, not at each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .comparators import Layer, Wiring

__all__ = ["bitonic_permutation"]

_LAYERS_A_FACTOR = 4  # 16 × 16 matrices: measured fastest from n = 32 to 1024


def bitonic_permutation(wiring: Wiring, weights: Tensor) -> Tensor:
    """P of a bitonic network: ``(*batch, n, n)``.

    Args:
        wiring: the network.
        weights: q of every comparator, ``(*batch, comparators)``.
    """
    size = wiring.size
    lead = weights.shape[:-1]
    batch = math.prod(lead)
    # The weights have the batch last, P has it first: each then runs along contiguous memory.
    weights = weights.reshape(batch, weights.shape[-1]).T
    stay = 1 - weights
    # The 2 × 2 matrices of the swaps, (out, in, comparators, batch).
    swaps = torch.stack((torch.stack((stay, weights)), torch.stack((weights, stay))))
    # Pᵀ in blocks, (batch, runs, wires, inputs).
    Q = weights.new_ones(batch, size, 1, 1)
    rest = iter(swaps.split(wiring.counts, 2))
    for first, *others in wiring.blocks:
        Q = _join(Q, next(rest), first.groups, size)
        for factor in _factors(others, [next(rest) for _ in others]):
            runs, wires, inputs = Q.shape[1:]
            groups, inner, mixed = factor.shape[1:4]
            sets = Q.reshape(batch, groups, mixed, inner, inputs).transpose(2, 3)
            Q = (factor @ sets).transpose(2, 3).reshape(batch, runs, wires, inputs)
    return Q.reshape(batch, *Q.shape[-2:])[:, :size, :size].mT.reshape(*lead, size, size)


def _join(Q: Tensor, swaps: Tensor, runs: int, size: int) -> Tensor:
    """Pairs of neighbouring blocks after the first layer of the next block, ``(batch, runs, 2 · wires, 2 · inputs)``."""
    if Q.shape[1] < 2 * runs:
        Q = pad(Q, (0, 0, 0, 0, 0, 1))
    facing = _with_second_half_mirrored(Q.unflatten(1, (runs, 2)))
    # (batch, runs, out, wires, in, inputs)
    matrices = swaps.unflatten(2, (runs, -1)).permute(4, 2, 0, 3, 1).unsqueeze(-1)
    joined = matrices * facing.transpose(2, 3).unsqueeze(2)
    if runs == 1:  # beyond the last one there are no inputs
        joined = joined.flatten(4)[..., :size]
    return _with_second_half_mirrored(joined.flatten(4)).flatten(2, 3)


def _with_second_half_mirrored(halves: Tensor) -> Tensor:
    """Blocks ``(batch, runs, 2, wires, inputs)`` with the wires of each second one in reverse order."""
    if halves.shape[3] == 1:
        return halves
    first, second = halves.unbind(2)
    return torch.stack((first, second.flip(2)), 2)


def _factors(layers: Sequence[Layer], swaps: Sequence[Tensor]) -> list[Tensor]:
    """The layers after the first of a block as matrices K ``(batch, groups, inner, out, in)``; they act on wires (groups, in, inner)."""
    pieces = -(-len(layers) // _LAYERS_A_FACTOR)
    factors = []
    for piece in range(pieces):
        mine = range(piece * len(layers) // pieces, (piece + 1) * len(layers) // pieces)
        groups, inner = layers[mine[0]].groups, layers[mine[-1]].length
        # (groups, outputs so far, inputs so far, the rest, inner, batch)
        K = swaps[0].new_ones(1, 1, 1, 1 << len(mine), inner, 1)
        for i in mine:
            # (groups, outputs so far, out, 1, in, the rest, inner, batch)
            W = swaps[i].unflatten(2, (groups, K.shape[1], -1, inner)).permute(2, 3, 0, 1, 4, 5, 6).unsqueeze(3)
            K = (W * K.unflatten(3, (2, -1)).unsqueeze(2)).flatten(3, 4).flatten(1, 2)
        factors.append(K.squeeze(3).permute(4, 0, 3, 1, 2))
    return factors
