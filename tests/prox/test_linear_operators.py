from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers.errors import ShapeError
from difflayers.prox import L2, Blur, LinearOperator, Mask, MatrixOperator, PlugAndPlay, adjoint_error, squared_norm
from difflayers.prox.operators import prox_tv2d


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(m: int, n: int) -> Tensor:
    return torch.linalg.qr(randn(n, m)).Q.mT


OPERATORS = {
    "mask": (Mask(randn(1, 4, 6).relu()), (2, 1, 4, 6)),
    "circular blur": (Blur(randn(3, 2), batch_ndim=1), (2, 1, 4, 6)),
    "circular blur, a kernel for each channel": (Blur(randn(3, 2, 3)), (2, 3, 4, 5)),
    "circular blur, a kernel for each image": (Blur(randn(2, 1, 3, 4)), (2, 3, 5, 7)),
    "valid blur": (Blur(randn(3, 2), boundary="valid"), (2, 1, 4, 6)),
    "valid blur of signals": (Blur(randn(4), boundary="valid", spatial_ndim=1), (2, 7)),
    "wide matrix": (MatrixOperator(randn(5, 12), shape=(3, 4)), (2, 3, 4)),
    "tall matrix": (MatrixOperator(randn(9, 6)), (2, 6)),
    "learned matrix": (MatrixOperator(nn.Parameter(randn(5, 12)), shape=(3, 4)), (2, 3, 4)),
    "learned tall matrix": (MatrixOperator(nn.Parameter(randn(9, 6))), (2, 6)),
    "a matrix for each problem": (MatrixOperator(randn(2, 3, 6)), (2, 6)),
    "products": (LinearOperator(lambda x: x.cumsum(-1), lambda y: y.flip(-1).cumsum(-1).flip(-1)), (2, 5)),
    "orthonormal rows": (
        LinearOperator(lambda x: x @ orthonormal(3, 5).mT, lambda y: y @ orthonormal(3, 5), orthonormal_rows=True),
        (2, 5),
    ),
}


@pytest.fixture(params=OPERATORS.values(), ids=list(OPERATORS))
def case(request: pytest.FixtureRequest) -> tuple[LinearOperator, tuple[int, ...]]:
    return request.param


def test_the_two_products_fit(case: tuple[LinearOperator, tuple[int, ...]]) -> None:
    operator, shape = case
    assert adjoint_error(operator, torch.empty(shape, dtype=torch.float64), generator=generator()) < 1e-15
    torch.testing.assert_close(operator(randn(*shape)), operator.A(randn(*shape)), rtol=0, atol=0)


def test_prox_is_the_solution_of_the_normal_equations(case: tuple[LinearOperator, tuple[int, ...]]) -> None:
    operator, shape = case
    z, y = randn(*shape, seed=1), operator.A(randn(*shape, seed=2)).detach() + 0.1
    for gamma in (0.3, 20.0, torch.tensor([0.3, 20.0], dtype=torch.float64)):
        u = operator.prox_l2(z, y, gamma).detach()
        scale = gamma.reshape(2, *[1] * (z.dim() - 1)) if isinstance(gamma, Tensor) else gamma
        residual = (u - z + scale * operator.A_adjoint(operator.A(u) - y)).detach()
        assert float(residual.abs().max()) < 1e-10 * float((z + scale * operator.A_adjoint(y)).detach().abs().max())


