r"""Sparse matrices as layers see them: a fixed pattern, which is a constant, and values, which are differentiated.

A torch tensor in a sparse layout is taken apart into the two. Its values keep the autograd graph, so that the gradient of a sparse leaf
comes back as a sparse tensor of the same layout and pattern. What torch 2.13 itself cannot do stays impossible with its sparse tensors:

* torch.func knows no sparse CSR tensors, forward mode and vmap no sparse tensors at all;
* the backward of ``torch.sparse_coo_tensor(indices, values, size)`` drops second derivatives in ``values`` without a word (here it
  raises instead), and that of ``torch.sparse_csr_tensor`` cannot be differentiated.

:class:`SparseMatrix` holds indices and values side by side, and everything works with it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..errors import DiffLayersError, ShapeError

__all__ = ["SparseMatrix", "is_sparse", "sparse_matrix"]

_COMPRESSED = {
    torch.sparse_csr: (torch.sparse_csr_tensor, Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (torch.sparse_csc_tensor, Tensor.ccol_indices, Tensor.row_indices),
}
_CONSTRUCTOR = "SparseCooTensorWithDimsAndTensorsBackward0"
_INSTEAD = "pass difflayers.convex.SparseMatrix(indices, values, shape) in its place"


class SparseMatrix(NamedTuple):
    """A sparse matrix by its entries, for the arguments P, G and A of :func:`solve_qp`: the form that every transform understands.

    Attributes:
        indices: ``(2, nnz)`` int64, the row and the column of each entry; entries of the same place are added up.
        values: ``(*batch, nnz)``, differentiable; without batch dimensions shared by the batch.
        shape: rows and columns.

    Example:
        >>> import torch
        >>> from difflayers.convex import SparseMatrix, solve_qp
        >>> diagonal = torch.arange(3).expand(2, 3)
        >>> def minimizer(values):
        ...     return solve_qp(SparseMatrix(diagonal, values, (3, 3)), torch.ones(3)).x
        >>> torch.func.jacfwd(minimizer)(torch.tensor([1.0, 2.0, 4.0])).diagonal()
        tensor([1.0000, 0.2500, 0.0625])
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, int]


def is_sparse(matrix: Any) -> bool:
    """Whether ``matrix`` is a :class:`SparseMatrix` or a tensor in a sparse layout."""
    return isinstance(matrix, SparseMatrix) or (isinstance(matrix, Tensor) and matrix.layout != torch.strided)


def sparse_matrix(matrix: Tensor | SparseMatrix, name: str) -> SparseMatrix:
    """Take a matrix apart: a sparse one into its stored entries, a dense one ``(*batch, rows, columns)`` into all.

    Args:
        matrix: what the caller gave.
        name: what messages call it.

    Raises:
        ShapeError: a layout without a fixed pattern shared by the batch, or indices that do not fit.
    """
    if isinstance(matrix, SparseMatrix):
        return _checked(matrix, name)
    if _functorch.is_functorch_wrapped_tensor(matrix):
        return _from_tensor(matrix, name)
    # Transforms would wrap a sparse tensor that they have nothing to do with, and cannot.
    with temporarily_clear_interpreter_stack():
        return _from_tensor(matrix, name)


