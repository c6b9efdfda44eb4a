import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import linear

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, statuses

KRYLOV = {"cg": linear.cg, "normal_cg": linear.normal_cg, "gmres": linear.gmres, "bicgstab": linear.bicgstab, "neumann": linear.neumann}
# What each method promises to solve.
SYMMETRIC = ("cg", "normal_cg", "gmres", "bicgstab")
GENERAL = ("normal_cg", "gmres")


def spd(n, condition, *batch, dtype=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=D, generator=generator))[0]
    eigenvalues = condition ** torch.linspace(0, -1, n, dtype=D)
    return ((q * eigenvalues) @ q.mT).to(dtype)


def randn(*shape, dtype=D, seed=1):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def direct(A, b):
    return torch.linalg.solve(A, b[..., None]).squeeze(-1)


def product(A):
    return lambda v: (A @ v[..., None]).squeeze(-1)


def krylov(name, A, b, **options):
    if name == "normal_cg":
        options["rmatvec"] = product(A.mT)
    return KRYLOV[name](product(A), b, **options)


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("n", [1, 2, 7, 60])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3])
def test_definite_systems(name, n, condition):
    A, b = spd(n, condition, 3), randn(3, n)
    solution = krylov(name, A, b)
    assert_solved(solution, 1e-11)
    torch.testing.assert_close(solution.x, direct(A, b), rtol=1e-8, atol=1e-8 * condition)


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_nonsymmetric_indefinite_systems(name, n):
    A, b = randn(4, n, n), randn(4, n, seed=2)
    solution = krylov(name, A, b)
    assert_solved(solution, 1e-11)
    torch.testing.assert_close(solution.x, direct(A, b), rtol=1e-7, atol=1e-8)


def test_skew_symmetric_is_for_gmres_and_refused_by_bicgstab():
    A = randn(2, 20, 20)
    A, b = A - A.mT, randn(2, 20)
    assert_solved(linear.gmres(product(A), b))
    assert Status.SOLVED not in statuses(linear.bicgstab(product(A), b))


def test_gmres_restarts_and_escapes_stagnation():
    # The cyclic shift: restarted GMRES makes no progress at all before the cycle has n columns.
    n = 24
    shift = torch.eye(n, dtype=D).roll(1, 0)
    b = torch.eye(n, dtype=D)[0]
    solution = linear.gmres(product(shift), b, restart=5, max_iter=200)
    assert_solved(solution)
    torch.testing.assert_close(solution.x, direct(shift, b))
    A = spd(80, 1e3) + 0.1 * randn(80, 80) / 80**0.5
    assert_solved(linear.gmres(product(A), randn(80), restart=7, max_iter=5000))


def test_gmres_happy_breakdown_per_row():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=D))
    b = torch.stack([torch.eye(4, dtype=D)[2], torch.ones(4, dtype=D), torch.zeros(4, dtype=D)])
    solution = linear.gmres(product(A), b)
    assert_solved(solution, 1e-14)
    assert solution.iterations.tolist() == [1, 4, 0]


def test_bicgstab_on_a_convection_diffusion_matrix():
    n = 100
    A = (
        torch.diag(torch.full((n,), 2.2, dtype=D))
        - torch.diag(torch.full((n - 1,), 1.3, dtype=D), 1)
        - torch.diag(torch.full((n - 1,), 0.7, dtype=D), -1)
    )
    solution = linear.bicgstab(product(A), randn(5, n))
    assert_solved(solution, 1e-11)


def test_neumann_is_the_truncated_series():
    J = 0.6 * spd(8, 3.0)
    b = randn(2, 8)
    terms = linear.neumann(lambda v: v - product(J)(v), b, max_iter=4, tol=0.0)
    series = b + product(J)(b) + product(J)(product(J)(b)) + product(J)(product(J)(product(J)(b)))
    torch.testing.assert_close(terms.x, series)
    assert statuses(terms) == [Status.MAX_ITER] * 2
    solution = linear.neumann(lambda v: v - product(J)(v), b)
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x, direct(torch.eye(8, dtype=D) - J, b))


