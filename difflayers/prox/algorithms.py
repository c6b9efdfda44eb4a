r"""One step of each splitting algorithm, as a map of its own state.

To minimize f + R, with f the misfit and D = prox_{sR} a denoiser, in steps of s:

========  =====================================================================  ============================================
pgd       x ← D(x − s∇f(x))                                                      proximal gradient
fista     the same at y = x + (k − 1)/(k + 2) (x − x₋), the point ahead of x      accelerated
hqs       x ← D(prox_{sf}(x))                                                    half-quadratic splitting
admm      u ← prox_{sf}(x − z), x ← D(u + z), z ← z + u − x                      alternating directions
drs       u ← prox_{sf}(z), x ← D(2u − z), z ← z + x − u                         Douglas–Rachford
========  =====================================================================  ============================================

Where pgd, fista, admm and drs stop, 0 ∈ ∇f(x) + ∂R(x), whatever s was, if D is the proximal operator of sR; a plain denoiser stands for
R/s, so that s weighs the data. hqs stops at a minimizer of R plus the Moreau envelope of f with the parameter s.

References: Venkatakrishnan, Bouman, Wohlberg, GlobalSIP 2013 (plug-and-play); Eckstein, Bertsekas, On the Douglas–Rachford splitting
method and the proximal point algorithm, Math. Program. 55, 1992; Geman, Yang, Nonlinear image recovery with half-quadratic regularization,
IEEE Trans. Image Process. 4, 1995.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ALGORITHMS", "UNROLLED_FISTA", "Algorithm", "Terms"]


class Terms(NamedTuple):
    """The two terms of an objective, as an algorithm sees them.

    Attributes:
        descend: ``x -> x − s∇f(x)``.
        fit: ``x -> prox_{sf}(x)``.
        denoise: ``x -> D(x)``.
    """

    descend: Callable[[Tensor], Tensor]
    fit: Callable[[Tensor], Tensor]
    denoise: Callable[[Tensor], Tensor]


class Algorithm(NamedTuple):
    """A splitting algorithm.

    Attributes:
        start: ``x -> state``; the image is the first tensor of the state.
        step: ``(state, terms) -> state``.
        needs: the method of the data fidelity that the step calls.
    """

    start: Callable[[Tensor], Any]
    step: Callable[[Any, Terms], Any]
    needs: str


def _proximal_gradient(x: Tensor, terms: Terms) -> Tensor:
    return terms.denoise(terms.descend(x))


def _accelerated(state: tuple[Tensor, Tensor, int], terms: Terms) -> tuple[Tensor, Tensor, int]:
    x, previous, k = state
    return _proximal_gradient(x + (k - 1) / (k + 2) * (x - previous), terms), x, k + 1


def _half_quadratic(x: Tensor, terms: Terms) -> Tensor:
    return terms.denoise(terms.fit(x))


def _alternating_directions(state: tuple[Tensor, Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
    x, z = state
    u = terms.fit(x - z)
    x = terms.denoise(u + z)
    return x, z + u - x


def _douglas_rachford(state: tuple[Tensor, Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
    _, z = state
    u = terms.fit(z)
    x = terms.denoise(2 * u - z)
    return x, z + x - u


def _itself(x: Tensor) -> Tensor:
    return x


# Unrolled, FISTA is the iteration with its state. Otherwise its fixed point is that of "pgd", found with momentum.
UNROLLED_FISTA = Algorithm(lambda x: (x, x, 1), _accelerated, "grad")

ALGORITHMS: dict[str, Algorithm] = {
    "pgd": Algorithm(_itself, _proximal_gradient, "grad"),
    "fista": Algorithm(_itself, _proximal_gradient, "grad"),
    "hqs": Algorithm(_itself, _half_quadratic, "prox"),
    "admm": Algorithm(lambda x: (x, torch.zeros_like(x)), _alternating_directions, "prox"),
    "drs": Algorithm(lambda x: (x, x), _douglas_rachford, "prox"),
}
