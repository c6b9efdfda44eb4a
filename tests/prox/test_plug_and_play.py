from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor, nn

from difflayers.errors import ConvergenceWarning, NotConvergedError, ShapeError
from difflayers.prox import L2, Blur, ConvexGradientNetwork, LinearOperator, Mask, MatrixOperator, PlugAndPlay
from difflayers.solution import Status
from tests.reference import relative_error

ALGORITHMS = ("pgd", "fista", "hqs", "admm", "drs")


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    return x.sign() * (x.abs() - threshold).clamp(min=0)


class L1:
    """λ‖x‖₁, called as deepinv calls its priors."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.calls: list[tuple[Any, ...]] = []

    def prox(self, x: Tensor, *args: Any, gamma: Any = 1.0) -> Tensor:
        self.calls.append((*args, gamma))
        return soft_threshold(x, self.weight * gamma)


class Physics:
    """What deepinv calls physics: A and its adjoint on images with a batch in front."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x @ self.matrix.mT

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        return y @ self.matrix


def linear_problem() -> tuple[Tensor, ...]:
    """Matrix, measurements, step size, and a denoiser x -> W x + b that contracts."""
    weight = randn(4, 4, seed=1)
    weight = weight @ weight.mT
    weight = 0.5 * weight / torch.linalg.matrix_norm(weight, 2) + 0.2 * torch.eye(4)
    return tuple(
        part.requires_grad_()
        for part in (randn(3, 4, scale=0.7), randn(2, 3, seed=2), torch.tensor(0.4).double(), weight, randn(4, seed=3))
    )


def linear_fixed_point(algorithm: str, A: Tensor, y: Tensor, s: Tensor, W: Tensor, b: Tensor) -> Tensor:
    identity, gram = torch.eye(4, dtype=A.dtype), A.mT @ A
    pulled = s * y @ A
    if algorithm == "hqs":  # x = W (I + sAᵀA)⁻¹ (x + sAᵀy) + b
        fit = torch.linalg.inv(identity + s * gram)
        return (pulled @ fit @ W.mT + b) @ torch.linalg.inv(identity - W @ fit).mT
    # x = W (x − sAᵀ(A x − y)) + b: where proximal gradient stops, alternating directions and Douglas–Rachford stop as well.
    return (pulled @ W.mT + b) @ torch.linalg.inv(identity - W @ (identity - s * gram)).mT


MODES: dict[str, dict[str, Any]] = {"ift": {}, "anderson": {"solver": "anderson"}, "unroll": {"backward": "unroll", "max_iter": 150}}


@pytest.mark.parametrize(("algorithm", "mode"), [(a, m) for a in ALGORITHMS for m in MODES if (a, m) != ("fista", "anderson")])
def test_with_a_linear_denoiser_the_fixed_point_is_a_closed_form(algorithm: str, mode: str) -> None:
    A, y, s, W, b = inputs = linear_problem()
    layer = PlugAndPlay(algorithm, lambda x: x @ W.mT + b, L2(MatrixOperator(A)), s, **MODES[mode])
    x, exact = layer(y), linear_fixed_point(algorithm, *inputs)
    assert relative_error(x, exact) < 1e-10
    weights = randn(2, 4, seed=5)
    slopes = torch.autograd.grad((weights * x).sum(), inputs, create_graph=True)
    wanted = torch.autograd.grad((weights * exact).sum(), inputs, create_graph=True)
    for slope, want in zip(slopes, wanted, strict=True):
        assert relative_error(slope, want) < 1e-9
    second = torch.autograd.grad(sum((slope**2).sum() for slope in slopes), inputs)
    for found, want in zip(second, torch.autograd.grad(sum((want**2).sum() for want in wanted), inputs), strict=True):
        assert relative_error(found, want) < 1e-8


@pytest.mark.parametrize("algorithm", ["pgd", "fista", "admm", "drs"])
def test_with_the_prior_l1_the_fixed_point_is_the_lasso(algorithm: str) -> None:
    A, y, weight = randn(6, 4, scale=0.5), randn(2, 6, seed=1), 0.3
    x = PlugAndPlay(algorithm, prior=L1(weight), data_fidelity=L2(MatrixOperator(A)), stepsize=0.25, max_iter=5000)(y)
    for row, measured in zip(x, y, strict=True):
        unknown = cp.Variable(4)
        cp.Problem(cp.Minimize(cp.sum_squares(A.numpy() @ unknown - measured.numpy()) / 2 + weight * cp.norm1(unknown))).solve(
            solver=cp.CLARABEL
        )
        assert relative_error(row, torch.tensor(unknown.value)) < 1e-6
    assert (x == 0).any()