def test_neumann_keeps_transient_terms_and_detects_divergence():
    # A nilpotent J: the terms grow by 50 and then vanish; the series of six terms is exact.
    J = torch.diag(torch.full((5,), 50.0, dtype=D), 1)
    b = torch.zeros(2, 6, dtype=D)
    b[:, -1] = 1.0
    A = torch.stack([torch.eye(6, dtype=D) - 0.1 * J, torch.eye(6, dtype=D) + 3 * torch.eye(6, dtype=D)])
    solution = linear.neumann(product(A), b)
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR]
    torch.testing.assert_close(solution.x[0], direct(A[0], b[0]))
    assert torch.isfinite(solution.x).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cg_preconditioners(sign):
    A = sign * (spd(60, 1e2) + torch.diag(torch.logspace(0, 4, 60, dtype=D)))
    b, diagonal = randn(2, 60), A.diagonal()
    plain = linear.cg(product(A), b)
    jacobi = linear.cg(product(A), b, preconditioner=lambda r: r / diagonal)
    assert_solved(jacobi, 1e-11)
    assert int(jacobi.iterations.max()) < int(plain.iterations.min()) // 2
    exact = linear.cg(product(A), b, preconditioner=lambda r: direct(A, r))
    assert int(exact.iterations.max()) <= 2


def test_cg_with_the_identity_and_with_scaled_preconditioners_is_plain_cg():
    A, b = spd(50, 1e2), randn(50)
    plain = linear.cg(product(A), b)
    for preconditioner in (lambda r: r, lambda r: -1e-6 * r):
        assert abs(int(linear.cg(product(A), b, preconditioner=preconditioner).iterations) - int(plain.iterations)) <= 1


def test_flexible_cg_needs_more_directions_for_a_nonlinear_preconditioner():
    A, b = spd(60, 1e3), randn(60)

    def nonlinear(r):
        return r * (1 + 0.5 * torch.tanh(5 * r))

    counts = {m: int(linear.cg(product(A), b, preconditioner=nonlinear, truncation=m, max_iter=3000).iterations) for m in (1, 50)}
    assert counts[50] < 0.6 * counts[1]


@pytest.mark.parametrize("useless", [torch.zeros_like, lambda r: torch.full_like(r, torch.nan), lambda r: r.flip(-1) * 1e200])
def test_cg_survives_a_useless_preconditioner(useless):
    A, b = spd(20, 1e2), randn(3, 20)
    solution = linear.cg(product(A), b, preconditioner=useless, max_iter=2000)
    if useless is not torch.zeros_like and torch.isfinite(useless(b)).all():
        assert_solved(linear.cg(product(A), b, preconditioner=useless, truncation=30, max_iter=2000), 1e-11)
    else:
        assert_solved(solution, 1e-11)


@pytest.mark.parametrize("name", ["normal_cg", "gmres", "bicgstab", "neumann"])
def test_preconditioners_of_the_other_methods(name):
    A = spd(40, 1e2) + torch.diag(torch.logspace(0, 3, 40, dtype=D))
    inverse = torch.linalg.inv(A + 1e-3 * spd(40, 10.0, seed=5))
    M = inverse @ inverse if name == "normal_cg" else inverse
    solution = krylov(name, A, randn(3, 40), preconditioner=product(M))
    assert_solved(solution, 1e-11)
    assert int(solution.iterations.max()) <= 12


