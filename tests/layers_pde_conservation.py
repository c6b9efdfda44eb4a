"""Conservation laws and linear constraints as entries of the registry of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.pde import ConservationProjection, LinearConstraint, conservation_projection
from difflayers.pde.smoothness import second_difference_rows, second_difference_variance
from difflayers.solution import Status
from tests.layers import Failure, Inputs, Layer, randn

__all__ = ["CONSERVATION"]


def _conditioned(mean: Tensor, covariance: Tensor, value: Tensor, G: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
    K = covariance @ G.mT
    inverse = torch.linalg.inv(G @ K + torch.diag(noise_variance))
    return mean - K @ (inverse @ (G @ mean - value)), covariance - K @ inverse @ K.mT


def _vectors(*parts: Tensor) -> Tensor:
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)


def _diagonal() -> Layer:
    def call(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor, noise: Tensor, **options: Any) -> Tensor:
        found = conservation_projection(mean, variance, value, weights, noise, **options)
        return _vectors(found.mean, found.variance, found.log_likelihood.unsqueeze(-1))

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), 1 + randn(g, 3, scale=0.2), randn(g, 2), randn(g, 2, 3), 0.5 + randn(g, 2, scale=0.1)

    def reference(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        point, posterior = _conditioned(mean, variance.diag(), value, weights, noise**2)
        law = torch.distributions.MultivariateNormal(weights @ mean, weights @ (variance[:, None] * weights.mT) + (noise**2).diag())
        return torch.cat([point, posterior.diagonal(), law.log_prob(value).reshape(1)])

    failures = (
        Failure("NaN", lambda mean, *rest: (mean * torch.nan, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        Failure("negative variance", lambda mean, v, *rest: (mean, -v, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,)),
    )
    return Layer("conservation_projection", call, sample, reference=reference, failures=failures)


def _exact() -> Layer:
    def call(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor, **options: Any) -> Tensor:
        found = conservation_projection(mean, variance, value, weights, **options)
        return _vectors(found.mean, found.variance)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), 1 + randn(g, 3, scale=0.2), randn(g, 2), torch.eye(2, 3, dtype=torch.float64) + randn(g, 2, 3, scale=0.2)

    def reference(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        point, posterior = _conditioned(mean, variance.diag(), value, weights, torch.zeros_like(value))
        return torch.cat([point, posterior.diagonal()])

    def contradictory(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor) -> Inputs:
        return mean, variance, torch.stack([value[0], value[0] + 1]), torch.stack([weights[0], weights[0]])

    failure = Failure("contradictory rows", contradictory, InfeasibleError, (Status.PRIMAL_INFEASIBLE,))
    return Layer("conservation_projection, exact", call, sample, reference=reference, failures=(failure,))


def _redundant() -> Layer:
    # One law, written down twice.
    def call(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        twice = torch.stack([weights, -2 * weights], -2), torch.stack([value, -2 * value], -1)
        found = conservation_projection(mean, variance, twice[1], twice[0])
        return _vectors(found.mean, found.variance)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), 1 + randn(g, 3, scale=0.2), randn(g), 1 + randn(g, 3, scale=0.3)

    def reference(mean: Tensor, variance: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        point, posterior = _conditioned(mean, variance.diag(), value.reshape(1), weights[None], torch.zeros_like(value).reshape(1))
        return torch.cat([point, posterior.diagonal()])

    return Layer("conservation_projection, redundant", call, sample, reference=reference, heavy=True)


def _full() -> Layer:
    # On a grid of four points, with the stage for smoothness before the law.
    def call(mean: Tensor, covariance: Tensor, value: Tensor, weights: Tensor, **options: Any) -> Tensor:
        one_row = value.unsqueeze(-1), weights.unsqueeze(-2)
        found = conservation_projection(mean, covariance, *one_row, 0.1, covariance="full", smoothness=0.5, **options)
        assert found.covariance is not None
        return _vectors(found.mean, found.covariance.flatten(-2))

    def sample(g: torch.Generator) -> Inputs:
        root = torch.eye(4, dtype=torch.float64) + randn(g, 4, 4, scale=0.2)
        return randn(g, 4), root @ root.mT, randn(g), 1 + randn(g, 4, scale=0.3)

    def reference(mean: Tensor, covariance: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        covariance = (covariance + covariance.mT) / 2
        small = second_difference_variance(covariance.diagonal(), 0.5)
        smooth = _conditioned(mean, covariance, torch.zeros_like(small), second_difference_rows(4, mean), small)
        point, posterior = _conditioned(*smooth, value.reshape(1), weights[None], torch.full_like(value.reshape(1), 0.01))
        return torch.cat([point, posterior.flatten()])

    failure = Failure("indefinite", lambda mean, C, *rest: (mean, -C, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,))
    return Layer("conservation_projection, full", call, sample, reference=reference, failures=(failure,), heavy=True)


class _Mean(torch.nn.Module):
    """The mean alone, as a layer of the registry returns one tensor: two dimensions, and a learned noise."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.layer = ConservationProjection(torch.tensor([[0.5, 1.0], [1.0, 2.0]], dtype=torch.float64), noise, grid_ndim=2)

    def forward(self, mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
        return self.layer(mean, variance, value)[0]


def _module() -> Layer:
    module = _Mean()

    def call(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
        return module(mean, variance, value) if mean.dtype == torch.float64 else copy.deepcopy(module).to(mean.dtype)(mean, variance, value)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 2, 2), 1 + randn(g, 2, 2, scale=0.2), randn(g)

    return Layer("ConservationProjection", call, sample, module=_Mean)


def _equations() -> Layer:
    A = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)

    def call(y: Tensor, b: Tensor, variance: Tensor, **options: Any) -> Tensor:
        return LinearConstraint(A.to(y), **options)(y, b, variance=variance)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), randn(g, 1), 1 + randn(g, 3, scale=0.2)

    def reference(y: Tensor, b: Tensor, variance: Tensor) -> Tensor:
        return _conditioned(y, variance.diag(), b, A, torch.zeros_like(b))[0]

    failure = Failure("nothing moves", lambda y, b, v: (y, b, 0 * v), InfeasibleError, (Status.PRIMAL_INFEASIBLE,))
    return Layer("LinearConstraint", call, sample, reference=reference, failures=(failure,))


