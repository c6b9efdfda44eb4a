r"""Incremental learning by re-basin: a new task is learned so that it can be averaged with what is known.

After tasks 1, …, i − 1 there is a network :math:`θ_{i-1}`; their data are gone. Renaming its hidden units by permutations π does not change
what it computes. The network θ of task i, started anywhere, and π are chosen by the loss :math:`L_i` of the new task alone,

.. math:: \min_{θ,\, π} \; L_i(θ) + w \, L_i\bigl((1-λ)\,π(θ_{i-1}) + λ\,θ\bigr) + μ \, ‖θ - π(θ_{i-1})‖^2 ,

and :math:`θ_i = (1-α)\,π(θ_{i-1}) + α\,θ` is kept. The second term holds the new task's loss low between the two, where :math:`θ_i` is.
On the old tasks :math:`θ_i` is worse than :math:`π(θ_{i-1})`, which is as good as ever, by as much as its distance allows, α times that of
θ: small α, large μ and a good π remember, large α learns.

The two blocks are minimized in turn. For the permutations, Sinkhorn re-basin (:class:`~difflayers.rebasin.SinkhornRebasin`) with θ held:
the best hard ones met are taken, those at the start among them. For θ, Adam with hard permutations, so that each term is the loss of a
network and not of a mixture of units.

Peña et al. (Re-basin via implicit Sinkhorn differentiation, CVPR 2023, arXiv:2212.12042) introduced learning by re-basin: a cost of
the new task alone that exploits linear mode connectivity, with permutations of the previous network that are learned by gradient. We had
this description of it, and not their formula: the cost above, the turns and the weights are ours. With π the identity and
:math:`w = μ = 0`, :math:`θ_i` is plain weight interpolation (see Kozal et al., Continual learning with weight interpolation, 2024,
arXiv:2404.04002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NotConvergedError, ShapeError
from .barrier import interpolate
from .matching import weight_matching
from .objectives import MidpointObjective, l2_distance
from .running import repeated
from .sinkhorn_rebasin import SinkhornRebasin
from .spec import PermutationSpec

__all__ = ["IncrementalResult", "incremental_rebasin"]

_PERMUTATION_STEPS = 80


class IncrementalResult(NamedTuple):
    """What :func:`incremental_rebasin` returns.

    Attributes:
        params: the network to keep, name → weight or buffer: (1 − merge) · the old network renamed + merge · ``endpoint``.
        endpoint: the network of the new task alone.
        permutations: group → int64 ``(n,)``, which bring the old network to ``endpoint``. What else is stored in the order of its
            units must be renamed alike.
        losses: the objective at each step; without the loss of the new network itself where permutations are trained, which do not
            change it.
    """

    params: dict[str, Tensor]
    endpoint: dict[str, Tensor]
    permutations: dict[str, Tensor]
    losses: list[float]


def incremental_rebasin(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    example_input: Any = None,
    spec: PermutationSpec | None = None,
    start: Mapping[str, Tensor] | None = None,
    init: Mapping[str, Tensor] | None = None,
    merge: float = 0.5,
    point: float | Literal["random"] = 0.5,
    line_weight: float = 1.0,
    proximity: float = 0.0,
    rounds: int = 1,
    permutation_steps: int | None = None,
    weight_steps: int = 200,
    epsilon: float = 0.5,
    permutation_learning_rate: float = 0.3,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> IncrementalResult:
    """Learns a new task from its data alone, in such a way that the result can be averaged with the network of the tasks before.

    BatchNorm layers normalize by the statistics of the batch meanwhile, and the running statistics that come back are an average: load
    ``params`` and call :func:`~difflayers.rebasin.repair_batchnorm`.

    Args:
        model: the network after the tasks before. It is copied, never changed. Dropout and the like run in its mode. Weights that require
            no gradient are not trained.
        loss_fn: ``loss_fn(network, *batch) -> scalar``, with a network that can be called like the model.
        batches: tuples of tensors of the new task, such as a DataLoader; finite, read again when it ends.
        example_input: what the model takes, for :meth:`PermutationSpec.from_module`. Not needed with a ``spec``.
        spec: the permutation symmetries of the model. None: they are found.
        start: name → weight or buffer of the network that learns the new task, perhaps one that knows it already. None: the model, whose
            units have the right names from the start.
        init: permutations of the model to start from, group → int64 ``(n,)``. None: those of
            :func:`~difflayers.rebasin.weight_matching` if there is a ``start``, else the identity.
        merge: α, the share of the new network in what is kept, from 0 to 1. 1 / i for task i gives each task the same.
        point: λ, where on the line from the old network (0) to the new one (1) the loss is asked, or ``"random"``: anywhere, anew each
            time (which of the permutations met are best is judged at 0.5 then).
        line_weight: w. 0 leaves the line alone, and then the permutations as they are at the start unless ``proximity`` moves them.
        proximity: μ.
        rounds: how often the two blocks take turns.
        permutation_steps: how many steps in a round train the permutations. None: 80 if there is a ``start``, else none.
        weight_steps: how many steps in a round train the new network.
        epsilon: the temperature of the relaxed permutations, which start from scores of 1 and 0.
        permutation_learning_rate: of Adam, for the scores.
        learning_rate: of Adam, for the new network.
        generator: source of randomness for ``point="random"``, on the CPU.
        callback: called as ``callback(step, loss)`` after each step, counted from 1, for a progress bar.

    Raises:
        UnsupportedModuleError: the symmetries of the model cannot be proved.
        ShapeError: ``start`` or ``init`` does not fit the model.
        NotConvergedError: the objective is not finite any more.
        ValueError: an option is out of its range, ``batches`` gave nothing, or there is neither ``example_input`` nor ``spec``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.functional import mse_loss
        >>> from difflayers.rebasin import incremental_rebasin
        >>> seed, x = torch.manual_seed(0), torch.linspace(0, 1, 20).unsqueeze(1)
        >>> model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> loss_fn = lambda network, x, y: mse_loss(network(x), y)
        >>> found = incremental_rebasin(model, loss_fn, [(x, x**2)], example_input=x, learning_rate=1e-2)
        >>> state = model.load_state_dict(found.params)
        >>> bool(loss_fn(model, x, x**2) < 0.01)
        True
    """
    if permutation_steps is None:
        permutation_steps = 0 if start is None else _PERMUTATION_STEPS
    _validate(
        {"merge": merge, "point": 0.0 if point == "random" else point},
        {"line_weight": line_weight, "proximity": proximity},
        {"rounds": rounds, "permutation_steps": permutation_steps, "weight_steps": weight_steps},
    )
    if spec is None:
        if example_input is None:
            raise ValueError("give an example_input, from which the symmetries of the model are found, or a spec")
        spec = PermutationSpec.from_module(model, example_input)
    old = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    new = _trainable(model, old if start is None else start)
    if init is None:
        init = spec.identity() if start is None else weight_matching(spec, start, old)
    permutations = spec.completed(init, "init")
    line, losses = MidpointObjective(model, new, loss_fn), list[float]()

    def objective(anchor: Mapping[str, Tensor], *batch: Any, at: float | None = None) -> Tensor:
        """What depends on the permutations."""
        if at is None:
            at = float(torch.rand((), generator=generator)) if point == "random" else point
        total = line_weight * line.at(anchor, at, *batch) if line_weight else torch.zeros(())
        return total + proximity * l2_distance(anchor, new) if proximity else total

    @torch.no_grad()
    def evaluate(anchor: Mapping[str, Tensor]) -> float:
        at = 0.5 if point == "random" else point
        values = [float(objective(anchor, *(batch if isinstance(batch, tuple | list) else (batch,)), at=at)) for batch in batches]
        return sum(values) / len(values)

    def report(loss: float) -> None:
        losses.append(loss)
        if callback is not None:
            callback(len(losses), loss)

    leaves = list({id(tensor): tensor for tensor in new.values() if tensor.requires_grad}.values())
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    stream = repeated(batches)
    next(repeated(batches))  # says so if there is none
    for _ in range(rounds):
        if permutation_steps and (line_weight or proximity) and spec.sizes:
            rebasin = SinkhornRebasin(model, spec=spec, epsilon=epsilon, init=permutations)
            fit = rebasin.fit(
                objective,
                batches,
                evaluate=evaluate,
                steps=permutation_steps,
                learning_rate=permutation_learning_rate,
                callback=lambda _, loss: report(loss),
            )
            permutations = fit.permutations
        anchor = spec.apply(old, permutations)
        for _ in range(weight_steps):
            batch = next(stream)
            loss = line.at(anchor, 1.0, *batch) + objective(anchor, *batch)
            optimizer.zero_grad()
            loss.backward(inputs=leaves)
            optimizer.step()
            report(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NotConvergedError(
                    f"the objective is {losses[-1]} at step {len(losses)}; try a smaller learning_rate than {learning_rate}"
                )
    endpoint = {name: tensor.detach().clone() for name, tensor in new.items()}
    return IncrementalResult(interpolate(spec.apply(old, permutations), endpoint, merge), endpoint, permutations, losses)


def _validate(shares: Mapping[str, float], weights: Mapping[str, float], counts: Mapping[str, int]) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 (the old network) and 1 (the new one), got {value}")
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def _trainable(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights, leaves where the model trains them; names of one and the same weight share its copy."""
    own = model.state_dict(keep_vars=True)
    if own.keys() != start.keys():
        raise ShapeError(f"start must have the names of the model; only one of them has {', '.join(sorted(own.keys() ^ start.keys()))}")
    copies: dict[int, Tensor] = {}
    found = {}
    for name, tensor in own.items():
        if start[name].shape != tensor.shape:
            raise ShapeError(f"{name} has the shape {tuple(tensor.shape)} in the model and {tuple(start[name].shape)} in start")
        if id(tensor) not in copies:
            copies[id(tensor)] = start[name].detach().to(tensor, copy=True).requires_grad_(tensor.requires_grad)
        found[name] = copies[id(tensor)]
    return found
