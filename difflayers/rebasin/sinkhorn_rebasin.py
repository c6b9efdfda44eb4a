r"""Sinkhorn re-basin: permutations of hidden units that are learned by gradient.

Each group of n units has scores :math:`X`, and a relaxed permutation

.. math:: S_ε(X) = \arg\max_{S \ge 0} \; ⟨S, X⟩ - ε \sum_{ij} S_{ij} \log S_{ij} \quad\text{subject to}\quad S 1 = 1,\; S^T 1 = 1,

n times the transport plan of the cost −X between uniform marginals. The weights permuted by it, :math:`W_ℓ ← S_ℓ W_ℓ S_{ℓ-1}^T`, are
differentiable in the scores by the implicit function theorem (:func:`~difflayers.transport.sinkhorn`), so that any objective of the
permuted network (:mod:`~difflayers.rebasin.objectives`) trains them. In the end the permutations nearest to the S are taken, by linear
assignment.

Reference: Peña et al., Re-basin via implicit Sinkhorn differentiation, CVPR 2023, arXiv:2212.12042.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SolveError
from ..solution import OnFailure
from ..transport import sinkhorn
from .assignment import assign
from .inference.probe import first_names
from .running import number, repeated
from .spec import PermutationSpec

__all__ = ["FitResult", "RelaxedPermutations", "SinkhornRebasin"]


class RelaxedPermutations(NamedTuple):
    """What :meth:`SinkhornRebasin.solve` returns: dicts with an entry for each group of n units.

    Attributes:
        matrices: ``(n, n)``, doubly stochastic: [i, j] the part of the old unit j in the new unit i. Differentiable.
        status: codes of :class:`~difflayers.Status`, ``()``.
        marginal_error: ``()``, the larger of the mean errors of the row sums and of the column sums.
        iterations: ``()`` int64.
    """

    matrices: dict[str, Tensor]
    status: dict[str, Tensor]
    marginal_error: dict[str, Tensor]
    iterations: dict[str, Tensor]


class FitResult(NamedTuple):
    """What :meth:`SinkhornRebasin.fit` returns.

    Attributes:
        permutations: the best ones met, group → int64 ``(n,)``.
        score: what ``evaluate`` said of them.
        start_score: what it said of the permutations at the start; never less than ``score``.
        step: after which step they were met; 0 is the start.
        losses: the objective at each step.
    """

    permutations: dict[str, Tensor]
    score: float
    start_score: float
    step: int
    losses: list[float]


class SinkhornRebasin(nn.Module):
    """The weights of a network with its hidden units softly permuted, as a function of learnable scores.

    The module keeps its own copy of the weights and buffers of the model: the model is not changed, and later changes of it are not seen.
    The copy is constant, and only the scores are among ``parameters()``, unless ``train_weights=True``. ``state_dict()`` holds both.
    Tied weights stay tied. Integer buffers are passed on. Running statistics of BatchNorm are mixed like any other vector, which means
    something for hard permutations only: the objectives do not use them.

    Args:
        model: the network to be permuted.
        example_input: what the model takes, for :meth:`PermutationSpec.from_module`. Not needed with a ``spec``.
        epsilon: the temperature. The scores start at 1 where the permutation is and at 0 elsewhere. Of 64 units each keeps a share of
            0.997 at 0.1 then, and 0.31 at 0.3, with 0.011 of each of the others: soft enough to feel what they would be worth.
        init: permutations to start near, group → int64 ``(n,)``, as from ``weight_matching``; the identity for groups that are not there.
        spec: the permutation symmetries of the model. None: they are found.
        train_weights: whether the copy of the weights is to be trained, too. Those that require no gradient in the model stay constant.
        tol: as in :func:`~difflayers.transport.sinkhorn`.
        max_iter: as in :func:`~difflayers.transport.sinkhorn`.
        on_failure: as in :func:`~difflayers.transport.sinkhorn`; a failed group with ``"nan"`` makes the weights that it touches NaN.

    Raises:
        UnsupportedModuleError: the symmetries of the model cannot be proved.
        ShapeError: ``init`` does not fit the groups.
        ValueError: neither ``example_input`` nor ``spec`` is given, or nothing can be permuted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import L2Objective, PermutationSpec, SinkhornRebasin
        >>> generator = torch.Generator().manual_seed(0)
        >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(5, 2, generator=generator)
        >>> spec = PermutationSpec.from_module(model, x)
        >>> objective = L2Objective(spec.apply(model.state_dict(), spec.random(generator=generator)))
        >>> rebasin = SinkhornRebasin(model, spec=spec)
        >>> found = rebasin.fit(objective, evaluate=objective, steps=50)
        >>> found.start_score > 0.0, found.score
        (True, 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        epsilon: float = 0.3,
        init: Mapping[str, Tensor] | None = None,
        spec: PermutationSpec | None = None,
        train_weights: bool = False,
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if spec is None:
            if example_input is None:
                raise ValueError("give an example_input, from which the symmetries of the model are found, or a spec")
            spec = PermutationSpec.from_module(model, example_input)
        if not spec.sizes:
            raise ValueError("no weight of this model can be permuted: the spec has no group")
        self.spec, self.epsilon, self.train_weights = spec, epsilon, train_weights
        self.tol, self.max_iter = tol, max_iter
        self.on_failure: OnFailure = on_failure
        self.weights = nn.Module()
        self._first = first_names(model)
        self._copy(model)
        self._groups: dict[int, list[str]] = {}
        for group, size in spec.sizes.items():
            self._groups.setdefault(size, []).append(group)
        floating = next(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
        dtype = torch.promote_types(floating.dtype, torch.float32)
        scores = self._scores_at({} if init is None else init)
        self.scores = nn.ParameterDict({str(size): nn.Parameter(part.to(floating.device, dtype)) for size, part in scores.items()})

    def forward(self) -> dict[str, Tensor]:
        """The softly permuted weights and buffers, with the names of ``model.state_dict()``; differentiable in the scores."""
        return self._permuted(self.solve().matrices)

    def solve(self) -> RelaxedPermutations:
        """The relaxed permutations with their status. Groups of one size are one batch."""
        return self._solve(self.on_failure)

    @torch.no_grad()
    def permutations(self) -> dict[str, Tensor]:
        """The permutations nearest to the relaxed ones, by linear assignment: group → int64 ``(n,)``, on the CPU.

        Raises:
            NotConvergedError: a group has failed (with ``on_failure="nan"``, too: there is no NaN permutation).
        """
        matrices = self._solve("raise" if self.on_failure == "nan" else self.on_failure).matrices
        return {group: assign(matrices[group]) for group in self.spec.sizes}

    @torch.no_grad()
    def harden(self) -> dict[str, Tensor]:
        """The weights and buffers permuted by :meth:`permutations`, a network equivalent to the model. Without a graph."""
        return {name: tensor.detach().clone() for name, tensor in self._permuted(self.permutations()).items()}

    def fit(
        self,
        objective: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        *,
        evaluate: Callable[[dict[str, Tensor]], float | Tensor],
        steps: int = 200,
        learning_rate: float = 0.1,
        every: int = 10,
        callback: Callable[[int, float], object] | None = None,
    ) -> FitResult:
        """Trains the scores by Adam, and ends with the best permutations met, those of the start among them.

        The hardened weights are evaluated before the first step, then every few steps and after the last one. So if ``evaluate`` is the
        barrier on training data, this barrier is never higher in the end than at the start.

        Args:
            objective: ``objective(params, *batch) -> scalar``, one of :mod:`difflayers.rebasin.objectives` or another.
            batches: tuples of tensors, such as a DataLoader; read again when it ends. None: the objective takes no batch.
            evaluate: ``evaluate(params)``, of hard-permuted weights: what is to be small in the end. It is asked again only when the
                permutations have changed.
            steps: how many.
            learning_rate: of Adam.
            every: how many steps from one evaluation to the next.
            callback: called as ``callback(step, loss)`` after each step, for a progress bar.

        Raises:
            ValueError: ``batches`` gave nothing.
            NotConvergedError: scores are not finite any more (with ``on_failure="raise"``). The best ones met are in place.
        """
        optimizer = torch.optim.Adam(self.scores.parameters(), lr=learning_rate)
        stream = repeated(batches)
        losses: list[float] = []
        last = self.permutations()
        start = score = number(evaluate(self.harden()))
        best, best_step, kept = last, 0, self._snapshot()
        try:
            for step in range(1, steps + 1):
                loss = objective(self(), *next(stream))
                optimizer.zero_grad()
                loss.backward(inputs=list(self.scores.parameters()))
                optimizer.step()
                losses.append(float(loss.detach()))
                if step % every == 0 or step == steps:
                    now = self.permutations()
                    if any(not torch.equal(now[group], last[group]) for group in now):
                        last, found = now, number(evaluate(self.harden()))
                        if found < score:
                            score, best, best_step, kept = found, now, step, self._snapshot()
                if callback is not None:
                    callback(step, losses[-1])
        finally:
            optimizer.zero_grad()
            self.scores.load_state_dict(kept)
        return FitResult(best, score, start, best_step, losses)

    def extra_repr(self) -> str:
        """The groups, the temperature and the options that differ from their defaults."""
        options = {"tol": self.tol, "max_iter": self.max_iter, "train_weights": self.train_weights or None}
        shown = [f"epsilon={self.epsilon}", f"on_failure={self.on_failure!r}"]
        return ", ".join([repr(self.spec), *shown, *(f"{name}={value!r}" for name, value in options.items() if value is not None)])

    def _solve(self, on_failure: OnFailure) -> RelaxedPermutations:
        found = RelaxedPermutations({}, {}, {}, {})
        for size, groups in self._groups.items():
            cost = -self.scores[str(size)]
            try:
                solution = sinkhorn(cost, epsilon=self.epsilon, tol=self.tol, max_iter=self.max_iter, on_failure=on_failure)
            except SolveError as error:
                error.add_note(f"The elements of the batch are the groups {', '.join(groups)}; were their scores driven too far?")
                raise
            parts = (size * solution.plan, solution.status, solution.marginal_error, solution.iterations)
            for values, part in zip(found, parts, strict=True):
                values.update(zip(groups, part.unbind(), strict=True))
        return found

    def _copy(self, model: nn.Module) -> None:
        """The weights of the model under ``self.weights``; names of one and the same tensor share it."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self._first[name] != name:
                continue
            copied = tensor.detach().clone()
            if self.train_weights and isinstance(tensor, nn.Parameter):
                self.weights.register_parameter(_attribute(name), nn.Parameter(copied, requires_grad=tensor.requires_grad))
            else:
                self.weights.register_buffer(_attribute(name), copied)

    def _permuted(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: getattr(self.weights, _attribute(name)) for name in dict.fromkeys(self._first.values())}
        permuted = self.spec.apply(own, permutations)
        return {name: permuted[first] for name, first in self._first.items()}

    def _scores_at(self, permutations: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Scores of 1 where the permutations are, 0 elsewhere; size → ``(groups, n, n)``."""
        start = self.spec.completed(permutations, "init")
        return {size: torch.stack([torch.eye(size)[start[group]] for group in groups]) for size, groups in self._groups.items()}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.scores.state_dict().items()}


def _attribute(name: str) -> str:
    # A module refuses names with dots.
    return name.replace(".", "/")