def _inequalities() -> Layer:
    # The first inequality is active.
    A, G = torch.ones(1, 3, dtype=torch.float64), -torch.eye(2, 3, dtype=torch.float64)

    def call(y: Tensor, b: Tensor, root: Tensor, **options: Any) -> Tensor:
        return LinearConstraint(A.to(y), None, G.to(y), y.new_zeros(2), **options)(y, b, root=root)

    def sample(g: torch.Generator) -> Inputs:
        root = torch.eye(3, dtype=torch.float64) + randn(g, 3, 3, scale=0.1)
        return torch.tensor([-1.0, 1.0, 0.5], dtype=torch.float64) + randn(g, 3, scale=0.1), 1 + randn(g, 1, scale=0.1), root

    def reference(y: Tensor, b: Tensor, root: Tensor) -> Tensor:
        rows = torch.cat([A, G[:1]])
        return _conditioned(y, root @ root.mT, torch.cat([b, b.new_zeros(1)]), rows, b.new_zeros(2))[0]

    def empty(y: Tensor, b: Tensor, root: Tensor) -> Inputs:
        return y, b - 5, torch.cat([root[:2], 0 * root[2:]])

    failure = Failure("empty", empty, InfeasibleError, (Status.PRIMAL_INFEASIBLE,))
    return Layer("LinearConstraint, inequalities", call, sample, reference=reference, failures=(failure,), heavy=True)


def _constraint_module() -> Layer:
    def module() -> LinearConstraint:
        A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
        return LinearConstraint(A, torch.nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64)))

    constraint = module()

    def call(y: Tensor) -> Tensor:
        return constraint(y) if y.dtype == torch.float64 else copy.deepcopy(constraint).to(y.dtype)(y)

    return Layer("LinearConstraint, module", call, lambda g: (randn(g, 3),), module=module)


CONSERVATION: tuple[Layer, ...] = (
    _diagonal(),
    _exact(),
    _redundant(),
    _full(),
    _module(),
    _equations(),
    _inequalities(),
    _constraint_module(),
)
