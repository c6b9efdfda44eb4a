"""Skeletons of grey images: the relaxed coin, the straight-through derivative under every transform, and what is refused."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import difflayers
from difflayers.errors import ShapeError
from difflayers.morphology import Skeletonize, skeletonize
from tests.contract import CHECKS, applies
from tests.layers import Layer
from tests.morphology.published import published_skeleton
from tests.morphology.shapes import blobs, noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=dtype)


def published_coin(image: Tensor, beta: float, tau: float, generator: torch.Generator) -> Tensor:
    """The stochastic discretization of the published module, straight-through."""
    alpha = (image + 1e-8) / (1.0 - image + 1e-8)
    uniform = torch.rand(image.shape, generator=generator, dtype=image.dtype)
    logistic = torch.log(uniform) - torch.log(1 - uniform)
    soft = torch.sigmoid((torch.log(alpha) + beta * logistic) / tau)
    return (soft.detach() > 0.5).to(image) + (soft - soft.detach())


@pytest.mark.parametrize("shape", [(2, 2, 9, 8), (1, 1, 4, 5, 6)], ids=["images", "volumes"])
@pytest.mark.parametrize("detection", ["Boolean", "EulerCharacteristic"])
def test_the_published_module(shape: tuple[int, ...], detection: str) -> None:
    image, cotangent = grey(*shape), grey(*shape, seed=1)
    results = []
    for of in (
        lambda x: skeletonize(x, num_iter=3, beta=0.5, tau=0.7, simple_point_detection=detection, generator=generator()),
        lambda x: published_skeleton(published_coin(x, 0.5, 0.7, generator()), 3, detection),
    ):
        leaf = image.clone().requires_grad_()
        skeleton = of(leaf)
        results.append((skeleton.detach(), *torch.autograd.grad(skeleton, leaf, cotangent)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=0)
    assert set(results[0][0].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (1, 2, 4, 5, 6)], ids=["images", "volumes"])
def test_binary_images_are_the_published_ones_bit_for_bit(shape: tuple[int, ...]) -> None:
    image, cotangent = noise(shape, 0.6), grey(*shape, dtype=torch.float32)
    leaf, exact_leaf = image.clone().requires_grad_(), image.clone().requires_grad_()
    found, exact = skeletonize(leaf, probabilistic=False, num_iter=4), published_skeleton(exact_leaf, 4)
    assert torch.equal(found, exact)
    assert torch.equal(torch.autograd.grad(found, leaf, cotangent)[0], torch.autograd.grad(exact, exact_leaf, cotangent)[0])


def test_mask_does_not_depend_on_the_rounds() -> None:
    image = blobs((1, 1, 20, 20), 0.5, smooth=4)
    for num_iter in (2, 9, None):
        leaf = image.clone().requires_grad_()
        skeleton = skeletonize(leaf, probabilistic=False, num_iter=num_iter, gradient="mask")
        (slope,) = torch.autograd.grad(skeleton.sum(), leaf)
        assert torch.equal(slope, torch.where((image == 1) & (skeleton == 0), 0.0, 1.0))
        assert torch.equal(skeleton, skeletonize(image, probabilistic=False, num_iter=num_iter))
    until_the_end = skeletonize(image, probabilistic=False, num_iter=None)
    assert torch.equal(until_the_end, skeletonize(image, probabilistic=False, num_iter=50))


def test_until_the_end_the_rounds_of_each_image_count() -> None:
    image = torch.stack([blobs((1, 9, 9), 0.3, smooth=0), torch.ones(1, 9, 9)])
    leaf = image.clone().requires_grad_()
    skeleton = skeletonize(leaf, probabilistic=False, num_iter=None)
    (slope,) = torch.autograd.grad(skeleton.sum(), leaf)
    powers = [slope[i][skeleton[i] == 1].unique() for i in range(2)]
    assert all(len(power) == 1 for power in powers)
    assert powers[0] > powers[1]


def _contract(name: str, size: tuple[int, ...], **options: object) -> Layer:
    def call(image: Tensor) -> Tensor:
        flat = image.reshape(-1, 1, *size) if image.dim() > len(size) else image[None, None]
        return skeletonize(torch.sigmoid(4 * flat), **options).reshape(image.shape)

    def sample(g: torch.Generator) -> tuple[Tensor]:
        # Not near 0, where a voxel would change sides.
        logits = torch.rand(size, generator=g, dtype=torch.float64) - 0.4
        return (logits + 0.05 * logits.sign(),)

    return Layer(name, call, sample)


LAYERS = [
    _contract("plane", (3, 4), probabilistic=False, num_iter=2),
    _contract("plane, sigmoid", (4, 3), beta=0.0, tau=0.8, num_iter=None),
    _contract("space, mask", (2, 3, 2), probabilistic=False, gradient="mask"),
]
# The value is a step function, so that finite differences of it say nothing; those of its straight-through derivative do.
STEPS = {"gradcheck", "gradcheck_of_every_entry"}
SLOW = {"compile", "gradgradcheck_of_every_entry"}
CASES = [
    pytest.param(check, layer, id=f"{layer.name}-{check}", marks=[pytest.mark.slow] if check in SLOW else [])
    for layer in LAYERS
    for check in CHECKS
    if applies(check, layer) and check not in STEPS and (check != "float32" or layer.name != "plane, sigmoid")
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("check", "layer"), CASES)
def test_contract(check: str, layer: Layer) -> None:
    CHECKS[check](layer)


def test_noise_under_vmap() -> None:
    image = torch.full((3, 1, 1, 6, 6), 0.5)
    different = vmap(lambda x: skeletonize(x, num_iter=0, beta=1.0), randomness="different")(image)
    assert not torch.equal(different[0], different[1])
    same = vmap(lambda x: skeletonize(x, num_iter=0, beta=1.0), randomness="same")(image)
    assert torch.equal(same[0], same[1])


def test_noise_is_that_of_the_generator() -> None:
    image = grey(1, 1, 30, 30, dtype=torch.float32)
    first, again, other = (skeletonize(image, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(skeletonize(image, beta=0.0), skeletonize(image, probabilistic=False))
    # A voxel of probability p is foreground with the probability σ(log(p / (1 − p)) / β).
    share = skeletonize(torch.full((1, 1, 200, 200), 0.6), num_iter=0, beta=0.5, generator=generator()).mean()
    assert float(share) == pytest.approx(float(torch.sigmoid(torch.logit(torch.tensor(0.6)) / 0.5)), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_are_finite_at_zero_and_one(dtype: torch.dtype) -> None:
    image = torch.tensor([0.0, 1.0, 0.5, 1e-7, 1 - 1e-3, 0.0], dtype=dtype).view(1, 1, 2, 3)
    for options in ({}, {"gradient": "mask", "num_iter": None}, {"probabilistic": False}):
        slope = grad(lambda x, options=options: skeletonize(x, generator=generator(), **options).sum())(image)
        assert slope.dtype == dtype
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (2, 1), (1, 1, 1), (2, 2, 2), (1, 2, 5), (0, 3), (3, 0, 2)], ids=str)
def test_small_full_and_empty(size: tuple[int, ...]) -> None:
    for image in (torch.zeros(2, 1, *size), torch.ones(2, 1, *size)):
        for num_iter in (3, None):
            skeleton = skeletonize(image, probabilistic=False, num_iter=num_iter)
            assert skeleton.shape == image.shape
            assert bool(skeleton.any()) == bool(image.any())
    assert skeletonize(torch.zeros(0, 1, *size)).shape == (0, 1, *size)


def test_module() -> None:
    module = Skeletonize(beta=0.2, num_iter=4, gradient="mask")
    image = grey(2, 1, 8, 8, dtype=torch.float32)
    expected = skeletonize(image, beta=0.2, num_iter=4, gradient="mask", generator=generator())
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(image, generator()), expected)
    assert repr(module) == "Skeletonize(beta=0.2, tau=1.0, num_iter=4, gradient='mask', simple_point_detection='Boolean')"
    assert difflayers.Skeletonize is Skeletonize
    # The arguments of the published module, in its order.
    assert "probabilistic=False" in repr(Skeletonize(False, 0.33, 1.0, "EulerCharacteristic", 5))


def test_refusals() -> None:
    image = grey(1, 1, 4, 4)
    with pytest.raises(ShapeError, match=r"got shape \(4, 4\)"):
        skeletonize(image[0, 0])
    with pytest.raises(ShapeError, match="floating"):
        skeletonize(image > 0.5)
    for spoiled in (image - 1, image * 3, image * torch.nan):
        for run in (skeletonize, Skeletonize(probabilistic=False), lambda x: vmap(functools.partial(skeletonize, beta=0.0))(x[None])):
            with pytest.raises(ValueError, match=r"in \[0, 1\]"):
                run(spoiled) if run is not skeletonize else run(spoiled, beta=0.0)
    for options, match in (
        ({"gradient": "exact"}, "reference, mask"),
        ({"simple_point_detection": "euler"}, "Boolean, EulerCharacteristic"),
        ({"num_iter": -1}, "at least 0"),
        ({"num_iter": 2.0}, "at least 0"),
        ({"tau": 0.0}, "tau positive"),
        ({"beta": -1.0}, "beta"),
    ):
        with pytest.raises(ValueError, match=match):
            skeletonize(image, **options)
        with pytest.raises(ValueError, match=match):
            Skeletonize(**options)


def test_memory() -> None:
    image = grey(1, 1, 64, 64, dtype=torch.float32)
    kept = {}
    for num_iter in (3, 60):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
            skeletonize(image.clone().requires_grad_(), probabilistic=False, num_iter=num_iter)
        kept[num_iter] = sum(saved)
    assert kept[3] == kept[60] == image.nbytes
