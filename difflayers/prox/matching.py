r"""Proximal matching: the loss that makes a denoiser the proximal operator of the prior, and its schedule.

Let x be drawn from a distribution with density p and y = x + noise. A denoiser f trained on pairs (y, x) by the mean of ‖f(y) − x‖² becomes
the mean of x given y, by ‖f(y) − x‖₁ the medians. With

.. math:: \ell_γ(f(y), x) = 1 - \exp\bigl(-\|f(y) - x\|^2 / γ^2\bigr)

it becomes, as γ → 0, the mode: :math:`\arg\max_x p(x \mid y)`. For Gaussian noise of variance σ² that is the proximal operator of
−σ² log p, so the prior can be read off the network, see :class:`~difflayers.LearnedProximalNetwork`.

The loss is flat where the error is much larger than γ, and training from scratch would not begin. So it begins with the 1-norm, and γ falls
by stages: :class:`ProximalMatchingSchedule`.

References: Fang, Buchanan and Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024 (arXiv:2310.14344).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeError

__all__ = ["MatchingStage", "ProximalMatchingLoss", "ProximalMatchingSchedule"]


class ProximalMatchingLoss(nn.Module):
    r"""The mean over samples of 1 − exp(−(‖input − target‖/γ)²), the norm over all entries of a sample.

    γ is a distance between whole samples: it grows with the square root of the number of entries. Its order of magnitude is that of the
    error that is left, :class:`ProximalMatchingSchedule` has the published choice.

    Args:
        gamma: γ > 0.
        batch_ndim: the first ``batch_ndim`` dimensions count samples. With 0 the whole tensor is one sample.

    Raises:
        ValueError: gamma is not a positive number.

    Example:
        >>> import torch
        >>> from difflayers.prox import ProximalMatchingLoss
        >>> loss = ProximalMatchingLoss(gamma=0.5)
        >>> loss(torch.tensor([[0.1, 0.0], [3.0, 4.0]]), torch.zeros(2, 2))  # the second sample is lost, and hardly has a gradient
        tensor(0.5196)
    """

    def __init__(self, gamma: float, *, batch_ndim: int = 1) -> None:
        super().__init__()
        self.gamma = _positive(gamma, "gamma")
        if not isinstance(batch_ndim, int) or batch_ndim < 0:
            raise ValueError(f"batch_ndim must be an integer of at least 0, got {batch_ndim!r}")
        self.batch_ndim = batch_ndim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            input: ``(*batch, ...)``, what the denoiser returned.
            target: like input, the clean samples.

        Returns:
            A scalar in [0, 1].

        Raises:
            ShapeError: the shapes differ (nothing is broadcast), there are fewer dimensions than ``batch_ndim``, no sample,
                or numbers that are not floating.
        """
        if input.shape != target.shape:
            raise ShapeError(f"input and target must have one shape, got {tuple(input.shape)} and {tuple(target.shape)}")
        if not input.is_floating_point() or not target.is_floating_point():
            raise ShapeError(f"input and target must be floating, got {input.dtype} and {target.dtype}")
        if input.dim() < self.batch_ndim or input.numel() == 0:
            raise ShapeError(f"wanted samples of shape (*batch, ...) with {self.batch_ndim} batch dimensions, got {tuple(input.shape)}")
        error = (input - target) / self.gamma
        # expm1: the loss of a nearly perfect sample would otherwise be rounded away.
        return -torch.expm1(-error.square().reshape(*error.shape[: self.batch_ndim], -1).sum(-1)).mean()

    def extra_repr(self) -> str:
        """The options."""
        return f"gamma={self.gamma:g}" + (f", batch_ndim={self.batch_ndim}" if self.batch_ndim != 1 else "")


class MatchingStage(NamedTuple):
    """One stage of a :class:`ProximalMatchingSchedule`: so many steps with one loss and one learning rate; γ = None is the 1-norm."""

    steps: int
    gamma: float | None
    learning_rate: float

    @property
    def loss(self) -> nn.Module:
        """``(input, target) -> scalar``."""
        return nn.L1Loss() if self.gamma is None else ProximalMatchingLoss(self.gamma)


