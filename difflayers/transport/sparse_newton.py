r"""Newton's method on the semi-dual for large plans: conjugate gradients, and only the entries that matter.

At potentials (φ, γ) let K = e^{φ ⊕ γ − X}. Scalings of its rows and columns, u and v = e^δ, say where the potentials go from there, and as
in :mod:`~difflayers.transport.newton` the rows are always met. With P = diag(u) K diag(v)

.. math:: u = \frac{a}{K v}, \qquad F(δ) = \sum_i a_i \log u_i + \sum_j b_j δ_j, \qquad ∇F = b - P^T 1, \qquad
   -∇^2 F = \operatorname{diag}(P^T 1) - P^T \operatorname{diag}(1/a) P .

F is concave and is maximized: the step d solves −∇²F d = ∇F. Nothing is factorized. A value of F and a product with its Hessian take two
products with K each, and conjugate gradients, preconditioned by the diagonal, need some tens of them. How exactly they solve the system
follows the error, which keeps Newton's method superlinear.

**Sparsity.** Where ε is small nearly all mass is on a few entries a row. An entry of K is dropped if it is below

.. math:: τ e^{-M}, \qquad τ = \frac{0.1\, \mathrm{tol}}{n m},

where tol is the 1-norm that ∇F is to reach. As long as max δ + max log u ≤ M no dropped entry of P exceeds τ, and together they weigh at
most a tenth of the tolerance: they need not be looked at again. A step that would lead further is shortened, and all entries are looked
at anew where it ends. (To drop a tenth of the present ‖∇F‖₁ in each step, as is often done, is superlinear, too, but needs a look at all
entries before each step, and that is what costs.)

Where groups of rows and columns exchange next to nothing conjugate gradients stall. Such an element is given back as it is, for the
factorization in :mod:`~difflayers.transport.newton` to finish.

References: Tang et al., Accelerating Sinkhorn algorithms with sparse Newton iterations, ICLR 2024, arXiv:2401.12253; Brauer, Clason, Lorenz
and Wirth, A Sinkhorn-Newton method for entropic optimal transport, 2017, arXiv:1710.06635.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kept import Kept, conjugate_gradients
from .sweeps import FLOOR, Scaled, Swept

__all__ = ["sparse_newton"]

# What the dropped entries may weigh, as a part of the tolerance, and M.
_DROPPED, _MARGIN = 0.1, 8.0

# M where nothing is dropped: as far as the kernel has not lost anything.
_MARGIN_DENSE = 50.0

# Most rounds of looking at all entries, and halvings of a step.
_ROUNDS, _HALVINGS = 30, 40

# As in the dense method: keeps a step within some units where the Hessian is nearly singular, and vanishes with the error.
_CAUTION = 0.1

# How exactly a step solves its system at least.
_FORCING = 0.1


class _State(NamedTuple):
    """At δ: u, v, the column sums and their error, ‖error‖₁ and F beyond that of δ = 0."""

    delta: Tensor
    u: Tensor
    v: Tensor
    sums: Tensor
    error: Tensor
    size: float
    value: float

    @property
    def moved(self) -> float:
        """The largest exponent by which an entry may have grown."""
        return float(self.delta.max() + self.u.log().max())


def sparse_newton(problem: Scaled, gamma: Tensor, tol: Tensor, *, max_iter: int) -> Swept:
    """Maximize the semi-dual, one problem at a time.

    Args:
        problem: N problems, best with no more columns than rows.
        gamma: ``(N, m)``, where to start; what it says of columns without mass is ignored.
        tol: ``(N,)``, the column error (1-norm) to reach.
        max_iter: most steps.

    Returns:
        Where it ended; the rows are met, and ``error`` is that of the columns. An element that stalls ends with a larger one.
    """
    found = Swept(torch.full_like(problem.a, -torch.inf), torch.full_like(problem.b, -torch.inf), tol.clone(), torch.zeros_like(tol).long())
    for index in range(len(tol)):
        X, a, b = problem.X[index], problem.a[index], problem.b[index]
        rows, columns, start = a > 0, b > 0, gamma[index]
        if not bool(rows.all() & columns.all()):
            X, a, b, start = X[rows][:, columns], a[rows], b[columns], start[columns]
        found.phi[index, rows], found.gamma[index, columns], found.error[index], found.iterations[index] = _maximize(
            X, a, b, start, float(tol[index]), max_iter
        )
    return found


def _maximize(X: Tensor, a: Tensor, b: Tensor, gamma: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor, float, int]:
    """φ, γ, the column error and the steps taken, for one problem without empty rows or columns."""
    steps, buffer = 0, torch.empty_like(X)
    for _ in range(_ROUNDS):
        phi, K = _all_entries(X, a, gamma, buffer)
        error = float((b - K.sum(0)).abs().sum())
        if error <= tol or steps >= max_iter:
            break
        kernel = Kept(K, _DROPPED * tol / X.numel() * math.exp(-_MARGIN))
        now, taken, stalled = _climb(kernel, a, b, (1 - _DROPPED) * tol, max_iter - steps)
        steps += taken
        phi, gamma, error = phi + now.u.log(), gamma + now.delta, now.size + _DROPPED * tol
        if stalled or error <= tol:
            break
    return phi, gamma, error, steps


def _all_entries(X: Tensor, a: Tensor, gamma: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """φ that meets the rows at γ, and K, in the place of ``buffer``."""
    K = torch.sub(gamma, X, out=buffer)
    top = K.amax(-1, keepdim=True)
    sums = K.sub_(top).clamp_(min=FLOOR).exp_().sum(-1)
    return a.log() - sums.log() - top.squeeze(-1), K.mul_((a / sums).unsqueeze(-1))


def _climb(kernel: Kept, a: Tensor, b: Tensor, tol: float, max_iter: int) -> tuple[_State, int, bool]:
    """Newton steps as far as K serves: where they end, how many, and whether they stalled."""
    margin = _MARGIN if kernel.sparse else _MARGIN_DENSE
    now = _state(kernel, a, b, torch.zeros_like(b))
    for step in range(max_iter):
        if now.size <= tol or now.moved > margin / 2:
            return now, step, False
        direction, solved = _direction(kernel, a, b, now, tol)
        new = _line_search(kernel, a, b, now, direction, margin) if solved else None
        if new is None:
            return now, step, True
        now = new
    return now, max_iter, False


def _state(kernel: Kept, a: Tensor, b: Tensor, delta: Tensor) -> _State:
    v = delta.exp()
    u = a / kernel.times(v)
    # A row may be lighter than what is dropped.
    u = torch.where(torch.isfinite(u), u, 1)
    sums = v * kernel.transposed(u)
    error = b - sums
    return _State(delta, u, v, sums, error, float(error.abs().sum()), float(a @ u.log() + b @ delta))


def _direction(kernel: Kept, a: Tensor, b: Tensor, now: _State, tol: float) -> tuple[Tensor, bool]:
    """The Newton step, and whether conjugate gradients found it."""
    u, v, sums = now.u, now.v, now.sums
    relative = now.size / float(b.sum())
    shift = _CAUTION * relative * b
    weights, diagonal = u.square() / a, sums + shift
    # What a column shares with others. Where it shares nothing, rounding is left.
    scale = 1 / (diagonal - v.square() * kernel.squares_transposed(weights)).clamp(min=torch.finfo(b.dtype).eps * b)

    def hessian(d: Tensor) -> Tensor:
        return diagonal * d - v * kernel.transposed(weights * kernel.times(v * d))

    # What the system lacks is the error after the step, up to terms of second order.
    lacking = max(min(_FORCING, relative) * now.size, _FORCING * tol)
    return conjugate_gradients(hessian, scale, now.error, lacking, kernel.limit)


def _line_search(kernel: Kept, a: Tensor, b: Tensor, now: _State, direction: Tensor, margin: float) -> _State | None:
    """The next state by Armijo's rule, or None where no step gains anything."""
    slope, length = float(now.error @ direction), 1.0
    for _ in range(_HALVINGS):
        new = _state(kernel, a, b, now.delta + length * direction)
        # Near the maximum the gain of F drowns in its rounding, and the error decides.
        if new.moved <= margin and (new.value > now.value + 1e-4 * length * slope or new.size <= 0.9 * now.size):
            return new
        length /= 2
    return None