@pytest.mark.parametrize("name", KRYLOV)
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_rows_fail_alone(name, dtype):
    n = 12
    good = 0.5 * spd(n, 2.0, dtype=dtype) + 0.25 * torch.eye(n, dtype=dtype)
    half = randn(n, n - 2, dtype=dtype) / n
    A = torch.stack([good, half @ half.mT, torch.nan * good, good, torch.nan * good, good])
    b = randn(6, n, dtype=dtype)
    b[3, 4] = torch.nan
    b[4] = 0
    solution = krylov(name, A, b, max_iter=1000)
    assert solution.x.dtype == solution.residual.dtype == dtype
    singular = (Status.MAX_ITER,) if name == "neumann" else (Status.SINGULAR,)
    assert statuses(solution)[1] in singular
    assert [statuses(solution)[i] for i in (0, 2, 3, 4, 5)] == [
        Status.SOLVED,
        Status.NUMERICAL_ERROR,
        Status.NUMERICAL_ERROR,
        Status.SOLVED,
        Status.SOLVED,
    ]
    assert torch.isnan(solution.x[3]).all()
    assert torch.equal(solution.x[4], torch.zeros(n, dtype=dtype))
    for i in (0, 5):
        alone = krylov(name, A[i], b[i])
        torch.testing.assert_close(solution.x[i], alone.x)


@settings(max_examples=50)
@given(st.integers(2, 30), st.integers(0, 10_000), st.sampled_from(SYMMETRIC), st.sampled_from([D, torch.float32]))
def test_no_wrong_answer_is_called_solved(n, seed, name, dtype):
    """Rank-deficient matrices with right-hand sides off their range, well and badly scaled, from a whole family."""
    half = randn(n, n - 1, seed=seed, dtype=dtype)
    A = half @ half.mT / n * 10.0 ** (seed % 7 - 3)
    null = torch.linalg.eigh(A.double()).eigenvectors[:, 0].to(dtype)
    b = product(A)(randn(n, seed=seed + 1, dtype=dtype)) + A.abs().max() * null
    solution = krylov(name, A, b)
    assert statuses(solution)[0] != Status.SOLVED
    assert float(solution.residual) <= 1 + 1e-6


@settings(max_examples=50)
@given(st.integers(1, 25), st.integers(0, 10_000), st.floats(-30, 30), st.sampled_from(SYMMETRIC))
def test_scaling_a_system_changes_nothing(n, seed, exponent, name):
    A, b = spd(n, 50.0, 2, seed=seed), randn(2, n, seed=seed)
    scale = 10.0**exponent
    x, scaled = krylov(name, A, b), krylov(name, A, b * scale)
    assert_solved(scaled, 1e-11)
    torch.testing.assert_close(scaled.x / scale, x.x, rtol=1e-9, atol=1e-9 * float(x.x.abs().max()))


