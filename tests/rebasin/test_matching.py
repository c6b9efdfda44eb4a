"""Weight matching: planted permutations come back, and nothing that it returns can be improved by one group alone."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.errors import ConvergenceWarning, ShapeError
from difflayers.rebasin import PermutationSpec, weight_matching
from difflayers.rebasin.assignment import assign
from difflayers.rebasin.axes import Group, Product

from .architectures import ARCHITECTURES
from .weights import attention, closed, convolutional, mlp, network, residual, unet

EVERY = [mlp, residual, closed, convolutional, attention, unet]


def planted(spec: PermutationSpec, params: dict[str, Tensor], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network with its units renamed, and the permutations that bring it back."""
    permutations = spec.random(generator=torch.Generator().manual_seed(seed))
    return spec.apply(params, permutations), spec.inverse(permutations)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a if "running" not in name)


def noisy(params: dict[str, Tensor], level: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: w + level * w.std(correction=0) * torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in params.items()}


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_permutation_is_recovered(architecture, seed: int) -> None:
    spec, a = architecture(seed=seed)
    b, back = planted(spec, a, seed)
    found = weight_matching(spec, a, b)
    assert found.keys() == back.keys()
    for group, permutation in back.items():
        assert torch.equal(found[group], permutation)
    for name, tensor in spec.apply(b, found).items():
        assert torch.equal(tensor, a[name])


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_and_on_every_architecture(name: str) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model, x = architecture.build().double(), architecture.example()
    spec = PermutationSpec.from_module(model, x.double() if x.is_floating_point() else x)
    a = model.state_dict()
    for tensor in a.values():
        if tensor.is_floating_point():
            tensor.normal_()
    b, back = planted(spec, a)
    found = weight_matching(spec, a, b)
    assert all(torch.equal(found[group], permutation) for group, permutation in back.items())


@pytest.mark.parametrize("architecture", [mlp, residual, convolutional, attention, unet])
def test_and_under_noise(architecture) -> None:
    spec, a = architecture()
    b, back = planted(spec, a)
    found = weight_matching(spec, a, noisy(b, 0.2))
    assert all(torch.equal(found[group], permutation) for group, permutation in back.items())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12))
def test_any_width_and_depth(seed: int, width: int, depth: int) -> None:
    for spec, a in (mlp(width, depth, seed), residual(width, 2 * width, depth, seed)):
        b, _ = planted(spec, a, seed)
        assert all(torch.equal(tensor, a[name]) for name, tensor in spec.apply(b, weight_matching(spec, a, b)).items())


@pytest.mark.parametrize("seed", range(3))
def test_against_all_permutations(seed: int) -> None:
    # Four units that touch weights on both sides, and two networks that have nothing to do with each other.
    spec, a = network({"in": ((4, 3), ("h", None)), "out": ((2, 4), (None, "h"))}, seed)
    _, b = network({"in": ((4, 3), ("h", None)), "out": ((2, 4), (None, "h"))}, seed + 10)
    every = [distance(a, spec.apply(b, {"h": torch.tensor(order)})) for order in itertools.permutations(range(4))]
    assert distance(a, spec.apply(b, weight_matching(spec, a, b))) == pytest.approx(min(every))


@pytest.mark.parametrize("architecture", [mlp, residual, attention])
def test_no_swap_of_two_units_is_better(architecture) -> None:
    spec, a = architecture(seed=0)
    _, b = architecture(seed=1)
    found = weight_matching(spec, a, b)
    reached = distance(a, spec.apply(b, found))
    assert reached < distance(a, b)
    for group, size in spec.sizes.items():
        if group == "stream":  # its objective is quadratic: a local maximum of Frank–Wolfe is not one of swaps
            continue
        for i, j in itertools.combinations(range(size), 2):
            swap = torch.arange(size)
            swap[[i, j]] = swap[[j, i]]
            assert distance(a, spec.apply(b, spec.compose(found, {group: swap}))) >= reached - 1e-9


def test_the_identity_alone_is_not_always_enough() -> None:
    # Why there are two starts: coordinate ascent from the identity ends elsewhere.
    missed = 0
    for seed in range(5):
        spec, a = attention(seed=seed)
        b, back = planted(spec, a, seed)
        found = weight_matching(spec, a, b, init={})
        missed += any(not torch.equal(found[group], permutation) for group, permutation in back.items())
    assert missed > 0


