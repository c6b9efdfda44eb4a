r"""Plug-and-play reconstruction as an implicit layer.

A splitting algorithm for min f(x) + R(x) with a denoiser D in the place of prox_{sR} (:mod:`difflayers.prox.algorithms`) is a map
v ← T(v; θ) of its own state v. The layer returns the image in its fixed point and differentiates the fixed point,

.. math:: v = T(v; θ), \qquad \frac{∂v}{∂θ} = \Bigl(I - \frac{∂T}{∂v}\Bigr)^{-1} \frac{∂T}{∂θ},

in everything that T reads: the measurements, the weights of the denoiser, its noise level, the step size, the weight of the data and the
tensors of the operator (a blur kernel, say). One image stops without waiting for another, and backward keeps one application of T however
many there were.

References: Venkatakrishnan, Bouman, Wohlberg, Plug-and-play priors for model based reconstruction, GlobalSIP 2013; Gilton, Ongie, Willett,
Deep equilibrium architectures for inverse problems in imaging, IEEE Trans. Comput. Imaging 7, 2021, arXiv:2102.07944; Fang, Buchanan,
Sulam, What's in a prior? Learned proximal networks for inverse problems, ICLR 2024, arXiv:2310.14344.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..errors import ShapeError, SolveError
from ..holding import hold
from ..implicit import implicit_fixed_point
from ..implicit.eager import eager
from ..implicit.fixed_point import Backward
from ..implicit.root import LinearSolver
from ..solution import OnFailure, Solution
from .algorithms import ALGORITHMS, UNROLLED_FISTA, Terms
from .linear_operators import number_or_shape, spread
from .momentum import fista

__all__ = ["PlugAndPlay"]

_ADVICE = {
    "pgd": "needs a stepsize below 2 / L, with L the weight of the data times squared_norm(operator, x)",
    "fista": "needs a stepsize of at most 1 / L, with L the weight of the data times squared_norm(operator, x)",
    "hqs": "converges for any stepsize if the denoiser is nonexpansive and averaged",
    "admm": "converges for any stepsize if the denoiser is a proximal operator (firmly nonexpansive)",
    "drs": "converges for any stepsize if the denoiser is a proximal operator (firmly nonexpansive)",
}


_DEFAULTS = {
    "solver": "picard",
    "backward": "ift",
    "linear_solver": "auto",
    "tol": None,
    "max_iter": None,
    "on_failure": "raise",
    "neumann_terms": 10,
    "phantom_steps": 5,
}


class PlugAndPlay(nn.Module):
    """The fixed point of a plug-and-play algorithm, differentiated implicitly.

    For which step sizes do the iterations converge? With f convex and D the proximal operator of a convex function (firmly nonexpansive):
    "pgd" for s < 2/L and "fista" for s ≤ 1/L, L the Lipschitz constant of ∇f (:func:`squared_norm`); "hqs", "admm" and "drs" for every
    s > 0. A learned denoiser that is not nonexpansive may need smaller steps, or may have no fixed point: the status says so.

    Args:
        algorithm: "pgd", "fista", "admm", "drs" or "hqs".
        denoiser: ``(x, sigma) -> x``, or ``x -> x`` if ``sigma`` is None: any module or function.
        data_fidelity: an object with ``grad(x, y)`` ("pgd", "fista") or ``prox(x, y, gamma=...)`` (the others), such as
            :class:`~difflayers.prox.L2`; deepinv's, if ``physics`` is given at the call.
        stepsize: s, one number, or one for each image, ``(*batch,)``. An ``nn.Parameter`` is learned. Where it is not positive, the
            image fails.
        sigma: the noise level that the denoiser is told. An ``nn.Parameter`` is learned.
        prior: in place of ``denoiser`` an object with ``prox(x, gamma=s)``, or with ``sigma`` ``prox(x, sigma, gamma=s)``.
        solver: "picard" (the algorithm as it is), "anderson" (accelerated), or a solver as in
            :func:`~difflayers.implicit.implicit_fixed_point`. "fista" has its own momentum.
        backward: "ift" is exact; "jfb", "phantom" and "neumann" are cheaper approximations, and "unroll" differentiates ``max_iter`` steps.
        linear_solver: the linear solver of "ift".
        tol: ‖T(v) − v‖ / ‖v‖ at which an image stops; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: applications of T; None for 1000, and 100 with "unroll".
        on_failure: what happens to images without a fixed point: ``"raise"``, ``"nan"`` or ``"warn"``.
        neumann_terms: of the series that "neumann" sums.
        phantom_steps: of "phantom".
        batch_ndim: how many leading dimensions count images.

    Raises:
        ValueError: an algorithm, solver or number that has no meaning.
        TypeError: a denoiser or data fidelity that cannot do what the algorithm asks.

    Example:
        >>> import torch
        >>> from difflayers.prox import L2, Mask, PlugAndPlay
        >>> seen = torch.tensor([1.0, 1.0, 0.0, 1.0])
        >>> smooth = lambda x: (x.roll(1, -1) + 2 * x + x.roll(-1, -1)) / 4
        >>> inpaint = PlugAndPlay("admm", denoiser=smooth, data_fidelity=L2(Mask(seen)))
        >>> y = torch.tensor([[4.0, 2.0, 0.0, 6.0]], dtype=torch.float64, requires_grad=True)
        >>> x = inpaint(y)
        >>> print([round(value, 3) for value in x[0].tolist()], torch.autograd.grad(x[0, 2], y)[0].round(decimals=3))
        [4.0, 3.0, 4.0, 5.0] tensor([[0.0000, 0.5000, 0.0000, 0.5000]], dtype=torch.float64)
    """

    stepsize: Tensor | float
    sigma: Tensor | float | None

    def __init__(
        self,
        algorithm: Literal["pgd", "fista", "admm", "drs", "hqs"] = "pgd",
        denoiser: Callable[..., Tensor] | None = None,
        data_fidelity: Any = None,
        stepsize: Tensor | float = 1.0,
        sigma: Tensor | float | None = None,
        *,
        prior: Any = None,
        solver: str | Callable[..., Any] = "picard",
        backward: Backward = "ift",
        linear_solver: LinearSolver = "auto",
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
        neumann_terms: int = 10,
        phantom_steps: int = 5,
        batch_ndim: int = 1,
    ) -> None:
        super().__init__()
        _check(algorithm, denoiser, prior, data_fidelity, stepsize, sigma, solver)
        self.algorithm, self.solver, self.backward, self.linear_solver = algorithm, solver, backward, linear_solver
        self.denoiser, self.prior, self.data_fidelity = denoiser, prior, data_fidelity
        self.tol, self.max_iter, self.on_failure, self.batch_ndim = tol, max_iter, on_failure, batch_ndim
        self.neumann_terms, self.phantom_steps = neumann_terms, phantom_steps
        for name, value in (("stepsize", stepsize), ("sigma", sigma)):
            hold(self, name, value)

    def forward(self, y: Tensor, x0: Tensor | None = None, *, physics: Any = None) -> Tensor:
        """The reconstruction.

        Args:
            y: the measurements of one or several images.
            x0: ``(*batch, ...)``, where the algorithm starts; None for Aᵀ y. No derivative flows to it.
            physics: an operator, handed to the data fidelity as deepinv's algorithms do.

        Returns:
            A tensor like ``x0``.
        """
        return self.solve(y, x0, physics=physics).x

    @eager
    def solve(self, y: Tensor, x0: Tensor | None = None, *, physics: Any = None) -> Solution:
        """As :meth:`forward`, with ``status``, ``residual`` and ``iterations`` of each image, ``(*batch,)``.

        Args:
            y: the measurements.
            x0: where the algorithm starts; None for Aᵀ y.
            physics: an operator, handed to the data fidelity.

        Raises:
            NotConvergedError: with ``.solution``, if ``on_failure="raise"``.
        """
        given = () if physics is None else (physics,)
        x = self._start(y, x0, given)
        algorithm = UNROLLED_FISTA if self.algorithm == "fista" and self.backward == "unroll" else ALGORITHMS[self.algorithm]

        def step(state: Any, y: Tensor, stepsize: Tensor | float) -> Any:
            # A number stays one: a prior may know a shortcut for it.
            return algorithm.step(state, self._terms(y, spread(stepsize, x) if isinstance(stepsize, Tensor) else stepsize, given))

        max_iter = (100 if self.backward == "unroll" else 1000) if self.max_iter is None else self.max_iter
        fixed_point = implicit_fixed_point(
            step,
            fista if self.algorithm == "fista" else self.solver,
            backward=self.backward,
            linear_solver=self.linear_solver,
            batch_ndim=self.batch_ndim,
            tol=self.tol,
            max_iter=max_iter,
            neumann_terms=self.neumann_terms,
            phantom_steps=self.phantom_steps,
            on_failure=self.on_failure,
        )
        try:
            found = fixed_point.solve(algorithm.start(x), y, self._positive_stepsize(x))
        except SolveError as error:
            if error.solution is not None:
                error.solution = error.solution._replace(x=_image(error.solution.x))
            error.add_note(f"PlugAndPlay: {self.algorithm!r} {_ADVICE[self.algorithm]}.")
            raise
        if self.backward == "unroll":
            found = found._replace(iterations=torch.full_like(found.iterations, max_iter))
        return found._replace(x=_image(found.x))

    def _terms(self, y: Tensor, s: Tensor | float, physics: tuple[Any, ...]) -> Terms:
        told = () if self.sigma is None else (self.sigma,)
        return Terms(
            descend=lambda x: x - s * self.data_fidelity.grad(x, y, *physics),
            fit=lambda x: self.data_fidelity.prox(x, y, *physics, gamma=s),
            denoise=lambda x: self.prior.prox(x, *told, gamma=s) if self.denoiser is None else self.denoiser(x, *told),
        )

    def _start(self, y: Tensor, x0: Tensor | None, physics: tuple[Any, ...]) -> Tensor:
        if x0 is None:
            with torch.no_grad():
                if hasattr(self.data_fidelity, "start"):
                    x0 = self.data_fidelity.start(y, *physics)
                elif physics:
                    x0 = physics[0].A_adjoint(y)
                else:
                    raise TypeError(f"{type(self.data_fidelity).__name__} does not say where to start (no method start(y)); pass x0")
        if x0.dim() < self.batch_ndim:
            raise ShapeError(f"with batch_ndim={self.batch_ndim} an image has at least as many dimensions, got shape {tuple(x0.shape)}")
        # Where y is NaN the start would be, too, and no derivative exists there that could be set to zero.
        return torch.where(torch.isfinite(x0), x0, 0).detach()

    def _positive_stepsize(self, x: Tensor) -> Tensor | float:
        if not isinstance(self.stepsize, Tensor):
            return self.stepsize
        s = self.stepsize.to(x)
        if s.dim() > self.batch_ndim or any(k not in (1, n) for k, n in zip(s.shape, x.shape, strict=False)):
            raise ShapeError(f"stepsize is one number, or one for each image {tuple(x.shape[: self.batch_ndim])}; got {tuple(s.shape)}")
        return torch.where(s > 0, s, torch.nan)

    def extra_repr(self) -> str:
        """The algorithm and its options."""
        shown = [repr(self.algorithm)]
        for name in ("stepsize", "sigma"):
            value = getattr(self, name)
            if value is not None:
                shown.append(f"{name}={number_or_shape(value)}")
        shown += [f"{name}={getattr(self, name)!r}" for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        return ", ".join(shown)


def _image(state: Any) -> Any:
    return _pytree.tree_leaves(state)[0]


def _check(algorithm: str, denoiser: Any, prior: Any, data_fidelity: Any, stepsize: Any, sigma: Any, solver: Any) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not known; choose one of {', '.join(ALGORITHMS)}")
    if algorithm == "fista" and solver != "picard":
        raise ValueError(f"'fista' is an acceleration already; for solver={solver!r} take algorithm='pgd'")
    if (denoiser is None) == (prior is None):
        raise TypeError("give a denoiser (x, sigma) -> x, or a prior with .prox(x, gamma=...): one of the two")
    if denoiser is not None and not callable(denoiser):
        raise TypeError(f"the denoiser must be callable, got {type(denoiser).__name__}; an object with .prox is a prior=")
    if prior is not None and not callable(getattr(prior, "prox", None)):
        raise TypeError(f"the prior must have a method prox(x, gamma=...), got {type(prior).__name__}; a denoiser goes to denoiser=")
    needs = ALGORITHMS[algorithm].needs
    if not callable(getattr(data_fidelity, needs, None)):
        raise TypeError(f"{algorithm!r} calls data_fidelity.{needs}, which {type(data_fidelity).__name__} has not")
    for name, value in (("stepsize", stepsize), ("sigma", sigma)):
        if isinstance(value, int | float) and not (value > 0 if name == "stepsize" else value >= 0):
            raise ValueError(f"{name} must be {'positive' if name == 'stepsize' else 'non-negative'}, got {value}")
