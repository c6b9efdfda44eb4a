"""Hard constraints as entries of the registry of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from difflayers.errors import NotConvergedError, SingularError
from difflayers.pde import HardConstraint, dirichlet, neumann
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["HARD_CONSTRAINTS"]

_LOST = (Status.MAX_ITER, Status.NUMERICAL_ERROR)
_STEEP = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64)


def _features(basis: Tensor, *args: Any) -> dict[str, Tensor]:
    # A linear map that reaches from point to point, as a derivative does.
    return {"u": basis, "v": (basis.roll(1, -2) - basis) / 0.3}


def _pointwise(z: dict[str, Tensor], source: Tensor, factor: Tensor) -> Tensor:
    return z["v"] + factor[..., None] * z["u"] ** 2 - source + _STEEP.to(source)


def _free(u: Tensor, source: Tensor, factor: Tensor) -> Tensor:
    return (u.roll(1, -1) - u) / 0.3 + factor[..., None] * u**2 - source + _STEEP.to(source)


def _factor(source: Tensor, factor: Tensor) -> Tensor:
    return factor


def _rows() -> list[nn.Module]:
    return [dirichlet(_factor, dim=0, weight=2.0), neumann(0.5, 0.3, dim=0, side="upper")]


def _sample(g: torch.Generator) -> Inputs:
    return randn(g, 6, 2) + torch.eye(6, 2, dtype=torch.float64), randn(g, 6, scale=0.3), 0.3 + randn(g, scale=0.05)


def _call(structured: bool, **fixed: Any) -> Function:
    def call(basis: Tensor, source: Tensor, factor: Tensor, **options: Any) -> Tensor:
        kind: dict[str, Any] = {"features": _features} if structured else {}
        # The free residual sees a batch as it is.
        lead = torch.broadcast_shapes(basis.shape[:-2], source.shape[:-1], factor.shape)
        basis, source, factor = basis.expand(*lead, 6, 2), source.expand(*lead, 6), factor.expand(lead)
        function = _pointwise if structured else _free
        layer = HardConstraint(function, rows=_rows(), **({"tol": 1e-13} | kind | fixed | options))
        return layer(basis, source, factor)

    return call


def _reference(call: Function) -> Function:
    def gradient(w: Tensor, basis: Tensor, source: Tensor, factor: Tensor) -> Tensor:
        def half(w: Tensor) -> Tensor:
            u = basis @ w
            edge = 2 * (u[0] - factor), (1.5 * u[-1] - 2 * u[-2] + 0.5 * u[-3]) / 0.3 - 0.5
            return ((_free(u, source, factor) ** 2).sum() + edge[0] ** 2 + edge[1] ** 2) / 2

        return torch.func.grad(half)(w)

    def reference(basis: Tensor, source: Tensor, factor: Tensor) -> Tensor:
        u = call(basis, source, factor).detach()
        start = torch.linalg.lstsq(basis.detach(), u.unsqueeze(-1)).solution.squeeze(-1)
        return basis @ newton_root(gradient, start, basis, source, factor, steps=1)

    return reference


def _failures(structured: bool) -> tuple[Failure, ...]:
    dependent = Failure("dependent", lambda b, s, f: (b[..., :1].expand_as(b).clone(), s, f), SingularError, (Status.SINGULAR,))
    nan = Failure("NaN", lambda b, s, f: (b, s * torch.nan, f), NotConvergedError, (Status.NUMERICAL_ERROR,))
    return (dependent, nan) if structured else (nan,)


def _layer(name: str, structured: bool) -> Layer:
    call = _call(structured)

    def limited(iterations: int) -> Function:
        return _call(structured, tol=0.0, max_iter=iterations, on_failure="warn")

    def module() -> nn.Module:
        kind: dict[str, Any] = {"features": _features} if structured else {}
        return HardConstraint(_pointwise if structured else _free, rows=[copy.deepcopy(row) for row in _rows()], **kind)

    return Layer(
        name, call, _sample, reference=_reference(call), failures=_failures(structured), limited=limited, heavy=True, module=module
    )


HARD_CONSTRAINTS = (_layer("HardConstraint", True), _layer("HardConstraint, no features", False))