@pytest.mark.parametrize("name", SYMMETRIC)
def test_tiny_float32_gradients_do_not_underflow(name):
    A = spd(10, 10.0, dtype=torch.float32)
    b = randn(10, dtype=torch.float32) * 1e-30
    solution = krylov(name, A, b)
    assert_solved(solution)
    torch.testing.assert_close(solution.x * 1e30, direct(A, b * 1e30), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_ill_conditioned_systems_are_solved_to_rounding_or_say_no(name):
    A, x = spd(30, 1e9, 4), randn(4, 30)
    solution = krylov(name, A, product(A)(x), max_iter=3000)
    true = torch.linalg.vector_norm(product(A)(x) - product(A)(solution.x), dim=-1) / torch.linalg.vector_norm(product(A)(x), dim=-1)
    torch.testing.assert_close(true, solution.residual, rtol=0.5, atol=1e-14)
    assert float(solution.residual[solution.status == Status.SOLVED].max() if (solution.status == 0).any() else 0) < 1e-6


@pytest.mark.parametrize("name", KRYLOV)
def test_batch_is_a_loop(name):
    A = 0.5 * spd(15, 20.0, 4) + 0.2 * torch.eye(15, dtype=D)
    b = randn(4, 15) * torch.tensor([1.0, 1e-8, 1e8, 0.0], dtype=D)[:, None]
    assert_batch_is_loop(lambda A, b: krylov(name, A, b), A, b, atol=1e-9)
    nested = krylov(name, A.reshape(2, 2, 15, 15), b.reshape(2, 2, 15))
    assert nested.status.shape == (2, 2)
    torch.testing.assert_close(nested.x.reshape(4, 15), krylov(name, A, b).x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KRYLOV)
def test_warm_start_limits_and_empty_batches(name):
    A, b = 0.5 * spd(10, 4.0) + 0.2 * torch.eye(10, dtype=D), randn(3, 10)
    x = direct(A, b)
    warm = krylov(name, A, b, x0=x)
    assert warm.iterations.tolist() == [0, 0, 0]
    assert_solved(warm)
    assert torch.equal(warm.x, krylov(name, A, b, x0=x).x)
    none = krylov(name, A, b, max_iter=0)
    assert statuses(none) == [Status.MAX_ITER] * 3
    torch.testing.assert_close(none.residual, torch.ones(3, dtype=D))
    short = krylov(name, A, b, max_iter=2)
    assert statuses(short) == [Status.MAX_ITER] * 3
    assert krylov(name, A, b[:0]).x.shape == (0, 10)
    loose = krylov(name, A, b, tol=1e-2)
    assert int(loose.iterations.max()) < int(krylov(name, A, b).iterations.min())


@pytest.mark.parametrize("name", KRYLOV)
def test_no_graph_no_mutation(name):
    A, b = 0.5 * spd(6, 4.0) + 0.2 * torch.eye(6, dtype=D), randn(2, 6)
    assert_no_graph_no_mutation(lambda b, A: krylov(name, A, b), b, A)
    assert_no_graph_no_mutation(lambda x0, A: krylov(name, A, b, x0=x0), 0.1 * b, A)


def test_bad_arguments():
    A, b = torch.eye(3), torch.ones(3)
    for name in KRYLOV:
        with pytest.raises(ShapeError, match="matvec"):
            KRYLOV[name](lambda v: v[:2], b, **({"rmatvec": lambda v: v} if name == "normal_cg" else {}))
        with pytest.raises(ShapeError, match="x0"):
            krylov(name, A, b, x0=torch.ones(4))
        with pytest.raises(ShapeError, match="floating"):
            krylov(name, A, torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="tol"):
            krylov(name, A, b, tol=-1.0)
        with pytest.raises(ValueError, match="truncation"):
            krylov(name, A, b, truncation=0)
    with pytest.raises(ValueError, match="restart"):
        linear.gmres(product(A), b, restart=0)


FACTORS = {"lu": linear.lu_factor, "cholesky": linear.cholesky_factor}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("transpose", [False, True])
def test_dense_factors(kind, n, transpose):
    A = spd(n, 1e6, 3) if kind == "cholesky" else randn(3, n, n)
    b = randn(5, 2, 3, n)
    solution = FACTORS[kind](A).solve(b, transpose=transpose)
    assert_solved(solution, 1e-9)
    assert solution.x.shape == b.shape
    assert solution.status.shape == (5, 2, 3)
    reference = direct(A.mT if transpose else A, b)
    torch.testing.assert_close(solution.x, reference, rtol=1e-6, atol=1e-8 * float(reference.abs().max()))
    torch.testing.assert_close(FACTORS[kind](A[0]).solve(b[0, 0, 0], transpose=transpose).x, solution.x[0, 0, 0])


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_dense_elements_fail_alone(kind, dtype):
    n = 6
    good = spd(n, 10.0, dtype=dtype)
    half = randn(n, n - 1, dtype=dtype)
    singular = half @ half.mT
    A = torch.stack([good, singular, singular, torch.nan * good, torch.inf * good, good, 0 * good, good])
    b = randn(8, n, dtype=dtype)
    b[2], b[4], b[7, 1] = 0, 0, torch.inf
    before = A.clone(), b.clone()
    solution = FACTORS[kind](A).solve(b)
    solved, wrong = Status.SOLVED, Status.NUMERICAL_ERROR
    assert statuses(solution) == [solved, Status.SINGULAR, solved, wrong, solved, solved, Status.SINGULAR, wrong]
    assert torch.isnan(solution.x[[1, 3, 6, 7]]).all()
    assert torch.equal(solution.x[[2, 4]], torch.zeros(2, n, dtype=dtype))
    for i in (0, 5):
        torch.testing.assert_close(solution.x[i], FACTORS[kind](A[i]).solve(b[i]).x)
    torch.testing.assert_close(A, before[0], equal_nan=True)
    torch.testing.assert_close(b, before[1], equal_nan=True)


def test_cholesky_falls_back_to_lu_element_by_element():
    A = torch.stack([spd(5, 10.0), -spd(5, 10.0), torch.eye(5, dtype=D).flip(0)])
    b = randn(3, 5)
    solution = linear.cholesky_factor(A).solve(b)
    assert_solved(solution, 1e-14)
    torch.testing.assert_close(solution.x, direct(A, b))


@given(st.integers(2, 20), st.integers(0, 10_000), st.sampled_from(list(FACTORS)), st.sampled_from([D, torch.float32]))
def test_singular_matrices_are_detected_whatever_their_scaling(n, seed, kind, dtype):
    half = randn(n, n - 1, seed=seed)
    A = half @ half.mT
    units = torch.diag(2.0 ** torch.randint(-10, 10, (n,), generator=torch.Generator().manual_seed(seed)).double())
    solution = FACTORS[kind]((units @ A @ units).to(dtype)).solve(randn(n, seed=seed + 1, dtype=dtype))
    assert statuses(solution)[0] != Status.SOLVED


@given(st.integers(1, 20), st.integers(0, 10_000), st.sampled_from(list(FACTORS)))
def test_badly_scaled_matrices_are_not_called_singular(n, seed, kind):
    units = torch.diag(10.0 ** (12 * torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) - 6))
    A = units @ spd(n, 10.0, seed=seed) @ units
    solution = FACTORS[kind](A).solve(randn(n, seed=seed))
    assert_solved(solution)