def test_half_quadratic_splitting_minimizes_with_the_envelope_of_the_data() -> None:
    # min over x and u of f(u) + ‖x − u‖² / (2s) + R(x), which is the lasso of another matrix.
    mask, y, s, weight = randn(1, 5), randn(1, 5, seed=1), 0.8, 0.1
    x = PlugAndPlay("hqs", prior=L1(weight), data_fidelity=L2(Mask(mask)), stepsize=s)(y)
    # One entry: f has the envelope (m x − y)² / (2 (1 + s m²)).
    slope = mask * (mask * x - y) / (1 + s * mask**2)
    assert float((slope + weight * x.sign())[x != 0].abs().max()) < 1e-10
    assert float(slope[x == 0].abs().max()) <= weight


class Network(nn.Module):
    """A contraction with weights, told its noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", dtype=torch.float64)
        with torch.no_grad():
            self.filter.weight.copy_(randn(2, 1, 3, 3, seed=7, scale=0.15))
            self.filter.bias.copy_(randn(2, seed=8, scale=0.2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * (1.2 * x + torch.tanh(self.filter(x)).mean(1, keepdim=True))


def deblurring(algorithm: str, **options: Any) -> PlugAndPlay:
    kernel = nn.Parameter(torch.tensor([[0.1, 0.2, 0.0], [0.1, 0.4, 0.2]], dtype=torch.float64))
    fidelity = L2(Blur(kernel), weight=nn.Parameter(torch.tensor(1.1).double()))
    stepsize, sigma = (nn.Parameter(torch.tensor(value).double()) for value in (0.9, 0.5))
    return PlugAndPlay(algorithm, Network(), fidelity, stepsize, sigma, **options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_parameter_has_the_gradient_of_finite_differences(algorithm: str) -> None:
    layer, y = deblurring(algorithm), randn(2, 1, 3, 4, seed=4)
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {
        "stepsize",
        "sigma",
        "denoiser.filter.weight",
        "denoiser.filter.bias",
        "data_fidelity.weight",
        "data_fidelity.operator.kernel",
    }
    weights = randn(2, 1, 3, 4, seed=5)

    def loss() -> Tensor:
        return (weights * layer(y)).sum()

    loss().backward()
    for name, parameter in parameters.items():
        direction, h = randn(*parameter.shape, seed=6), 1e-5
        with torch.no_grad():
            parameter.add_(h * direction)
            ahead = loss()
            parameter.sub_(2 * h * direction)
            difference = float(ahead - loss()) / (2 * h)
            parameter.add_(h * direction)
        slope = float((parameter.grad * direction).sum())
        assert abs(slope - difference) <= 1e-6 * abs(difference), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unrolling_goes_to_the_implicit_gradient(algorithm: str) -> None:
    y = randn(1, 1, 3, 4, seed=4)
    slopes = {}
    for steps, options in ((0, {}), (60, {"backward": "unroll", "max_iter": 60, "tol": 1e-2})):
        layer = deblurring(algorithm, **options)
        found = layer.solve(y)
        found.x.square().sum().backward()
        slopes[steps] = layer.denoiser.filter.weight.grad
        assert not steps or found.iterations.tolist() == [steps]
    assert relative_error(slopes[60], slopes[0]) < 1e-4


@pytest.mark.parametrize("backward", ["jfb", "phantom", "neumann"])
def test_the_cheaper_ways_back_go_the_same_way(backward: str) -> None:
    y = randn(1, 1, 3, 4, seed=4)
    slopes = []
    for mode in ("ift", backward):
        layer = deblurring("admm", backward=mode)
        layer(y).square().sum().backward()
        slopes.append(torch.cat([parameter.grad.flatten() for parameter in layer.denoiser.parameters()]))
    assert float(nn.functional.cosine_similarity(*slopes, dim=0)) > 0.8


def test_the_iterates_are_those_of_the_algorithm() -> None:
    y, gamma = randn(1, 5, seed=1), 0.7
    fidelity, prior = L2(Mask(randn(5))), L1(0.2)
    x = fidelity.start(y)
    z = torch.zeros_like(x)
    for steps in range(1, 4):
        u = fidelity.prox(x - z, y, gamma=gamma)
        x = prior.prox(u + z, gamma=gamma)
        z = z + u - x
        unrolled = PlugAndPlay(
            "admm", prior=prior, data_fidelity=fidelity, stepsize=gamma, backward="unroll", max_iter=steps, tol=torch.inf
        )
        torch.testing.assert_close(unrolled(y), x)


def test_momentum_pays_where_the_problem_is_badly_conditioned() -> None:
    matrix = torch.diag(torch.logspace(-1, 0, 8, dtype=torch.float64))
    y = randn(3, 8)
    found = {
        algorithm: PlugAndPlay(algorithm, lambda x: x, L2(MatrixOperator(matrix)), 1.0, tol=1e-10, max_iter=5000).solve(y)
        for algorithm in ("pgd", "fista")
    }
    assert relative_error(found["fista"].x, y / matrix.diagonal()) < 1e-6
    assert (2 * found["fista"].iterations < found["pgd"].iterations).all()


def test_an_image_stops_by_itself_and_a_batch_is_a_loop() -> None:
    y = randn(3, 1, 3, 4, seed=4) * torch.tensor([1.0, 30.0, 0.0]).double().reshape(3, 1, 1, 1)
    layer = deblurring("admm", max_iter=2000)
    together = layer.solve(y)
    alone = [layer.solve(image[None]) for image in y]
    torch.testing.assert_close(together.x, torch.cat([found.x for found in alone]), rtol=1e-10, atol=1e-10)
    assert together.iterations.tolist() == [int(found.iterations) for found in alone]
    assert len(set(together.iterations.tolist())) > 1


def test_step_size_and_weight_may_differ_from_image_to_image() -> None:
    y, steps, weights = randn(2, 5), torch.tensor([0.5, 0.9]).double(), torch.tensor([1.0, 0.3]).double()
    operator = MatrixOperator(randn(3, 5, scale=0.4))
    measured = operator.A(y)
    for algorithm in ALGORITHMS:
        together = PlugAndPlay(algorithm, lambda x: x / 2, L2(operator, weights), steps)(measured)
        for i in range(2):
            alone = PlugAndPlay(algorithm, lambda x: x / 2, L2(operator, float(weights[i])), float(steps[i]))(measured[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_denoiser_and_prior_are_called_as_deepinv_calls_them() -> None:
    told: list[tuple[Any, ...]] = []

    def denoiser(*args: Any) -> Tensor:
        told.append(args[1:])
        return args[0] / 2

    y = randn(2, 5)
    PlugAndPlay("pgd", denoiser, L2(), stepsize=0.5)(y)
    PlugAndPlay("pgd", denoiser, L2(), stepsize=0.5, sigma=0.1)(y)
    assert set(told) == {(), (0.1,)}
    for sigma in (None, 0.1):
        prior = L1(0.3)
        PlugAndPlay("pgd", prior=prior, data_fidelity=L2(), stepsize=0.5, sigma=sigma)(y)
        assert {tuple(map(float, call)) for call in prior.calls} == {(0.5,) if sigma is None else (0.1, 0.5)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_physics_may_be_given_at_the_call(algorithm: str) -> None:
    class Foreign:
        """A data fidelity with deepinv's signatures and no operator of its own."""

        def grad(self, x: Tensor, y: Tensor, physics: Physics, *args: Any, **kwargs: Any) -> Tensor:
            return physics.A_adjoint(physics.A(x) - y)

        def prox(self, x: Tensor, y: Tensor, physics: Physics, *args: Any, gamma: Any = 1.0, **kwargs: Any) -> Tensor:
            gram = torch.eye(x.shape[-1], dtype=x.dtype) + gamma * physics.matrix.mT @ physics.matrix
            return (x + gamma * physics.A_adjoint(y)) @ torch.linalg.inv(gram)

    matrix = randn(3, 5, scale=0.4).requires_grad_()
    y = randn(2, 3, seed=1)
    expected = PlugAndPlay(algorithm, lambda x: x / 2, L2(MatrixOperator(matrix)))(y)
    wanted = torch.autograd.grad(expected.square().sum(), matrix)[0]
    for fidelity, options in ((Foreign(), {"physics": Physics(matrix)}), (L2(), {"physics": Physics(matrix)}), (L2(Physics(matrix)), {})):
        x = PlugAndPlay(algorithm, lambda x: x / 2, fidelity)(y, **options)
        assert relative_error(x, expected) < 1e-10
        assert relative_error(torch.autograd.grad(x.square().sum(), matrix)[0], wanted) < 1e-9