def test_starts() -> None:
    spec, a = mlp(seed=0)
    _, b = mlp(seed=1)
    free = weight_matching(spec, a, b)
    assert all(torch.equal(free[group], again) for group, again in weight_matching(spec, a, b).items())
    # From where it ended it does not move, and whatever the start, the objective never falls.
    assert all(torch.equal(free[group], again) for group, again in weight_matching(spec, a, b, init=free).items())
    start = spec.random(generator=torch.Generator().manual_seed(3))
    from_start = weight_matching(spec, a, b, init=start)
    assert distance(a, spec.apply(b, from_start)) < distance(a, spec.apply(b, start))
    assert distance(a, spec.apply(b, free)) <= distance(a, spec.apply(b, weight_matching(spec, a, b, init={}))) + 1e-9
    ends = [weight_matching(spec, a, b, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert all(torch.equal(ends[0][group], ends[1][group]) for group in spec.sizes)


def test_what_counts() -> None:
    spec, a = convolutional()
    b, back = planted(spec, a)
    # Running statistics do not: here they say the contrary.
    misleading = {**b, "norm.running_mean": 100 * a["norm.running_mean"], "norm.running_var": 100 * a["norm.running_var"]}
    found = weight_matching(spec, a, misleading)
    assert all(torch.equal(found[group], permutation) for group, permutation in back.items())
    # Without the weights of a group, it stays.
    some = {name: tensor for name, tensor in a.items() if name == "linear.weight"}
    found = weight_matching(spec, some, {name: b[name] for name in some})
    assert torch.equal(found["c1"], back["c1"])
    assert torch.equal(found["c0"], torch.arange(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    spec, a = residual()
    a = {name: tensor.to(dtype).requires_grad_() for name, tensor in a.items()}
    b, back = planted(spec, a)
    kept = {name: tensor.detach().clone() for name, tensor in b.items()}
    found = weight_matching(spec, a, b)
    assert all(torch.equal(found[group], permutation) for group, permutation in back.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in b.items())


def test_a_group_twice_in_one_dimension() -> None:
    # The flattened outer product of a layer with itself.
    both = Product((Group("h", 5), Group("h", 5)))
    spec, a = network({"in": ((5, 3), ("h", None)), "bilinear": ((2, 25), (None, both))})
    b, back = planted(spec, a)
    assert torch.equal(weight_matching(spec, a, b)["h"], back["h"])
    spec, a = network({"bilinear": ((2, 25), (None, both))})
    b, back = planted(spec, a)
    assert torch.equal(weight_matching(spec, a, b)["h"], back["h"])


def test_assign() -> None:
    similarity = torch.tensor([[1.0, 5.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    assert assign(similarity).tolist() == [1, 0, 2]


def test_failures() -> None:
    spec, a = mlp()
    with pytest.raises(ShapeError, match=r"only one of them has 0\.bias"):
        weight_matching(spec, a, {name: tensor for name, tensor in a.items() if name != "0.bias"})
    with pytest.raises(ShapeError, match="the spec wants"):
        weight_matching(spec, a, {**a, "0.bias": torch.zeros(2)})
    with pytest.raises(ShapeError, match="no weight or buffer 'other'"):
        weight_matching(spec, {**a, "other": torch.zeros(2)}, {**a, "other": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"0\.bias of network b is not finite"):
        weight_matching(spec, a, {**a, "0.bias": a["0.bias"] * torch.nan})
    with pytest.raises(ShapeError, match="not a permutation"):
        weight_matching(spec, a, a, init={"h0": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(ShapeError, match="init must be hard permutations"):
        weight_matching(spec, a, a, init={"h0": torch.eye(16)})
    _, b = mlp(seed=1)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        weight_matching(spec, a, b, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight_matching(spec, a, b)


def test_nothing_to_permute() -> None:
    spec, a = network({"weight": ((3, 2), (None, None))})
    assert weight_matching(spec, a, a) == {}
    spec, a = network({"weight": ((1, 2), ("one", None)), "bias": ((1,), ("one",))})
    assert weight_matching(spec, a, {name: 0 * tensor for name, tensor in a.items()})["one"].tolist() == [0]


@torch.inference_mode()
def test_in_inference_mode() -> None:
    """Also where one group is on both sides of a weight, which takes gradients."""
    spec, a = closed(seed=0)
    b, back = planted(spec, a)
    found = weight_matching(spec, a, b)
    assert all(torch.equal(found[group], value) for group, value in back.items())
