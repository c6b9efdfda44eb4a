"""Sparse QPs: the dense engine's answers, statuses and derivatives, on the caller's patterns and without its memory."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.maros_meszaros import PROBLEMS, solve
from difflayers import QPLayer, Status
from difflayers.convex import SparseMatrix, solve_qp
from difflayers.convex.sparse_matrix import sparse_matrix
from difflayers.errors import DiffLayersError, InfeasibleError, NotConvergedError, ShapeError, SingularError
from tests.convex.dense_families import FEASIBLE, INFEASIBLE, UNBOUNDED, feasible, infeasible, unbounded
from tests.convex.test_qp import random_qp, worst_kkt

FLOAT = {"dtype": torch.float64}
NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")

# What torch says once a process about its own sparse tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


def sparsely(problem, layouts="rcd"):
    """The problem with P, G and A in the layouts r (CSR), c (COO), k (CSC) or d (dense)."""
    convert = {"r": torch.Tensor.to_sparse_csr, "c": torch.Tensor.to_sparse, "k": torch.Tensor.to_sparse_csc, "d": torch.Tensor.clone}
    chosen = dict(zip("PGA", layouts, strict=True))
    return {name: convert[chosen[name]](value) if name in chosen and value is not None else value for name, value in problem.items()}


def leaves_of(problem):
    return {name: value.detach().clone().requires_grad_() for name, value in problem.items() if value is not None}


def thinned(seed, **options):
    """A random problem whose matrices have zeros."""
    problem = random_qp(seed, **options)
    keep = torch.rand(problem["P"].shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    P = torch.where(keep & keep.mT, problem["P"], 0)
    P = P + torch.diag(P.abs().sum(-1))
    G = torch.where(torch.rand(problem["G"].shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.6, problem["G"], 0)
    inside = torch.linalg.lstsq(problem["A"], problem["b"]).solution
    box = {"lb": inside - 0.5, "ub": inside + 0.8} if "lb" in problem else {}
    return problem | {"P": P, "G": G, "h": G @ inside + 0.3} | box


def element(problem, i):
    parts = [None if part is None else part[i if part.shape[0] > 1 else 0] for part in problem]
    return dict(zip(NAMES, parts, strict=True))


def loss(found):
    parts = [part for part in found[:4] if part is not None]
    return sum(((k + 1.0) * torch.arange(1, part.shape[-1] + 1) * part).sum() + part.pow(2).sum() for k, part in enumerate(parts))


@pytest.mark.parametrize("layouts", ["rrr", "ccc", "kcr", "rdd", "drd", "ddc"])
@pytest.mark.parametrize("boxed", [False, True])
def test_values_and_gradients_are_those_of_the_dense_engine(layouts, boxed):
    for seed in range(3):
        problem = thinned(seed, n=9, m=7, p=2, boxed=boxed)
        dense, sparse = leaves_of(problem), leaves_of(sparsely(problem, layouts))
        expected, found = solve_qp(**dense), solve_qp(**sparse)
        assert int(found.status) == Status.SOLVED
        assert worst_kkt(problem, found) <= 1e-9
        for new, old in zip(found[:4], expected[:4], strict=True):
            if old is not None:
                torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        exact = torch.autograd.grad(loss(expected), list(dense.values()))
        slopes = torch.autograd.grad(loss(found), list(sparse.values()))
        for (name, leaf), slope, old in zip(sparse.items(), slopes, exact, strict=True):
            assert slope.layout == leaf.layout, name
            stored = torch.ones_like(old) if leaf.layout == torch.strided else (problem[name] != 0)
            torch.testing.assert_close(slope.to_dense(), old * stored, rtol=1e-7, atol=1e-8)


def test_sizes_up_to_two_hundred():
    for seed, (n, m, p) in enumerate([(40, 60, 10), (120, 80, 20), (200, 200, 50)]):
        problem = thinned(seed, n=n, m=m, p=p, boxed=seed == 1)
        expected, found = solve_qp(**problem), solve_qp(**sparsely(problem, "rcr"))
        for new, old in zip(found[:4], expected[:4], strict=True):
            if old is not None:
                torch.testing.assert_close(new, old, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", FEASIBLE)
def test_every_feasible_family_is_solved(kind):
    problem = feasible(kind, 12 if kind != "assignment" else 4, batch=3)
    for i in range(3):
        one = element(problem, i)
        found = solve_qp(**sparsely(one, "rcr"), on_failure="nan")
        assert int(found.status) == Status.SOLVED
        assert max(float(part) for part in (found.primal_residual, found.dual_residual)) <= 1e-7
        expected = solve_qp(**one)
        torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", INFEASIBLE)
def test_every_infeasible_family_is_proved_infeasible(kind, linear):
    problem = infeasible(kind, 10, batch=4, linear=linear)
    for i in range(4):
        found = solve_qp(**sparsely(element(problem, i), "ccc"), on_failure="nan")
        assert int(found.status) == Status.PRIMAL_INFEASIBLE


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_every_unbounded_family_is_proved_unbounded(kind):
    problem = unbounded(kind, 10, batch=4)
    for i in range(4):
        found = solve_qp(**sparsely(element(problem, i), "ccc"), on_failure="nan")
        assert int(found.status) == Status.DUAL_INFEASIBLE


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), m=st.integers(0, 12), boxed=st.booleans(), rank=st.none() | st.integers(0, 3))
def test_no_feasible_bounded_problem_is_refused(seed, n, m, boxed, rank):
    problem = random_qp(seed, (), n, m, 1, boxed=boxed or rank is not None, rank=rank)
    assert worst_kkt(problem, solve_qp(**sparsely(problem, "rcc"))) <= 1e-8


def test_an_entry_without_its_mirror_image_has_the_gradient_of_the_symmetric_part():
    values = torch.tensor([2.0, 3.0, 0.8], **FLOAT, requires_grad=True)
    P = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1], [0, 1, 0]]), values, (2, 2))
    q = torch.tensor([1.0, -2.0], **FLOAT)
    (gradient,) = torch.autograd.grad(solve_qp(P, q).x.pow(2).sum(), values)
    a, b, c = (value.detach().clone().requires_grad_() for value in values)
    x = -torch.linalg.inv(torch.stack([torch.stack([a, c / 2]), torch.stack([c / 2, b])])) @ q
    torch.testing.assert_close(gradient, torch.stack(torch.autograd.grad(x.pow(2).sum(), (a, b, c))))


def test_uncoalesced_entries_are_added_up():
    indices = torch.tensor([[0, 1, 0], [0, 1, 0]])
    P = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 3.0], **FLOAT), (2, 2)).requires_grad_()
    x = solve_qp(P, torch.ones(2, **FLOAT)).x
    torch.testing.assert_close(x, torch.tensor([-0.25, -0.5], **FLOAT))
    (gradient,) = torch.autograd.grad(x.sum(), P)
    torch.testing.assert_close(gradient.to_dense().diagonal(), torch.tensor([1 / 16, 1 / 4], **FLOAT))


@pytest.mark.parametrize("layouts", ["rrr", "ccc", "kkk"])
def test_double_backward_of_sparse_leaves(layouts):
    problem = thinned(3, n=5, m=4, p=1, boxed=True)

    def penalty(problem, stored):
        leaves = leaves_of(problem)
        slopes = torch.autograd.grad(loss(solve_qp(**leaves)), list(leaves.values()), create_graph=True)
        total = sum(
            ((slope.to_dense() if slope.layout != torch.strided else slope) * stored[name]).pow(2).sum()
            for name, slope in zip(leaves, slopes, strict=True)
        )
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    stored = {name: (value != 0) if name in "PGA" else torch.ones_like(value) for name, value in problem.items()}
    expected, found = penalty(problem, stored), penalty(sparsely(problem, layouts), stored)
    for name, slope in found.items():
        torch.testing.assert_close(slope.to_dense(), expected[name] * stored[name], rtol=1e-6, atol=1e-7)


def test_second_derivatives_that_torch_would_drop_are_refused():
    indices, values = torch.arange(3).expand(2, 3), torch.tensor([1.0, 2.0, 4.0], **FLOAT, requires_grad=True)
    q = torch.ones(3, **FLOAT)

    def by_tensor(values):
        return solve_qp(torch.sparse_coo_tensor(indices, values, (3, 3)), q).x.sum()

    def by_entries(values):
        return solve_qp(SparseMatrix(indices, values, (3, 3)), q).x.sum()

    torch.testing.assert_close(torch.func.grad(by_tensor)(values), 1 / values.detach() ** 2)
    with pytest.raises(DiffLayersError, match="SparseMatrix"):
        torch.autograd.grad(by_tensor(values), values, create_graph=True)
    with pytest.raises(DiffLayersError, match="SparseMatrix"):
        torch.func.grad(lambda v: torch.func.grad(by_tensor)(v).sum())(values.detach())
    torch.testing.assert_close(torch.func.hessian(by_entries)(values.detach()), torch.diag(-2 / values.detach() ** 3))


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_transforms_around_sparse_tensors_that_they_do_not_map(layout):
    problem = thinned(5, n=5, m=4, p=1)
    convert = {torch.sparse_csr: "rrr", torch.sparse_coo: "ccc"}[layout]
    sparse = sparsely(problem, convert)
    qs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), **FLOAT)

    def cube(q, problem):
        return solve_qp(**(problem | {"q": q})).x.pow(3).sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.grad(f))):
        expected = torch.stack([transform(lambda q: cube(q, problem))(q) for q in qs])
        found = torch.func.vmap(transform(lambda q: cube(q, sparse)))(qs)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_batches_share_the_matrices_and_their_gradient_is_the_sum():
    problem = thinned(6, n=6, m=5, p=1, boxed=True)
    draw = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), **FLOAT)
    sparse, dense = leaves_of(sparsely(problem, "rcc") | {"q": draw}), leaves_of(problem | {"q": draw})
    found, expected = solve_qp(**sparse), solve_qp(**dense)
    assert found.x.shape == (2, 3, 6)
    assert found.status.shape == (2, 3)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
    found.x.pow(3).sum().backward()
    expected.x.pow(3).sum().backward()
    for name in sparse:
        stored = problem[name] != 0 if name in "PGA" else 1.0
        torch.testing.assert_close(sparse[name].grad.to_dense(), dense[name].grad * stored, rtol=1e-7, atol=1e-8)


def test_batched_csr_of_one_pattern():
    problems = [thinned(7, n=4, m=3, p=1), thinned(7, n=4, m=3, p=1) | {"q": torch.ones(4, **FLOAT)}]
    problems[1]["P"] = 2 * problems[1]["P"]
    batched = {name: torch.stack([problem[name] for problem in problems]) for name in problems[0]}
    csr = [problem["P"].to_sparse_csr() for problem in problems]
    P = torch.sparse_csr_tensor(
        torch.stack([each.crow_indices() for each in csr]),
        torch.stack([each.col_indices() for each in csr]),
        torch.stack([each.values() for each in csr]),
        (2, 4, 4),
    ).requires_grad_()
    dense = batched["P"].clone().requires_grad_()
    found, expected = solve_qp(**(batched | {"P": P})).x, solve_qp(**(batched | {"P": dense})).x
    torch.testing.assert_close(found, expected)
    found.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert P.grad.layout == torch.sparse_csr
    torch.testing.assert_close(P.grad.to_dense(), dense.grad * (dense != 0), rtol=1e-7, atol=1e-9)


def test_threads_change_nothing():
    problem = sparsely(thinned(8, n=6, m=5, p=1), "rrr") | {"q": torch.randn(5, 6, generator=torch.Generator().manual_seed(1), **FLOAT)}
    alone = solve_qp(**problem)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(solve_qp(**problem).x, alone.x)
    finally:
        torch.set_num_threads(before)


def test_warm_start_of_an_unchanged_active_set_needs_no_iterations():
    problem = sparsely(thinned(9, n=30, m=20, p=4, boxed=True), "rrr")
    cold = solve_qp(**problem)
    near = problem | {"q": problem["q"] + 1e-7}
    warm = solve_qp(**near, warm_start=cold)
    assert int(cold.iterations) > 0
    assert int(warm.iterations) == 0
    torch.testing.assert_close(warm.x, solve_qp(**near).x, rtol=1e-9, atol=1e-9)


def test_dependent_active_rows_leave_the_derivative_of_x_right():
    """The same row twice, and an equality twice: x moves as if each were there once."""
    problem = thinned(10, n=6, m=5, p=2)
    double = problem | {
        "G": torch.cat([problem["G"], 2 * problem["G"]]),
        "h": torch.cat([problem["h"], 2 * problem["h"]]),
        "A": torch.cat([problem["A"], problem["A"]]),
        "b": torch.cat([problem["b"], problem["b"]]),
    }
    leaf, twin = (part["q"].clone().requires_grad_() for part in (problem, double))
    found = solve_qp(**(sparsely(double, "rrr") | {"q": twin}))
    expected = solve_qp(**(problem | {"q": leaf}))
    assert bool((expected.z > 0).any())
    torch.testing.assert_close(found.x, expected.x)
    torch.testing.assert_close(*(torch.autograd.grad(part.x.pow(3).sum(), q)[0] for part, q in ((found, twin), (expected, leaf))))
    torch.testing.assert_close(found.z[:5] + 2 * found.z[5:], expected.z)
    # Rows that contradict each other after the move have no derivative.
    h, sparse = double["h"].clone().requires_grad_(), sparsely(double, "rrr")
    moved = solve_qp(**(sparse | {"h": h}))
    with pytest.raises(SingularError):
        torch.func.jvp(lambda h: solve_qp(**(sparse | {"h": h})).x, (double["h"],), (torch.arange(10.0, **FLOAT),))
    assert torch.isfinite(torch.autograd.grad(moved.x.sum(), h)[0]).all()


def test_failures_of_a_batch_leave_the_neighbours_alone():
    eye = torch.eye(2, **FLOAT).to_sparse_csr()
    q = torch.tensor([[1.0, 0.0], [1.0, torch.nan], [0.0, 1.0]], **FLOAT)
    lb = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]], **FLOAT)
    found = solve_qp(eye, q, lb=lb, ub=torch.ones(2, **FLOAT), on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.PRIMAL_INFEASIBLE]
    assert found.x.isnan().any(-1).tolist() == [False, True, True]
    with pytest.raises(InfeasibleError):
        solve_qp(eye, q[[0, 2]], lb=lb[[0, 2]], ub=torch.ones(2, **FLOAT))


@pytest.mark.parametrize("P", [[[1.0, 0.0], [0.0, -1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
def test_an_indefinite_P_is_refused(P):
    with pytest.raises(NotConvergedError, match="not convex"):
        solve_qp(torch.tensor(P, **FLOAT).to_sparse_csr(), torch.zeros(2, **FLOAT), lb=-torch.ones(2, **FLOAT), ub=torch.ones(2, **FLOAT))


def test_float32_and_the_module():
    problem = thinned(11, n=6, m=5, p=2, boxed=True)
    single = leaves_of(sparsely({name: value.float() for name, value in problem.items()}, "rcr"))
    layer = QPLayer()
    x = layer(*(single[name] for name in NAMES))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), solve_qp(**problem).x, rtol=1e-4, atol=1e-5)
    x.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in single.values())


def test_sizes_of_zero():
    q = torch.ones(3, **FLOAT)
    empty = torch.zeros(0, 3, **FLOAT)
    for convert in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr):
        found = solve_qp(convert(torch.eye(3, **FLOAT)), q, convert(empty), empty[:, 0], convert(empty), empty[:, 0])
        torch.testing.assert_close(found.x, -q)
    none = solve_qp(torch.eye(3, **FLOAT).to_sparse(), q.expand(0, 3))
    assert none.x.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": torch.eye(4, **FLOAT).to_sparse()}, r"P must have the shape \(\*batch, 5, 5\)"),
        ({"P": torch.eye(5).to_sparse()}, "convert one of them"),
        ({"h": None}, "G and h come together"),
        ({"G": torch.ones(2, 4, 5, **FLOAT).to_sparse()}, "G is a 3-dimensional tensor with the layout torch.sparse_coo"),
        ({"P": SparseMatrix(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, **FLOAT), (5, 5))}, r"int64 of shape \(2, 2\)"),
        ({"P": SparseMatrix(torch.full((2, 1), 5), torch.zeros(1, **FLOAT), (5, 5))}, "outside of the shape"),
        ({"P": SparseMatrix(None, None, (5, 5))}, "a SparseMatrix has tensors"),
    ],
)
def test_bad_matrices_are_explained(change, message):
    with pytest.raises(ShapeError, match=message):
        solve_qp(**(sparsely(random_qp(0), "rrr") | change))


def test_a_batched_csr_of_different_patterns_is_refused():
    pointers, columns = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[0, 1], [1, 0]])
    matrix = torch.sparse_csr_tensor(pointers, columns, torch.ones(2, 2), (2, 2, 2))
    with pytest.raises(ShapeError, match="one sparsity pattern"):
        sparse_matrix(matrix, "G")


def difficult(kind, seed, n=40):
    """A thin problem with one of the difficulties of the Maros–Mészáros set."""
    draw = torch.Generator().manual_seed(seed)

    def thin(rows):
        body = torch.randn(rows, n, generator=draw, **FLOAT) * (torch.rand(rows, n, generator=draw) < 3 / n)
        body[torch.arange(rows), torch.randint(0, n, (rows,), generator=draw)] += 1
        return body

    def uniform(size):
        return torch.rand(size, generator=draw, **FLOAT)

    root, G, A, x, q = thin(n), thin(n), thin(n // 4), torch.randn(n, generator=draw, **FLOAT), torch.randn(n, generator=draw, **FLOAT)
    P, h, lb, ub = root @ root.T, G @ x + uniform(n), x - uniform(n), x + uniform(n)
    if kind == "scaled":
        columns, rows = 10 ** (4 * uniform(n) - 2), 10 ** (6 * uniform(n) - 3)
        P, q, G, h, A = P * columns.outer(columns), q * columns, G * rows.outer(columns), h * rows, A * columns
        lb, ub = lb / columns, ub / columns
        x = x / columns
    if kind == "degenerate":
        tight = uniform(n) < 0.7
        h, lb = torch.where(tight, G @ x, h), torch.where(uniform(n) < 0.3, x, lb)
        q = -(P @ x) - G.T @ (uniform(n) * tight)
    if kind == "nearly dependent":
        G = torch.cat([G, G + 1e-7 * thin(n)])
        h = torch.cat([h, G[n:] @ x + uniform(n)])
    if kind == "redundant":
        A, G, h = torch.cat([A, A, 2 * A[:3]]), torch.cat([G, 3 * G]), torch.cat([h, 3 * h])
    if kind == "flat":
        P = root[:, : n // 5] @ root[:, : n // 5].T
    if kind == "large costs":
        P, q = 1e6 * P, 1e6 * q
    return {"P": P, "q": q, "G": G, "h": h, "A": A, "b": A @ x, "lb": lb, "ub": ub}


@pytest.mark.parametrize("kind", ["scaled", "degenerate", "nearly dependent", "redundant", "flat", "large costs"])
def test_difficult_problems_reach_the_dense_engines_optimum(kind):
    for seed in range(4):
        problem = difficult(kind, seed)
        q = problem["q"].clone().requires_grad_()
        found, expected = solve_qp(**(sparsely(problem, "rrr") | {"q": q})), solve_qp(**problem)

        def objective(x, problem=problem):
            return x @ problem["P"] @ x / 2 + problem["q"] @ x

        torch.testing.assert_close(objective(found.x.detach()), objective(expected.x), rtol=1e-9, atol=1e-9)
        assert torch.isfinite(torch.autograd.grad(found.x.sum(), q)[0]).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if not name.endswith(("_M", "20"))])
def test_maros_meszaros_problems_reach_their_published_values(name, sparse):
    make, optimum = PROBLEMS[name]
    value, found = solve(make(), sparse)
    assert int(found.status) == Status.SOLVED
    assert abs(value - optimum) <= 1e-7 * (1 + abs(optimum))


def banded(n):
    """A strictly convex problem with bandwidth 3, all kinds of constraints, and a solution of O(1)."""
    draw = torch.Generator().manual_seed(n)
    P = torch.sparse.spdiags(
        torch.stack([torch.full((n,), -1.0), torch.full((n,), 2.5), torch.full((n,), -1.0)]).double(), torch.tensor([-1, 0, 1]), (n, n)
    )
    G = torch.sparse.spdiags(torch.randn(2, n, generator=draw, **FLOAT), torch.tensor([0, 1]), (n, n))
    A = torch.sparse_coo_tensor(torch.stack([torch.arange(n // 4), 4 * torch.arange(n // 4)]), torch.ones(n // 4, **FLOAT), (n // 4, n))
    inside = torch.randn(n, generator=draw, **FLOAT)
    h = G @ inside + torch.rand(n, generator=draw, **FLOAT)
    return {
        "P": P,
        "q": torch.randn(n, generator=draw, **FLOAT),
        "G": G,
        "h": h,
        "A": A,
        "b": A @ inside,
        "lb": inside - 1,
        "ub": inside + 1,
    }


@pytest.mark.parametrize("n", [2000, pytest.param(20000, marks=pytest.mark.slow)])
def test_nothing_dense_is_made(n):
    leaves = leaves_of({name: part.coalesce() if part.layout == torch.sparse_coo else part for name, part in banded(n).items()})
    solve_qp(**leaves_of(banded(8)))  # imports are not counted
    tracemalloc.start()
    try:
        found = solve_qp(**leaves)
        torch.autograd.grad(found.x.pow(2).sum(), list(leaves.values()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert int(found.status) == Status.SOLVED
    assert float(found.dual_residual) <= 1e-9
    assert peak < 4000 * n  # bytes: a dense matrix takes 8 n²


def test_gradient_against_finite_differences():
    problem = banded(400)
    weight = torch.randn(400, generator=torch.Generator().manual_seed(0), **FLOAT)

    def value(problem):
        return float(solve_qp(**problem).x @ weight)

    leaves = leaves_of({name: part.coalesce() if part.layout == torch.sparse_coo else part for name, part in problem.items()})
    slopes = torch.autograd.grad(solve_qp(**leaves).x @ weight, list(leaves.values()))
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        values = leaf.detach() if leaf.layout == torch.strided else leaf.detach().values()
        direction = torch.from_numpy(np.random.default_rng(0).standard_normal(values.shape))

        def moved(step, name=name, leaf=leaf, values=values, direction=direction):
            new = values + step * direction
            return problem | {
                name: new if leaf.layout == torch.strided else torch.sparse_coo_tensor(leaf.detach().indices(), new, leaf.shape)
            }

        expected = (value(moved(1e-7)) - value(moved(-1e-7))) / 2e-7
        found = float((slope if slope.layout == torch.strided else slope.coalesce().values()) @ direction)
        assert abs(found - expected) <= 1e-4 * (1 + abs(expected)), name
