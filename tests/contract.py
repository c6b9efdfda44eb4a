"""What every layer must pass: ``CHECKS`` are functions of an entry of :mod:`tests.layers`.

``tests/test_contract.py`` runs all of them on all of it.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from difflayers.errors import ConvergenceWarning
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import relative_error

__all__ = ["CHECKS", "applies"]


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [part.detach().clone().requires_grad_() for part in inputs]


def _weights(x: Tensor) -> Tensor:
    """Fixed weights that tell the entries of ``x`` apart; not linear, since that would be constant on doubly stochastic matrices."""
    return torch.linspace(0.6, 1.7, x.numel(), dtype=x.dtype).square().reshape(x.shape)


def _loss(call: Function) -> Function:
    """A nonlinear scalar function of the last dimensions of the layer's output (of one problem)."""

    def loss(*inputs: Tensor) -> Tensor:
        x = call(*inputs)
        return (_weights(x) * (x + x * x)).sum()

    return loss


def _gradients(function: Function, inputs: Inputs) -> list[Tensor]:
    """The gradient of ``function(*inputs).sum()``, zeros where it does not depend on an input."""
    leaves = _leaves(inputs)
    slopes = torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, slopes, strict=True)]


def _all(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def _directions(inputs: Inputs, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return tuple(randn(generator, *part.shape) for part in inputs)


def _pair(left: Inputs, right: Inputs) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _close(value: Tensor, exact: Tensor, tolerance: float, what: str = "") -> None:
    error = relative_error(value, exact)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, shapes {tuple(value.shape)} and {tuple(exact.shape)}"


def _all_close(values: Inputs | list[Tensor], exact: Inputs | list[Tensor], tolerance: float, what: str = "") -> None:
    scale = max(float(part.detach().abs().max()) if part.numel() else 0.0 for part in exact)
    for i, (value, true) in enumerate(zip(values, exact, strict=True)):
        assert value.shape == true.shape, f"{what} {i}: shapes {tuple(value.shape)} and {tuple(true.shape)}"
        error = float((value - true).detach().abs().max()) if true.numel() else 0.0
        assert error <= tolerance * scale, f"{what} {i}: error {error:.1e} where the largest entry is {scale:.1e}"


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Each input alone, and all of them."""
    yield from ((i,) for i in range(count))
    if count > 1:
        yield tuple(range(count))


def check_reference(layer: Layer) -> None:
    """Value, Jacobian and second derivatives are those of the reference."""
    inputs = layer.inputs()
    every = _all(inputs)
    _close(layer.call(*inputs), layer.reference(*inputs), 1e-9, "value")
    _all_close(jacrev(layer.call, every)(*inputs), jacrev(layer.reference, every)(*inputs), layer.tolerance, "jacobian")
    direction = _directions(inputs, 1)

    def slope(call: Function) -> Function:
        return lambda *inputs: _pair(grad(_loss(call), every)(*inputs), direction)

    _all_close(grad(slope(layer.call), every)(*inputs), grad(slope(layer.reference), every)(*inputs), 10 * layer.tolerance, "second")


def check_gradcheck(layer: Layer, *, fast_mode: bool = True) -> None:
    """First derivatives, reverse and forward, agree with finite differences along random directions, also under autograd's own vmap."""
    inputs = tuple(_leaves(layer.inputs()))
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_undefined_grad": True, "fast_mode": fast_mode}
    assert torch.autograd.gradcheck(layer.call, inputs, **options)


def check_gradcheck_of_every_entry(layer: Layer) -> None:
    """The same, entry by entry."""
    check_gradcheck(layer, fast_mode=False)


def check_gradgradcheck(layer: Layer, *, fast_mode: bool = True) -> None:
    """Second derivatives, reverse over reverse and forward over reverse, agree with finite differences along random directions."""
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": fast_mode}
    assert torch.autograd.gradgradcheck(layer.call, tuple(_leaves(layer.inputs())), **options)


def check_gradgradcheck_of_every_entry(layer: Layer) -> None:
    """The same, entry by entry."""
    check_gradgradcheck(layer, fast_mode=False)


def check_jvp_against_vjp(layer: Layer) -> None:
    """⟨g, J t⟩ = ⟨Jᵀ g, t⟩."""
    inputs = layer.inputs()
    tangents = _directions(inputs, 2)
    x, pullback = vjp(layer.call, *inputs)
    pushed = jvp(layer.call, inputs, tangents)[1]
    _close((_weights(x) * pushed).sum(), _pair(pullback(_weights(x)), tangents), layer.tolerance)


def check_second_derivatives(layer: Layer) -> None:
    """The second derivative along two directions in all the arguments is the same in the four ways to take it."""
    inputs = layer.inputs()
    first, second = _directions(inputs, 3), _directions(inputs, 4)
    weights = _weights(layer.call(*inputs)).detach()

    def forward(*inputs: Tensor) -> Tensor:
        return jvp(layer.call, inputs, first)[1]

    def reverse(*inputs: Tensor) -> Tensor:
        return _pair(vjp(layer.call, *inputs)[1](weights), first)

    ways = {
        "forward over forward": (weights * jvp(forward, inputs, second)[1]).sum(),
        "reverse over forward": _pair(vjp(forward, *inputs)[1](weights), second),
        "forward over reverse": jvp(reverse, inputs, second)[1],
        "reverse over reverse": _pair(grad(reverse, _all(inputs))(*inputs), second),
    }
    exact = ways.pop("reverse over reverse").detach()
    scale = max(float(exact.abs()), 1.0)
    for name, value in ways.items():
        assert float((value.detach() - exact).abs()) <= 10 * layer.tolerance * scale, (
            f"{name}: {value:.15g}, reverse over reverse: {exact:.15g}"
        )


def check_vmap(layer: Layer) -> None:
    """vmap of the layer, of its gradient and of its second derivatives equals a loop, for each input batched and for all."""
    batch, single = layer.batch(2), layer.inputs()
    every = _all(single)
    tangents = _directions(single, 5)
    functions = {"value": layer.call, "grad": grad(_loss(layer.call), every), "jvp": lambda *p: jvp(layer.call, p, tangents)[1]}
    for chosen in _subsets(len(single)):
        mixed = [batch[i] if i in chosen else single[i] for i in every]
        in_dims = tuple(0 if i in chosen else None for i in every)
        for name, function in functions.items():
            mapped = vmap(function, in_dims)(*mixed)
            loop = [function(*(part[k] if i in chosen else part for i, part in enumerate(mixed))) for k in range(2)]
            if isinstance(mapped, Tensor):
                mapped, loop = (mapped,), [(part,) for part in loop]
            _all_close(mapped, [torch.stack(parts) for parts in zip(*loop, strict=True)], layer.tolerance, f"{name}, batched {chosen}")
    direction = _directions(single, 6)
    slope = grad(lambda *p: _pair(grad(_loss(layer.call), every)(*p), direction), every)
    loop = zip(*(slope(*(part[k] for part in batch)) for k in range(2)), strict=True)
    _all_close(vmap(slope)(*batch), [torch.stack(parts) for parts in loop], 10 * layer.tolerance, "second derivatives")


def check_vmap_nested(layer: Layer) -> None:
    """Two nested vmaps, each over other inputs and along the last dimension, equal two loops."""
    outer, inner = layer.batch(2), layer.batch(2)
    single = layer.inputs(7)
    for i, j in itertools.product(range(min(2, len(single))), range(len(single))):
        if i == j and len(single) > 1:
            continue

        def function(a: Tensor, b: Tensor, i: int = i, j: int = j) -> Tensor:
            parts = list(single)
            parts[i], parts[j] = (a, b) if i != j else (a + b, a + b)
            return grad(_loss(layer.call))(*parts)

        rows, columns = outer[i], inner[j].movedim(0, -1)
        mapped = vmap(lambda a: vmap(lambda b: function(a, b), in_dims=-1, out_dims=-1)(columns))(rows)  # noqa: B023
        loop = torch.stack([torch.stack([function(a, columns[..., k]) for k in range(2)], -1) for a in rows])
        _close(mapped, loop, layer.tolerance, f"inputs {i} and {j}")


def check_batch(layer: Layer) -> None:
    """Leading dimensions equal a loop, value and gradient; an input without them is shared and its gradient is the sum."""
    batch, single = layer.batch(2, 2), layer.inputs()
    for chosen in _subsets(len(single)):
        mixed = tuple(batch[i] if i in chosen else part for i, part in enumerate(single))

        def element(r: int, c: int, mixed: Inputs = mixed, chosen: tuple[int, ...] = chosen) -> Inputs:
            return tuple(part[r, c] if i in chosen else part for i, part in enumerate(mixed))

        loop = [[layer.call(*element(r, c)) for c in range(2)] for r in range(2)]
        exact = torch.stack([torch.stack(row) for row in loop])
        _close(layer.call(*mixed), exact, layer.tolerance, f"value, batched {chosen}")
        weights = _weights(exact)
        slopes = _gradients(lambda *p: weights * layer.call(*p), mixed)  # noqa: B023
        wanted = [torch.zeros_like(part) for part in mixed]
        for r, c in itertools.product(range(2), range(2)):
            parts = _gradients(lambda *p: weights[r, c] * layer.call(*p), element(r, c))  # noqa: B023
            for i, part in enumerate(parts):
                (wanted[i][r, c] if i in chosen else wanted[i]).add_(part)
        _all_close(slopes, wanted, layer.tolerance, f"gradient, batched {chosen}")


def check_empty_batch(layer: Layer) -> None:
    """A batch of none gives an output of none, and shared inputs the gradient zero."""
    single = layer.inputs()
    exact = layer.call(*single)
    inputs = tuple(part.new_empty(0, *part.shape) if i == 0 else part for i, part in enumerate(single))
    x = layer.call(*inputs)
    assert x.shape == (0, *exact.shape)
    assert x.dtype == exact.dtype
    for slope, part in zip(_gradients(layer.call, inputs), inputs, strict=True):
        assert slope.shape == part.shape
        assert not slope.any()


def check_float32(layer: Layer) -> None:
    """float32 inputs give a float32 output and gradients near those in float64."""
    inputs = layer.inputs()
    halves = tuple(part.float() for part in inputs)
    assert layer.call(*halves).dtype == torch.float32
    _close(layer.call(*halves).double(), layer.call(*inputs), 1e-4, "value")
    slopes = _gradients(_loss(layer.call), halves)
    assert all(slope.dtype == torch.float32 for slope in slopes)
    _all_close([slope.double() for slope in slopes], _gradients(_loss(layer.call), inputs), 2e-3, "gradient")


def check_no_graph(layer: Layer) -> None:
    """Nothing records a graph under no_grad or inference_mode, nor without an input that requires a gradient."""
    leaves = _leaves(layer.inputs())
    with torch.no_grad():
        assert layer.call(*leaves).grad_fn is None
    with torch.inference_mode():
        _close(layer.call(*leaves), layer.call(*layer.inputs()), 1e-9)
    if layer.module is None:
        assert not layer.call(*layer.inputs()).requires_grad


def check_no_mutation(layer: Layer) -> None:
    """Inputs and cotangents are left as they were, by forward, backward and double backward."""
    leaves = _leaves(layer.inputs())
    x = layer.call(*leaves)
    cotangent = _weights(x).requires_grad_()
    watched = [*leaves, cotangent]
    before = [(part.detach().clone(), part._version) for part in watched]
    slopes = torch.autograd.grad(x, leaves, cotangent, create_graph=True, allow_unused=True)
    total = torch.stack([(slope**2).sum() for slope in slopes if slope is not None]).sum()
    torch.autograd.grad(total, watched, allow_unused=True)
    for part, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(part, value)
        assert part._version == version


def check_cotangent_twice(layer: Layer) -> None:
    """One cotangent used by two losses gives twice the gradient, and backward can be repeated."""
    leaves = _leaves(layer.inputs())
    x = layer.call(*leaves)
    cotangent = _weights(x)
    once = torch.autograd.grad(x, leaves, cotangent, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(x, leaves, cotangent, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad((x, x * 1), leaves, (cotangent, cotangent), allow_unused=True)
    for first, second, both in zip(once, again, twice, strict=True):
        if first is not None:
            assert torch.equal(first, second)
            _close(both, 2 * first, 1e-12)


def check_noncontiguous(layer: Layer) -> None:
    """Strides do not matter: transposed, expanded and sliced inputs give the same values and gradients."""
    inputs = layer.inputs()
    strided = tuple(torch.stack([part, part + 1], -1)[..., 0] for part in inputs)
    flipped = tuple(part.mT.contiguous().mT if part.dim() > 1 else part for part in inputs)
    exact, slopes = layer.call(*inputs), _gradients(_loss(layer.call), inputs)
    for other in (strided, flipped):
        _close(layer.call(*other), exact, 1e-10)
        leaves = [part.requires_grad_() for part in other]
        found = torch.autograd.grad(_loss(layer.call)(*leaves), leaves, allow_unused=True)
        _all_close([torch.zeros_like(s) if f is None else f for f, s in zip(found, slopes, strict=True)], slopes, 1e-8)


def check_each_input_alone(layer: Layer) -> None:
    """The gradient of an input is the same whether or not the others require theirs."""
    inputs = layer.inputs()
    exact = _gradients(_loss(layer.call), inputs)
    for i in range(len(inputs)):
        leaves = [part.detach().clone().requires_grad_(k == i) for k, part in enumerate(inputs)]
        (slope,) = torch.autograd.grad(_loss(layer.call)(*leaves), leaves[i], allow_unused=True)
        _close(torch.zeros_like(inputs[i]) if slope is None else slope, exact[i], 1e-10, f"input {i}")


def check_checkpoint(layer: Layer) -> None:
    """Both kinds of activation checkpointing give the same gradient."""
    inputs = layer.inputs()
    exact = _gradients(_loss(layer.call), inputs)
    for reentrant in (False, True):
        leaves = _leaves(inputs)
        checkpoint(_loss(layer.call), *leaves, use_reentrant=reentrant).backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        _all_close(found, exact, 1e-12, f"use_reentrant={reentrant}")


def check_module(layer: Layer) -> None:
    """The module form deep-copies, pickles and loads a state dict; the copy is its own, and says what it is."""
    module, inputs = layer.module(), layer.inputs()
    x = module(*inputs)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = layer.module()
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), fresh):
        assert repr(other) == repr(module)
        assert torch.equal(other(*inputs), x)
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
        if list(other.parameters()):
            assert not torch.equal(other(*inputs), x)
            slopes = torch.autograd.grad(other(*inputs).sum(), list(other.parameters()))
            assert all(slope.any() for slope in slopes)
        assert torch.equal(module(*inputs), x)


def check_memory(layer: Layer) -> None:
    """What backward keeps does not grow with the iterations."""
    kept = {iterations: _bytes_kept(layer.limited(iterations), layer.inputs()) for iterations in (10, 200)}
    assert kept[200] == kept[10], f"bytes kept for backward after 10 and 200 iterations: {kept}"


def _bytes_kept(call: Function, inputs: Inputs) -> tuple[int, int]:
    """Bytes that autograd saves, and bytes in tensors that Python objects hold once only the output is left."""
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.untyped_storage().nbytes()
        return tensor

    leaves = _leaves(inputs)
    before = _living_bytes()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x = call(*leaves)
    assert x.requires_grad
    return saved, _living_bytes() - before


def _living_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # A wrapper of a transform, which a traceback of another test may hold, has no storage of its own.
        if issubclass(type(item), Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(item):
            continue
        if issubclass(type(item), Tensor) and item.layout == torch.strided and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def check_failure_raises(layer: Layer) -> None:
    """A problem without a solution raises its own kind of error, with the solution and the indices of the failed elements."""
    for failure in layer.failures:
        good = layer.inputs()
        with pytest.raises(failure.error) as caught:
            layer.call(*failure.spoil(*good))
        assert caught.value.indices == [()], failure.name
        assert Status(int(caught.value.solution.status)) in failure.statuses, failure.name
        for run in _batched_forms(layer):
            with pytest.raises(failure.error) as caught:
                run(*_spoiled(layer, failure))
            assert caught.value.indices == [(1,)], failure.name
            status = caught.value.solution.status
            assert Status(int(status[1])) in failure.statuses, failure.name
            assert status[0] == status[2] == Status.SOLVED, failure.name


def check_failure_nan(layer: Layer) -> None:
    """With "nan" the failed element is NaN with zero gradient, and its neighbours do not notice, nor does a shared input."""
    for failure in layer.failures:
        batch, spoiled, single = layer.batch(3), _spoiled(layer, failure), layer.inputs(1)
        bad = failure.spoil(*single)
        untouched = [i for i, (a, b) in enumerate(zip(single, bad, strict=True)) if torch.equal(a, b)]
        assert layer.call(*bad, on_failure="nan").isnan().all(), failure.name
        for run in _batched_forms(layer, on_failure="nan"):
            x = run(*spoiled)
            assert x[1].isnan().all(), failure.name
            _close(x[[0, 2]], run(*batch)[[0, 2]], 1e-12, failure.name)
            slopes = _gradients(lambda *p: _weights(x) * run(*p).nan_to_num(), spoiled)  # noqa: B023
            exact = _gradients(lambda *p: (_weights(x) * run(*p))[[0, 2]], batch)  # noqa: B023
            _all_close([slope[[0, 2]] for slope in slopes], [slope[[0, 2]] for slope in exact], 1e-12, f"{failure.name}, gradient")
            assert not any(slope[1].any() for slope in slopes), f"{failure.name}: the failed element has a gradient"
            pushed = jvp(run, spoiled, _directions(spoiled, 8))[1]
            _close(pushed[[0, 2]], jvp(run, batch, _directions(spoiled, 8))[1][[0, 2]], 1e-11, f"{failure.name}, tangent")
        if layer.leading:
            for i in untouched:
                shared = tuple(single[k] if k == i else part for k, part in enumerate(spoiled))
                slopes = _gradients(lambda *p: layer.call(*p, on_failure="nan")[[0, 2]], shared)
                kept = tuple(single[k] if k == i else part[[0, 2]] for k, part in enumerate(spoiled))
                exact = _gradients(layer.call, kept)
                _close(slopes[i], exact[i], 1e-10, f"{failure.name}: gradient of input {i}, shared with a failed element")


def check_failure_warns(layer: Layer) -> None:
    """With "warn" the best iterate stays, a warning says so, and the neighbours do not notice."""
    for failure in layer.failures:
        spoiled, batch = _spoiled(layer, failure), layer.batch(3)
        for run in _batched_forms(layer, on_failure="warn"):
            with pytest.warns(ConvergenceWarning):
                x = run(*spoiled)
            _close(x[[0, 2]], run(*batch)[[0, 2]], 1e-12, failure.name)


def check_options(layer: Layer) -> None:
    """An unknown ``on_failure`` is refused, solvable or not."""
    for inputs in (layer.inputs(), layer.failures[0].spoil(*layer.inputs())):
        with pytest.raises(ValueError, match="on_failure"):
            layer.call(*inputs, on_failure="ignore")


def _spoiled(layer: Layer, failure: Failure) -> Inputs:
    """Three problems, the one in the middle without a solution."""
    problems = [layer.inputs(seed) for seed in range(3)]
    problems[1] = failure.spoil(*problems[1])
    return tuple(torch.stack(parts) for parts in zip(*problems, strict=True))


def _batched_forms(layer: Layer, **options: str) -> list[Function]:
    call = functools.partial(layer.call, **options)
    return [vmap(call), *([call] if layer.leading else [])]


def check_compile(layer: Layer) -> None:
    """torch.compile (with graph breaks) gives the same value and gradient."""
    inputs = layer.inputs()
    compiled = torch.compile(_loss(layer.call), backend="aot_eager")
    _close(compiled(*inputs), _loss(layer.call)(*inputs), 1e-12)
    _all_close(_gradients(compiled, inputs), _gradients(_loss(layer.call), inputs), 1e-12)


CHECKS: dict[str, Callable[[Layer], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}

_NEEDS = {
    "reference": "reference",
    "module": "module",
    "memory": "limited",
    "batch": "leading",
    "empty_batch": "leading",
    "failure_raises": "failures",
    "failure_nan": "failures",
    "failure_warns": "failures",
    "options": "failures",
}


def applies(check: str, layer: Layer) -> bool:
    """Whether the layer has what the check looks at."""
    return check not in _NEEDS or bool(getattr(layer, _NEEDS[check]))