def test_an_expansive_map_is_reported_with_the_images_reached() -> None:
    y = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    gains = torch.tensor([0.5, 3.0, 0.5]).double().reshape(3, 1, 1, 1)
    layer = PlugAndPlay("admm", lambda x: gains * x, L2(), stepsize=0.1, max_iter=200)
    with pytest.raises(NotConvergedError, match="1 of 3") as caught:
        layer(y)
    assert caught.value.indices == [(1,)]
    assert caught.value.solution.x.shape == y.shape
    assert caught.value.solution.status[[0, 2]].tolist() == [Status.SOLVED] * 2
    assert "firmly nonexpansive" in caught.value.__notes__[0]
    with pytest.raises(NotConvergedError) as caught:
        PlugAndPlay("pgd", lambda x: x, L2(), stepsize=2.5)(y, torch.zeros_like(y))
    assert "below 2 / L" in caught.value.__notes__[0]
    with pytest.warns(ConvergenceWarning):
        best = PlugAndPlay("admm", lambda x: gains * x, L2(), stepsize=0.1, max_iter=200, on_failure="warn")(y)
    good = PlugAndPlay("admm", lambda x: x / 2, L2(), stepsize=0.1)(y)
    torch.testing.assert_close(best[[0, 2]], good[[0, 2]])