def test_prox_is_differentiated_in_everything(case: tuple[LinearOperator, tuple[int, ...]]) -> None:
    operator, shape = case
    z, y = randn(*shape, seed=1).requires_grad_(), operator.A(randn(*shape, seed=2)).detach().requires_grad_()
    gamma = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(operator.prox_l2, (z, y, gamma), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(operator.prox_l2, (z, y, gamma), fast_mode=True)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_the_kernel_of_a_blur_is_differentiated(boundary: str) -> None:
    z, kernel = randn(1, 1, 4, 5).requires_grad_(), randn(3, 2, seed=3).requires_grad_()
    y = Blur(kernel.detach(), boundary=boundary).A(randn(1, 1, 4, 5, seed=4))

    def prox(z: Tensor, kernel: Tensor) -> Tensor:
        return Blur(kernel, boundary=boundary).prox_l2(z, y, 0.7)

    torch.autograd.gradcheck(prox, (z, kernel), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(prox, (z, kernel), fast_mode=True)


@pytest.mark.parametrize("tall", [False, True])
def test_a_matrix_is_differentiated(tall: bool) -> None:
    z, matrix = randn(2, 3).requires_grad_(), (randn(4, 3) if tall else randn(2, 3)).requires_grad_()
    y = randn(2, 4 if tall else 2, seed=2)

    def prox(z: Tensor, matrix: Tensor) -> Tensor:
        return MatrixOperator(matrix).prox_l2(z, y, torch.tensor([0.4, 3.0], dtype=z.dtype))

    torch.autograd.gradcheck(prox, (z, matrix), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(prox, (z, matrix), fast_mode=True)
    # A constant matrix goes another way, to the same place; a tangent or a vmap makes a matrix one that is differentiated.
    torch.testing.assert_close(prox(z, matrix), prox(z, matrix.detach()), rtol=1e-11, atol=1e-11)
    pushed = torch.func.jvp(lambda m: prox(z.detach(), m), (matrix.detach(),), (torch.ones_like(matrix),))[1]
    assert pushed.any()


def test_circular_blur_is_convolution_with_the_kernel_centred() -> None:
    x, kernel = randn(1, 1, 6, 7), randn(3, 5)
    padded = nn.functional.pad(x, (2, 2, 1, 1), mode="circular")
    exact = nn.functional.conv2d(padded, kernel.flip(0, 1)[None, None])
    torch.testing.assert_close(Blur(kernel).A(x), exact)


@pytest.mark.parametrize("extent", [(3, 5), (2, 4), (1, 1)])
def test_valid_blur_is_convolution_without_padding(extent: tuple[int, int]) -> None:
    x, kernel = randn(2, 3, 6, 7), randn(*extent)
    exact = nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel.flip(0, 1)[None, None]).unflatten(0, (2, 3))[:, :, 0]
    torch.testing.assert_close(Blur(kernel, boundary="valid").A(x), exact)


def test_the_norm_of_an_operator() -> None:
    matrix = randn(5, 8)
    exact = float(torch.linalg.matrix_norm(matrix, 2) ** 2)
    assert abs(squared_norm(MatrixOperator(matrix), torch.empty(1, 8).double(), generator=generator()) - exact) < 1e-2 * exact
    box = Blur(torch.full((3, 3), 1 / 9, dtype=torch.float64))
    assert abs(squared_norm(box, torch.empty(1, 1, 8, 8).double(), generator=generator()) - 1) < 1e-3


def test_a_wrong_adjoint_is_seen() -> None:
    wrong = LinearOperator(lambda x: x.cumsum(-1), lambda y: y.cumsum(-1))
    assert adjoint_error(wrong, torch.empty(2, 5).double(), generator=generator()) > 1e-3


def test_constants_are_buffers_and_parameters_are_parameters() -> None:
    fixed, learned = MatrixOperator(randn(2, 3)), MatrixOperator(nn.Parameter(randn(2, 3)))
    assert not list(fixed.parameters())
    assert [name for name, _ in learned.named_parameters()] == ["matrix"]
    assert fixed.float().prox_l2(torch.ones(1, 3), torch.ones(1, 2), 1.0).dtype == torch.float32


def test_loading_a_matrix_loads_its_factors() -> None:
    first, second = MatrixOperator(randn(2, 3)), MatrixOperator(randn(2, 3, seed=1))
    second.load_state_dict(first.state_dict())
    z, y = randn(1, 3, seed=2), randn(1, 2, seed=3)
    torch.testing.assert_close(second.prox_l2(z, y, 0.5), first.prox_l2(z, y, 0.5), rtol=0, atol=0)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="product of shape"):
        MatrixOperator(randn(2, 6), shape=(2, 2))
    with pytest.raises(ShapeError, match=r"expected x of shape \(\*batch, 2, 3\)"):
        MatrixOperator(randn(2, 6), shape=(2, 3)).A(randn(1, 6))
    with pytest.raises(ShapeError, match="larger than the image"):
        Blur(randn(5, 5)).A(randn(1, 1, 4, 4))
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        Blur(randn(5))
    with pytest.raises(ValueError, match="boundary"):
        Blur(randn(5, 5), boundary="same")


def test_another_matrix_is_not_answered_with_the_factors_of_the_first() -> None:
    operator = MatrixOperator(torch.eye(2, dtype=torch.float64))
    z, y = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(operator.prox_l2(z, y, 1.0), z / 2)
    operator.load_state_dict({"matrix": 2 * torch.eye(2, dtype=torch.float64)})
    torch.testing.assert_close(operator.prox_l2(z, y, 1.0), z / 5)
    operator.matrix *= 0.0
    torch.testing.assert_close(operator.prox_l2(z, y, 1.0), z)
    other = torch.eye(2, dtype=torch.float64, requires_grad=True)
    replaced = torch.func.functional_call(operator, {"matrix": other.detach()}, (z,))
    torch.testing.assert_close(replaced, z)
    operator.matrix = other
    (slope,) = torch.autograd.grad(operator.prox_l2(z, y, 1.0).sum(), other)
    assert slope.abs().max() > 0


@pytest.mark.slow
def test_radons_transform_of_scikit_image_as_a_pair_of_products() -> None:
    transform = pytest.importorskip("skimage.transform")
    data = pytest.importorskip("skimage.data")
    size, angles = 32, np.arange(0, 180, 18)
    pixels = np.eye(size**2).reshape(-1, size, size)
    columns = [transform.radon(pixel, angles, circle=False).ravel() for pixel in pixels]
    matrix = torch.tensor(np.stack(columns, 1), dtype=torch.float64).to_sparse()
    tomograph = LinearOperator(
        lambda x: (matrix @ x.flatten(1).mT).mT,
        lambda y: (matrix.mT @ y.mT).mT.reshape(-1, 1, size, size),
    )
    clean = transform.resize(data.shepp_logan_phantom(), (size, size), anti_aliasing=True)
    image = torch.from_numpy(clean)[None, None]
    assert adjoint_error(tomograph, image) <= 1e-13

    y = tomograph.A(image)
    torch.testing.assert_close(y, torch.from_numpy(transform.radon(clean, angles, circle=False).reshape(1, -1)))
    step = 1 / squared_norm(tomograph, image)
    layer = PlugAndPlay("fista", lambda x: prox_tv2d(x[:, 0], 1e-3, tol=1e-6)[:, None], L2(tomograph), step, tol=2e-4)
    filtered = transform.iradon(y.reshape(-1, len(angles)).numpy(), angles, circle=False, output_size=size)
    found = layer(y)
    assert (found - image).square().mean() < 0.5 * np.square(filtered - clean).mean()