class ProximalMatchingSchedule:
    r"""Which loss and which learning rate at which step: the 1-norm first, then proximal matching with γ halved by stages.

    The defaults are the published ones for images with values in [0, 1]: half of 40,000 steps with the 1-norm, then four stages of the
    same length with γ = 0.08 √numel · (8, 4, 2, 1); learning rates 10⁻³ and 10⁻⁴. For other stages see :meth:`from_stages`.

    Args:
        numel: entries of one sample.
        steps: training steps in all.
        l1_share: the share of them with the 1-norm, in (0, 1).
        scale: the last γ is ``scale * sqrt(numel)``; in units of the data, about the root mean square error of one entry at the end.
        halvings: how often γ is halved; the first is ``2**halvings`` times the last.
        learning_rates: of the 1-norm, and of proximal matching.

    Attributes:
        stages: the stages in order, a tuple of :class:`MatchingStage`.
        steps: training steps in all.

    Raises:
        ValueError: an argument is out of range, or there are fewer steps than stages.

    Example:
        >>> import torch
        >>> from difflayers.prox import ProximalMatchingSchedule
        >>> schedule = ProximalMatchingSchedule(numel=1, steps=400)
        >>> network, x = torch.nn.Linear(1, 1), torch.randn(64, 1)
        >>> optimizer = torch.optim.Adam(network.parameters())
        >>> for step in range(schedule.steps):
        ...     optimizer.param_groups[0]["lr"] = schedule.learning_rate(step)
        ...     loss = schedule.loss(step)(network(x + torch.randn_like(x)), x)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> [(stage.steps, stage.gamma) for stage in schedule.stages]
        [(200, None), (50, 0.64), (50, 0.32), (50, 0.16), (50, 0.08)]
    """

    stages: tuple[MatchingStage, ...]
    steps: int

    def __init__(
        self,
        numel: int,
        steps: int = 40_000,
        *,
        l1_share: float = 0.5,
        scale: float = 0.08,
        halvings: int = 3,
        learning_rates: tuple[float, float] = (1e-3, 1e-4),
    ) -> None:
        if not isinstance(numel, int) or numel < 1:
            raise ValueError(f"numel must be the number of entries of a sample, an integer of at least 1, got {numel!r}")
        if not isinstance(halvings, int) or halvings < 0:
            raise ValueError(f"halvings must be an integer of at least 0, got {halvings!r}")
        if not 0 < l1_share < 1:
            raise ValueError(f"l1_share must be in (0, 1), got {l1_share!r}; for stages without it use from_stages")
        last = _positive(scale, "scale") * math.sqrt(numel)
        first = round(l1_share * steps)
        ends = [first + (steps - first) * k // (halvings + 1) for k in range(halvings + 2)]
        rate, low = learning_rates
        self._set(
            [
                MatchingStage(first, None, rate),
                *(MatchingStage(ends[k + 1] - ends[k], last * 2 ** (halvings - k), low) for k in range(halvings + 1)),
            ]
        )

    @classmethod
    def from_stages(cls, stages: Iterable[tuple[int, float | None, float]]) -> ProximalMatchingSchedule:
        """A schedule of given stages.

        Args:
            stages: of each its steps, its γ (None: the 1-norm) and its learning rate.

        Raises:
            ValueError: no stage, or one whose steps, γ or learning rate is not positive.

        Example:
            >>> from difflayers.prox import ProximalMatchingSchedule
            >>> schedule = ProximalMatchingSchedule.from_stages([(1000, None, 1e-3), (500, 0.5, 1e-4), (500, 0.1, 1e-4)])
            >>> schedule.loss(1200)
            ProximalMatchingLoss(gamma=0.5)
        """
        schedule = cls.__new__(cls)
        schedule._set([MatchingStage(*stage) for stage in stages])
        return schedule

    def stage(self, step: int) -> MatchingStage:
        """The stage that a step belongs to. After the last step the last stage goes on.

        Args:
            step: from 0.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def loss(self, step: int) -> nn.Module:
        """The loss at a step, ``(input, target) -> scalar``: ``torch.nn.L1Loss`` or :class:`ProximalMatchingLoss`.

        Args:
            step: from 0.
        """
        return self.stage(step).loss

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step. With a base rate of 1 this is what ``torch.optim.lr_scheduler.LambdaLR`` takes.

        Args:
            step: from 0.
        """
        return self.stage(step).learning_rate

    def _set(self, stages: list[MatchingStage]) -> None:
        if not stages:
            raise ValueError("a schedule needs at least one stage")
        for stage in stages:
            if not isinstance(stage.steps, int) or stage.steps < 1:
                raise ValueError(f"every stage needs an integer number of steps, at least 1, got {stage}; take more steps or fewer stages")
            _positive(stage.learning_rate, "learning_rate")
            if stage.gamma is not None:
                _positive(stage.gamma, "gamma")
        self.stages = tuple(stages)
        self.steps = sum(stage.steps for stage in stages)

    def __repr__(self) -> str:
        return f"ProximalMatchingSchedule.from_stages({[tuple(stage) for stage in self.stages]})"


def _positive(value: float, name: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)