def test_diagonal_of_many_magnitudes_is_regular():
    A = torch.diag(torch.tensor([1e12, 1.0, 1e-12], dtype=D))
    for kind in FACTORS:
        torch.testing.assert_close(FACTORS[kind](A).solve(torch.ones(3, dtype=D)).x, torch.tensor([1e-12, 1.0, 1e12], dtype=D))


def test_dense_bad_arguments_and_empty_sizes():
    for factor in FACTORS.values():
        with pytest.raises(ShapeError, match="square"):
            factor(torch.ones(2, 3))
        with pytest.raises(ShapeError, match="square"):
            factor(torch.ones(3, 3, dtype=torch.int64))
        with pytest.raises(ShapeError, match="last dimensions"):
            factor(torch.eye(3)).solve(torch.ones(2))
        with pytest.raises(ShapeError, match="float32"):
            factor(torch.eye(3)).solve(torch.ones(3, dtype=D))
        assert factor(torch.zeros(0, 3, 3)).solve(torch.ones(0, 3)).x.shape == (0, 3)
        assert factor(torch.zeros(2, 0, 0)).solve(torch.ones(2, 0)).status.tolist() == [0, 0]


def test_default_tolerances_follow_the_dtype():
    assert linear.default_tol(D) == 1e-12
    assert linear.default_tol(torch.float32) == 1e-6
    assert 1e-3 < linear.default_tol(torch.float16) < 1e-1


def test_normal_cg_checks_the_transposed_product():
    with pytest.raises(ShapeError, match="rmatvec"):
        linear.normal_cg(lambda v: v, torch.ones(3), rmatvec=lambda v: v[:2])
