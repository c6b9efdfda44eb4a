r"""Matching by the loss, with a straight-through gradient: the permutations of a network near a, chosen by what they do to the loss.

Weight matching to a reads no data. Here b is matched to :math:`\hat θ`, weights that start at :math:`θ_A` and are trained so that the loss
of what lies between the two networks falls:

.. math::  \min_{\hat θ} L\bigl(\tfrac12 θ_A + \tfrac12 π_{\hat θ}(θ_B)\bigr), \qquad π_{\hat θ} = \arg\max_π ⟨\hat θ, π(θ_B)⟩.

The permuted weights are piecewise constant in :math:`\hat θ` and have no useful derivative; it is a choice, that of the identity, as if
:math:`π_{\hat θ}(θ_B)` were :math:`\hat θ` itself. So the losses need not fall from step to step, and the best permutations met are kept.

Reference: Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .matching import comparable, weight_matching
from .running import number, repeated
from .sinkhorn_rebasin import FitResult
from .spec import PermutationSpec

__all__ = ["straight_through_matching"]


def straight_through_matching(
    spec: PermutationSpec,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    objective: Callable[..., Tensor],
    batches: Iterable[Any] | None = None,
    *,
    evaluate: Callable[[dict[str, Tensor]], float | Tensor],
    init: Mapping[str, Tensor] | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    callback: Callable[[int, float], object] | None = None,
) -> FitResult:
    """Permutations that bring b to a by what the loss between them says. The best ones met are returned, those of the start among them.

    Args:
        spec: the symmetries of the network.
        params_a: name → weight or buffer (``state_dict()``).
        params_b: the same names and shapes.
        objective: ``objective(params, *batch) -> scalar`` of the permuted weights of b, such as
            ``MidpointObjective(model, params_a, loss_fn)``.
        batches: tuples of tensors, such as a DataLoader; read again when it ends. None: the objective takes no batch.
        evaluate: ``evaluate(params)``, of the permuted weights: what is to be small in the end. It is asked again only when the
            permutations have changed.
        init: permutations to start from. None: those of :func:`weight_matching`.
        steps: how many.
        learning_rate: of Adam, for the weights to which b is matched. For a permutation to change, they must move by as much as the
            weights of units differ.
        callback: called as ``callback(step, loss)`` after each step, for a progress bar.

    Raises:
        ShapeError: names or shapes differ, or the spec does not know them.
        ValueError: ``batches`` gave nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import MidpointObjective, PermutationSpec, straight_through_matching
        >>> torch.manual_seed(0)
        <...>
        >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(50, 2)
        >>> spec, a, y = PermutationSpec.from_module(model, x), model.state_dict(), model(x).detach()
        >>> objective = MidpointObjective(model, a, lambda network: (network(x) - y).square().mean())
        >>> b = spec.apply(a, spec.random())
        >>> straight_through_matching(spec, a, b, objective, evaluate=objective, steps=5).score < 1e-9
        True
    """
    weights, _ = comparable(spec, params_a, params_b)
    near = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.Adam(near.values(), lr=learning_rate)
    b = {name: tensor.detach() for name, tensor in params_b.items()}
    found = weight_matching(spec, params_a, b) if init is None else spec.completed(init, "init")
    permuted = spec.apply(b, found)
    best, best_step = found, 0
    start = score = _evaluated(evaluate, permuted)
    stream, losses = repeated(batches), []
    for step in range(1, steps + 1):
        with torch.enable_grad():
            passed = {name: tensor + (near[name] - near[name].detach()).to(tensor) for name, tensor in permuted.items() if name in near}
            passed = {name: passed.get(spec.tied.get(name, name), tensor) for name, tensor in permuted.items()}
            loss = objective(passed, *next(stream))
            optimizer.zero_grad()
            loss.backward(inputs=list(near.values()))
        optimizer.step()
        losses.append(float(loss.detach()))
        new = weight_matching(spec, near, {name: b[name] for name in near}, init=found)
        if any(not torch.equal(new[group], found[group]) for group in new):
            found, permuted = new, spec.apply(b, new)
            value = _evaluated(evaluate, permuted)
            if value < score:
                score, best, best_step = value, found, step
        if callback is not None:
            callback(step, losses[-1])
    return FitResult(best, score, start, best_step, losses)


def _evaluated(evaluate: Callable[[dict[str, Tensor]], float | Tensor], params: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return number(evaluate(params))
