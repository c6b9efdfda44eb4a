"""Plug-and-play as entries of the registry of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from difflayers.errors import NotConvergedError
from difflayers.prox import L2, Blur, LinearOperator, Mask, MatrixOperator, PlugAndPlay
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["PLUG_AND_PLAY"]

_LOST = (Status.MAX_ITER, Status.NUMERICAL_ERROR)
_EXPANSIVE = Failure("expansive", lambda y, mask, s, sigma: (y, mask, s, sigma - 8), NotConvergedError, _LOST)
_NEGATIVE_STEP = Failure("negative step", lambda y, mask, s, sigma: (y, mask, -s, sigma), NotConvergedError, _LOST[1:])
_NAN = Failure("NaN", lambda y, mask, s, sigma: (y * torch.nan, mask, s, sigma), NotConvergedError, _LOST[1:])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _lead(*pairs: tuple[Tensor, int]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(tensor.shape[: tensor.dim() - ndim] for tensor, ndim in pairs)))


def _denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A contraction for 0 < σ < 1, expansive for σ < 0."""
    return x - sigma[..., None] * (x - torch.tanh(x.flip(-1)) / 2)


def _sample(g: torch.Generator) -> Inputs:
    return 1 + randn(g, 2), 1 + randn(g, 2, scale=0.1), 0.8 + randn(g, scale=0.03), 0.6 + randn(g, scale=0.03)


def _algorithm(algorithm: str) -> Layer:
    def call(y: Tensor, mask: Tensor, stepsize: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        lead = _lead((y, 1), (mask, 1), (stepsize, 0), (sigma, 0))
        options = {"max_iter": 100} | options  # an expansive map takes them all
        layer = PlugAndPlay(algorithm, _denoise, L2(Mask(mask)), stepsize, sigma, batch_ndim=len(lead), **options)
        return layer(y.expand(*lead, 2))

    def residual(x: Tensor, y: Tensor, mask: Tensor, stepsize: Tensor, sigma: Tensor) -> Tensor:
        if algorithm == "hqs":
            return x - _denoise((x + stepsize * mask * y) / (1 + stepsize * mask**2), sigma)
        return x - _denoise(x - stepsize * mask * (mask * x - y), sigma)

    def reference(*inputs: Tensor) -> Tensor:
        return newton_root(residual, call(*inputs).detach(), *inputs, steps=1)

    def limited(iterations: int) -> Function:
        return lambda *inputs: call(*inputs, tol=0.0, max_iter=iterations, on_failure="warn")

    return Layer(
        f"PlugAndPlay, {algorithm}",
        call,
        _sample,
        reference=reference,
        failures=(_EXPANSIVE, _NEGATIVE_STEP, _NAN) if algorithm == "pgd" else (_EXPANSIVE,),
        limited=limited,
        heavy=True,
    )


def _squash(x: Tensor) -> Tensor:
    return torch.tanh(x) / 2


def _deblur() -> Layer:
    # The kernel is an input, as one that is learned.
    def call(y: Tensor, kernel: Tensor, stepsize: Tensor) -> Tensor:
        lead = _lead((y, 1), (kernel, 1), (stepsize, 0))
        operator = Blur(kernel, spatial_ndim=1, batch_ndim=len(lead))
        return PlugAndPlay("hqs", _squash, L2(operator), stepsize, batch_ndim=len(lead))(y.expand(*lead, y.shape[-1]))

    def residual(x: Tensor, y: Tensor, kernel: Tensor, stepsize: Tensor) -> Tensor:
        # The circulant matrix: its first column is the kernel with its centre at the origin.
        column = torch.cat([kernel[1:], kernel.new_zeros(1), kernel[:1]])
        matrix = torch.stack([column.roll(k, -1) for k in range(4)], -1)
        gram = torch.eye(4, dtype=x.dtype) + stepsize * matrix.mT @ matrix
        return x - _squash(torch.linalg.inv(gram) @ (x + stepsize * matrix.mT @ y))

    def reference(y: Tensor, kernel: Tensor, stepsize: Tensor) -> Tensor:
        return newton_root(residual, call(y, kernel, stepsize).detach(), y, kernel, stepsize, steps=1)

    def sample(g: torch.Generator) -> Inputs:
        kernel = torch.tensor([0.2, 0.9, 0.3], dtype=torch.float64) + randn(g, 3, scale=0.05)
        return 0.5 * randn(g, 4), kernel, 0.9 + randn(g, scale=0.05)

    return Layer("PlugAndPlay, blur", call, sample, reference=reference, heavy=True)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, 0.2], [-0.3, 0.4]], dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised x."""
        return 0.5 * torch.tanh(_times(self.weight, x)) + sigma * x


def _module() -> Layer:
    def parameter(*values: float) -> nn.Parameter:
        return nn.Parameter(torch.tensor(values, dtype=torch.float64).squeeze())

    def module() -> PlugAndPlay:
        operator = MatrixOperator(nn.Parameter(torch.tensor([[0.9, 0.3]], dtype=torch.float64)))
        fidelity = L2(operator, weight=parameter(1.2))
        return PlugAndPlay("drs", _Network(), fidelity, stepsize=parameter(0.7), sigma=parameter(0.3), batch_ndim=0)

    layer = module()

    def call(y: Tensor) -> Tensor:
        return (layer if y.dtype == torch.float64 else copy.deepcopy(layer).to(y.dtype))(y)

    return Layer("PlugAndPlay, module", call, lambda g: (randn(g, 1),), leading=False, module=module)


def _products() -> Layer:
    # The matrix is closed over by the products, and the proximal operator is found by conjugate gradients.
    def call(z: Tensor, y: Tensor, matrix: Tensor, gamma: Tensor) -> Tensor:
        lead = _lead((z, 1), (y, 1), (matrix, 2), (gamma, 0))
        operator = LinearOperator(lambda x: _times(matrix, x), lambda y: _times(matrix.mT, y), batch_ndim=len(lead))
        return L2(operator).prox(z.expand(*lead, 3), y, gamma=gamma)

    def reference(z: Tensor, y: Tensor, matrix: Tensor, gamma: Tensor) -> Tensor:
        return torch.linalg.inv(torch.eye(3, dtype=z.dtype) + gamma * matrix.mT @ matrix) @ (z + gamma * matrix.mT @ y)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), randn(g, 2), randn(g, 2, 3), 0.8 + randn(g, scale=0.1)

    return Layer("L2.prox, products", call, sample, reference=reference)


PLUG_AND_PLAY: tuple[Layer, ...] = (
    *(_algorithm(algorithm) for algorithm in ("pgd", "fista", "hqs", "admm", "drs")),
    _deblur(),
    _module(),
    _products(),
)
