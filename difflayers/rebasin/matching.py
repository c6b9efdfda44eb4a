r"""Weight matching: the permutations that bring the weights of one network nearest to those of another.

.. math::  \min_π \|θ_A - π(θ_B)\|^2 \quad\Longleftrightarrow\quad \max_π ⟨θ_A, π(θ_B)⟩ = \max_P \sum_ℓ ⟨W^A_ℓ, P_ℓ W^B_ℓ P_{ℓ-1}^T⟩

is a quadratic assignment problem, NP-hard; but it is linear in each permutation while the others are held. Coordinate ascent: with b
renamed by the permutations so far, the similarity of unit i of a and unit j of b is :math:`M_{ij} = \sum ⟨a_i, b_j⟩` over all weights
that the units touch, and the linear assignment of largest M can only raise the objective. Where a group touches both sides of a weight
(a residual stream, :math:`⟨A, P B P^T⟩`) that group alone is a quadratic problem: Frank–Wolfe steps over the doubly stochastic matrices,
an assignment at their end, accepted only if the objective has risen. The end is a local maximum, and which one depends on the start
(:mod:`~difflayers.rebasin.signatures`).

References: Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836. Vogelstein et al., Fast approximate quadratic
programming for graph matching, PLOS ONE 2015, arXiv:1112.5507. Assignment: Crouse 2016, in SciPy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, ShapeError
from .assignment import assign, rows
from .axes import Group, leaves, positions
from .running import STATISTICS
from .signatures import outward
from .spec import Occurrence, PermutationSpec

__all__ = ["weight_matching"]

_ROUNDING = 1e-12  # relative to the norms; a smaller rise is rounding
_FRANK_WOLFE_STEPS = 30


def weight_matching(
    spec: PermutationSpec,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    *,
    init: Mapping[str, Tensor] | None = None,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Permutations that bring b to a: ``spec.apply(params_b, permutations)`` is near ``params_a`` entry by entry.

    A local maximum of the inner product of the two networks; if b is a with its units renamed, it finds the renaming. Two starts are tried
    and the better end is kept: b as it is, and the units matched group by group outward from inputs and outputs.

    Args:
        spec: the symmetries of the network.
        params_a: name → weight (``state_dict()``). Running statistics and integers do not count in the comparison.
        params_b: the same names and shapes.
        init: permutations to start from, in place of the two starts.
        max_iter: how often each group may be visited. Ten is plenty as a rule.
        generator: source of randomness, on the CPU; the groups are visited in random order then, in the order of the weights without.

    Returns:
        group → int64 ``(n,)``, on the CPU.

    Raises:
        ShapeError: names or shapes differ, or the spec does not know them.
        ValueError: a weight is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.rebasin import PermutationSpec, weight_matching
        >>> model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(5, 2)
        >>> spec = PermutationSpec.from_module(model, x)
        >>> renamed = spec.apply(model.state_dict(), spec.random())
        >>> back = spec.apply(renamed, weight_matching(spec, model.state_dict(), renamed))
        >>> all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())
        True
    """
    a, b = comparable(spec, params_a, params_b)
    places = touching(spec, a)
    highest, best = -math.inf, spec.identity()
    for start in [outward(spec, a, b, places), {}] if init is None else [spec.completed(init, "init")]:
        end = ascend(spec, a, b, places, start, max_iter, generator)
        value = _inner(a, spec.apply(b, end))
        if value > highest:
            highest, best = value, end
        if value >= (1 - _ROUNDING) * _bound(a, b, a):
            break
    return best