def _from_tensor(matrix: Tensor, name: str) -> SparseMatrix:
    if matrix.layout == torch.strided and matrix.dim() >= 2:
        rows, columns = matrix.shape[-2:]
        place = torch.arange(rows * columns, device=matrix.device)
        return SparseMatrix(torch.stack((place // max(columns, 1), place % max(columns, 1))), matrix.flatten(-2), (rows, columns))
    if matrix.layout == torch.sparse_coo and matrix.sparse_dim() == matrix.dim() == 2:
        entries = matrix.coalesce()
        node, values = matrix.grad_fn, entries.values()
        values = _Guard.apply(values) if node is not None and node.name() == _CONSTRUCTOR else values
        return SparseMatrix(entries.indices(), values, _shape(matrix))
    if matrix.layout in _COMPRESSED and matrix.dense_dim() == 0:
        return SparseMatrix(_compressed_indices(matrix, name), _Values.apply(matrix), _shape(matrix))
    raise ShapeError(
        f"{name} is a {matrix.dim()}-dimensional tensor with the layout {matrix.layout}; wanted is a sparse COO matrix, a sparse CSR or "
        f"CSC matrix (with batch dimensions if you like), or a dense matrix. Otherwise {_INSTEAD}"
    )


def _shape(matrix: Tensor) -> tuple[int, int]:
    return int(matrix.shape[-2]), int(matrix.shape[-1])


def _checked(matrix: SparseMatrix, name: str) -> SparseMatrix:
    indices, values, shape = matrix
    if not (isinstance(values, Tensor) and isinstance(indices, Tensor)) or values.dim() < 1:
        raise ShapeError(f"{name}: a SparseMatrix has tensors as indices (2, nnz) and values (*batch, nnz)")
    if indices.dtype != torch.int64 or tuple(indices.shape) != (2, values.shape[-1]):
        raise ShapeError(
            f"{name}: the indices of a SparseMatrix with {values.shape[-1]} values must be int64 of shape (2, {values.shape[-1]}), "
            f"got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if _functorch.is_batchedtensor(indices):
        raise ShapeError(
            f"{name}: the pattern of a SparseMatrix is a constant; let vmap map its values only (in_dims=None for the indices)"
        )
    while _functorch.is_functorch_wrapped_tensor(indices):
        indices = _functorch.get_unwrapped(indices)
    limits = torch.tensor(shape, device=indices.device).unsqueeze(1)
    if bool(((indices < 0) | (indices >= limits)).any()):
        raise ShapeError(f"{name}: an index lies outside of the shape {tuple(shape)}")
    return SparseMatrix(indices, values, (int(shape[0]), int(shape[1])))


def _compressed_indices(matrix: Tensor, name: str) -> Tensor:
    _, get_pointers, get_indices = _COMPRESSED[matrix.layout]
    pointers, inner = (part.reshape(math.prod(part.shape[:-1]), part.shape[-1]) for part in (get_pointers(matrix), get_indices(matrix)))
    if bool((pointers != pointers[:1]).any() | (inner != inner[:1]).any()):
        raise ShapeError(f"{name}: the elements of a batch must have one sparsity pattern; {_INSTEAD}, with explicit zeros")
    outer = torch.repeat_interleave(torch.arange(pointers.shape[1] - 1, device=inner.device), pointers[0].diff())
    pair = (outer, inner[0].to(torch.int64))
    return torch.stack(pair if matrix.layout == torch.sparse_csr else pair[::-1])


class _Values(torch.autograd.Function):
    """The values of a compressed tensor. Torch's own operation cannot be differentiated twice."""

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return matrix.values().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix = inputs[0].detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return _Rebuilt.apply(cotangents[0], ctx.matrix)


class _Rebuilt(torch.autograd.Function):
    """A compressed tensor with the pattern of ``like``, and other values."""

    @staticmethod
    def forward(values: Tensor, like: Tensor) -> Tensor:
        build, get_pointers, get_indices = _COMPRESSED[like.layout]
        return build(get_pointers(like), get_indices(like), values.clone(), like.shape, check_invariants=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _Values.apply(cotangents[0]), None


class _Guard(torch.autograd.Function):
    """The identity, whose derivative refuses to be differentiated where torch would drop the second derivative."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        stack = _functorch.get_interpreter_stack() or []
        orders = sum(level.key() == _functorch.TransformType.Grad for level in stack)
        if orders > 1 or (not stack and torch.is_grad_enabled()):
            raise DiffLayersError(
                "torch drops the second derivative in the values of torch.sparse_coo_tensor(indices, values, size); "
                + _INSTEAD
                + ", or make the sparse tensor itself the leaf"
            )
        return cotangents[0]