def test_a_start_near_the_end_saves_iterations_and_passes_no_gradient() -> None:
    layer, y = deblurring("drs"), randn(1, 1, 3, 4, seed=4)
    cold = layer.solve(y)
    x0 = cold.x.detach().requires_grad_()
    warm = deblurring("pgd").solve(y, x0)
    assert int(warm.iterations) < int(deblurring("pgd").solve(y).iterations)
    assert torch.autograd.grad(warm.x.sum(), x0, allow_unused=True)[0] is None


def test_a_fidelity_that_cannot_start_needs_a_start() -> None:
    class Gradient:
        def grad(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    layer, y = PlugAndPlay("pgd", lambda x: x / 2, Gradient(), 0.5), randn(2, 3)
    with pytest.raises(TypeError, match="pass x0"):
        layer(y)
    torch.testing.assert_close(layer(y, torch.zeros_like(y)), y / 3)


def test_without_a_batch() -> None:
    y = randn(3)
    found = PlugAndPlay("admm", lambda x: x / 2, L2(MatrixOperator(torch.eye(3).double())), batch_ndim=0).solve(y)
    assert found.status.shape == ()
    torch.testing.assert_close(found.x, y / 2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"algorithm": "chambolle_pock"}, ValueError, "choose one of pgd, fista, hqs, admm, drs"),
        ({"algorithm": "fista", "solver": "anderson"}, ValueError, "take algorithm='pgd'"),
        ({"solver": "bisection"}, ValueError, "solver 'bisection' is not known"),
        ({"denoiser": None}, TypeError, "one of the two"),
        ({"prior": L1(1.0)}, TypeError, "one of the two"),
        ({"denoiser": L1(1.0)}, TypeError, "an object with .prox is a prior="),
        ({"denoiser": None, "prior": torch.relu}, TypeError, "a denoiser goes to denoiser="),
        ({"data_fidelity": None}, TypeError, r"calls data_fidelity\.prox, which NoneType has not"),
        ({"data_fidelity": torch.relu, "algorithm": "pgd"}, TypeError, r"data_fidelity\.grad"),
        ({"stepsize": 0.0}, ValueError, "stepsize must be positive"),
        ({"stepsize": float("nan")}, ValueError, "stepsize must be positive"),
        ({"sigma": -0.1}, ValueError, "sigma must be non-negative"),
        ({"stepsize": torch.ones(3)}, ShapeError, r"one for each image \(2,\)"),
        ({"denoiser": lambda x: x[..., :1]}, ShapeError, "the map must return the shape"),
        ({"batch_ndim": 3}, ShapeError, "batch_ndim=3"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"algorithm": "admm", "denoiser": lambda x: x / 2, "data_fidelity": L2()} | arguments
    with pytest.raises(error, match=match):
        PlugAndPlay(**given)(torch.zeros(2, 3))


def test_it_says_what_it_is() -> None:
    layer = deblurring("admm", solver="anderson", max_iter=50)
    assert "'admm', stepsize=0.9, sigma=0.5, solver='anderson', max_iter=50" in repr(layer)
    assert "kernel: (2, 3), boundary='circular'" in repr(layer)
    assert "weight=1.1" in repr(layer)
    assert "sigma" not in repr(PlugAndPlay("pgd", torch.tanh, L2(LinearOperator(torch.neg, torch.neg))))


@pytest.mark.parametrize("algorithm", ["pgd", "admm"])
def test_our_networks_are_denoisers_and_priors(algorithm: str) -> None:
    torch.manual_seed(0)
    network = ConvexGradientNetwork(4, hidden=3, strong_convexity=0.2, lipschitz=0.9).double()
    y = randn(2, 4)
    fidelity = L2(MatrixOperator(0.5 * torch.eye(4).double()))
    as_denoiser = PlugAndPlay(algorithm, network, fidelity, stepsize=1.0)(y)
    as_prior = PlugAndPlay(algorithm, prior=network, data_fidelity=fidelity, stepsize=1.0)(y)
    torch.testing.assert_close(as_prior, as_denoiser)
    # What it stops at minimizes ‖x/2 − y‖²/2 + R(x), with the prior that the network is the proximal operator of.
    x = as_prior.detach().requires_grad_()
    (slope,) = torch.autograd.grad((fidelity(x, y) + network.prior(x)).sum(), x)
    assert float(slope.abs().max()) < 1e-8
    assert all(part.any() for part in torch.autograd.grad(as_denoiser.square().sum(), [p for p in network.parameters() if p.numel() > 1]))