def comparable(
    spec: PermutationSpec, params_a: Mapping[str, Tensor], params_b: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of both that count, on the device of a, and no less than float32.

    Args:
        spec: the symmetries of the network.
        params_a: name → weight or buffer.
        params_b: the same names and shapes.
    """
    if params_a.keys() != params_b.keys():
        differing = sorted(params_a.keys() ^ params_b.keys())
        raise ShapeError(f"the two networks must have the same names; only one of them has {', '.join(differing)}")
    names = [name for name, tensor in params_a.items() if tensor.is_floating_point() and name.rpartition(".")[2] not in STATISTICS]
    names = [name for name in names if spec.tied.get(name) not in params_a]
    # Sums in half precision would be noise.
    a = {name: params_a[name].detach().to(torch.promote_types(params_a[name].dtype, torch.float32)) for name in names}
    b = {name: params_b[name].detach().to(tensor) for name, tensor in a.items()}
    for which, params in (("a", spec.apply(a, {})), ("b", spec.apply(b, {}))):
        for name, tensor in params.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} of network {which} is not finite: nothing can be compared with it")
    return a, b


def touching(spec: PermutationSpec, names: Iterable[str]) -> dict[str, list[Occurrence]]:
    """Group → where it touches these weights; groups that do not are left out.

    Args:
        spec: the symmetries of the network.
        names: of weights.
    """
    places: dict[str, list[Occurrence]] = {group: [] for group in spec.sizes}
    for name in names:
        for dim, axis in enumerate(spec.axes[name]):
            for group in dict.fromkeys(leaf.name for leaf in leaves(axis) if isinstance(leaf, Group)):
                places[group] += [Occurrence(name, dim, place) for place in positions(axis, group)]
    return {group: at for group, at in places.items() if at}


def ascend(
    spec: PermutationSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    places: Mapping[str, Sequence[Occurrence]],
    start: Mapping[str, Tensor],
    max_iter: int,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Coordinate ascent from ``start`` until none of the groups in ``places`` can raise the inner product.

    Args:
        spec: the symmetries of the network.
        a: weights to be met.
        b: weights to be renamed, of the same names and shapes.
        places: group → where it touches them.
        start: group → int64 ``(n,)``; the identity for groups that are not there.
        max_iter: how often each group may be visited.
        generator: source of randomness for the order of the groups.
    """
    found = spec.completed(start)
    permuted = spec.apply(b, found)
    groups = list(places)
    touches = {group: dict.fromkeys(at.name for at in places[group]) for group in groups}
    twice = {group for group in groups if _occurs_twice(places[group])}
    rounding = {group: _ROUNDING * _bound(a, b, touches[group]) for group in groups}
    stale = set(groups)
    for _ in range(max_iter):
        order = range(len(groups)) if generator is None else torch.randperm(len(groups), generator=generator).tolist()
        for group in (groups[number] for number in order):
            if group not in stale:
                continue
            stale.discard(group)
            mine = {name: permuted[name] for name in touches[group]}
            if group in twice:
                step = _frank_wolfe(spec, group, a, mine, rounding[group])
                gain = _inner(a, spec.apply(mine, {group: step})) - _inner(a, mine)
            else:
                step, gain = _linear_step(a, mine, places[group])
            if gain > rounding[group]:
                found[group] = found[group][step]
                permuted |= spec.apply(mine, {group: step})
                stale |= {other for other in groups if touches[other].keys() & touches[group].keys() and (other != group or group in twice)}
        if not stale:
            return found
    message = f"weight matching: {', '.join(sorted(stale))} could still change after {max_iter} visits of every group; raise max_iter"
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return found


def _occurs_twice(places: Sequence[Occurrence]) -> bool:
    """Whether one entry of a weight belongs to two units of the group, so that the objective is not linear in its permutation."""
    seen: dict[str, list[Occurrence]] = {}
    for at in places:
        for other in seen.setdefault(at.name, []):
            if other.dim != at.dim or torch.isin(at.positions, other.positions).any():
                return True
        seen[at.name].append(at)
    return False


def _linear_step(a: Mapping[str, Tensor], b: Mapping[str, Tensor], places: Sequence[Occurrence]) -> tuple[Tensor, float]:
    """The best permutation of one group, and by how much it raises the inner product."""
    pairs = [(rows(a, at), rows(b, at)) for at in places]
    step = assign(sum((left @ right.mT for left, right in pairs), torch.zeros(())))
    moved = (step != torch.arange(len(step))).nonzero().squeeze(-1)
    return step, sum(float((left[moved].double() * (right[step[moved]].double() - right[moved].double())).sum()) for left, right in pairs)


@torch.inference_mode(mode=False)  # gradients need a graph
def _frank_wolfe(spec: PermutationSpec, group: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], tol: float) -> Tensor:
    """A permutation of one group that makes ⟨a, b permuted⟩ large, from the identity through the doubly stochastic matrices."""
    # Copies, for tensors of inference mode have no place in a graph.
    a, b = ({name: each[name].to(torch.float64, copy=True) for name in b} for each in (a, b))

    def objective(D: Tensor) -> Tensor:
        return torch.stack([(a[name] * tensor).sum() for name, tensor in spec.apply(b, {group: D}).items()]).sum()

    eye = torch.eye(spec.sizes[group], dtype=torch.float64, device=next(iter(b.values())).device)
    D = eye.clone()
    for _ in range(_FRANK_WOLFE_STEPS):
        with torch.enable_grad():
            value = objective(D.requires_grad_())
            (gradient,) = torch.autograd.grad(value, D)
        D, value = D.detach(), float(value.detach())
        towards = eye[assign(gradient).to(eye.device)] - D
        slope = float((gradient * towards).sum())
        if slope <= tol:
            break
        curvature = float(objective(D + towards)) - value - slope
        D = D + (1.0 if 2 * curvature >= -slope else -slope / (2 * curvature)) * towards
    return assign(D)


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name].double() * tensor.double()).sum()) for name, tensor in b.items())


def _bound(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """What the inner product cannot exceed, however b is renamed (Cauchy–Schwarz)."""
    left, right = (math.hypot(*(float(torch.linalg.vector_norm(each[name], dtype=torch.float64)) for name in names)) for each in (a, b))
    return left * right
