"""solve_qp and QPLayer: values, multipliers and statuses, derivatives against an exact active-set reference, bad input."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import QPLayer, Status
from difflayers.convex import solve_qp
from difflayers.errors import ConvergenceWarning, InfeasibleError, NotConvergedError, ShapeError, UnboundedError

NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")
FLOAT = {"dtype": torch.float64}


def random_qp(seed, batch=(), n=5, m=4, p=2, boxed=False, rank=None):
    """A feasible bounded problem with strictly complementary solution almost surely."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*batch, *size, generator=generator, **FLOAT)

    root = normal(n, n if rank is None else rank)
    P = root @ root.mT / n + (0.1 * torch.eye(n, **FLOAT) if rank is None else 0)
    inside = normal(n)
    G, A = normal(m, n), normal(p, n)
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + torch.rand(*batch, m, generator=generator, **FLOAT)
    b = (A @ inside.unsqueeze(-1)).squeeze(-1)
    problem = {"P": P, "q": normal(n), "G": G, "h": h, "A": A, "b": b}
    if boxed:
        problem |= {"lb": inside - 0.5, "ub": inside + torch.rand(*batch, n, generator=generator, **FLOAT)}
    return problem


def worst_kkt(problem, found):
    """The largest violation of the optimality conditions, in absolute terms."""

    def times(matrix, vector):
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    x = found.x
    gradient = problem["q"] + (times(problem["P"], x) if problem.get("P") is not None else 0)
    worst = []
    if "G" in problem:
        slack = problem["h"] - times(problem["G"], x)
        gradient = gradient + times(problem["G"].mT, found.z)
        worst += [-slack, -found.z, (slack * found.z).abs()]
    if "A" in problem:
        gradient = gradient + times(problem["A"].mT, found.y)
        worst.append((times(problem["A"], x) - problem["b"]).abs())
    if found.z_box is not None:
        gradient = gradient + found.z_box
        if "lb" in problem:
            worst += [problem["lb"] - x, (found.z_box.clamp(max=0) * (x - problem["lb"])).abs()]
        if "ub" in problem:
            worst += [x - problem["ub"], (found.z_box.clamp(min=0) * (problem["ub"] - x)).abs()]
    worst.append(gradient.abs())
    return max(float(part.detach().max()) for part in worst if part.numel())


def exact_gradients(problem, found, weight):
    """d(weight · x) by autograd through the dense KKT system of the active set, one problem without a batch."""
    leaves = {name: value.clone().requires_grad_() for name, value in problem.items()}
    n = leaves["q"].shape[-1]
    eye = torch.eye(n, **FLOAT)
    rows, sides = [leaves["A"]], [leaves["b"]]
    active = found.z > 1e-7
    rows.append(leaves["G"][active])
    sides.append(leaves["h"][active])
    if found.z_box is not None:
        lower, upper = found.z_box < -1e-7, found.z_box > 1e-7
        rows += [eye[lower], eye[upper]]
        sides += [leaves["lb"][lower], leaves["ub"][upper]]
    E, target = torch.cat(rows), torch.cat(sides)
    P = (leaves["P"] + leaves["P"].mT) / 2
    matrix = torch.cat([torch.cat([P, E.mT], 1), torch.cat([E, torch.zeros(len(E), len(E), **FLOAT)], 1)])
    x = torch.linalg.solve(matrix, torch.cat([-leaves["q"], target]))[:n]
    (x * weight).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("size", [(3, 2, 1), (12, 10, 3), (30, 60, 5)])
def test_solution_and_gradient_are_exact(size, boxed):
    n, m, p = size
    for seed in range(8):
        problem = random_qp(seed, (), n, m, p, boxed)
        leaves = {name: value.clone().requires_grad_() for name, value in problem.items()}
        found = solve_qp(**leaves)
        assert int(found.status) == Status.SOLVED
        assert worst_kkt(problem, found) <= 1e-8
        weight = torch.randn(n, generator=torch.Generator().manual_seed(seed), **FLOAT)
        (found.x * weight).sum().backward()
        reference = exact_gradients(problem, found, weight)
        scale = max(float(value.abs().max()) for value in reference.values())
        for name in leaves:
            assert (leaves[name].grad - reference[name]).abs().max() <= 1e-8 * scale, name


def simplex(n=6, batch=7):
    q = torch.randn(batch, n, generator=torch.Generator().manual_seed(1), **FLOAT)
    return {"P": torch.eye(n, **FLOAT), "q": q, "A": torch.ones(1, n, **FLOAT), "b": torch.ones(1, **FLOAT), "lb": torch.zeros(n, **FLOAT)}


def test_projection_on_the_simplex_has_the_known_solution_and_jacobian():
    problem = simplex()
    found = solve_qp(**problem)
    support = found.x > 1e-9
    threshold = ((-problem["q"] * support).sum(-1) - 1) / support.sum(-1)
    torch.testing.assert_close(found.x, (-problem["q"] - threshold[:, None]).clamp(min=0))
    row = {name: value[0] if name == "q" else value for name, value in problem.items()}
    jacobian = torch.func.jacrev(lambda q: solve_qp(**(row | {"q": q})).x)(row["q"])
    mask = support[0].double()
    torch.testing.assert_close(jacobian, -(torch.diag(mask) - torch.outer(mask, mask) / mask.sum()))


HARD = {
    "ill_conditioned": lambda: random_qp(3, (), 20, 15, 4) | {"P": _with_condition(20, 1e6)},
    "singular_P": lambda: random_qp(4, (), 12, 30, 2, boxed=True, rank=3),
    "linear_program": lambda: random_qp(5, (), 8, 20, 2, boxed=True) | {"P": torch.zeros(8, 8, **FLOAT)},
    "redundant_equalities": lambda: _doubled(random_qp(6, (), 10, 8, 3), "A", "b"),
    "duplicate_rows": lambda: _doubled(random_qp(7, (), 10, 12, 2), "G", "h"),
    "many_rows": lambda: random_qp(8, (), 12, 60, 2),
    "fixed_variables": lambda: _fixed(random_qp(9, (), 8, 6, 1, boxed=True)),
}


def _with_condition(n, condition):
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(2), **FLOAT))
    return basis @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, **FLOAT)) @ basis.mT


def _doubled(problem, matrix, vector):
    return problem | {matrix: torch.cat([problem[matrix]] * 2), vector: torch.cat([problem[vector]] * 2)}


def _fixed(problem):
    inside = (problem["lb"] + problem["ub"]) / 2
    lb, ub = problem["lb"].clone(), problem["ub"].clone()
    lb[:3] = ub[:3] = inside[:3]
    h = torch.maximum(problem["h"], problem["G"] @ inside + 0.1)
    return problem | {"lb": lb, "ub": ub, "h": h, "A": problem["A"], "b": problem["A"] @ inside}


@pytest.mark.parametrize("name", sorted(HARD))
def test_hard_families_are_solved_and_their_gradients_finite(name):
    problem = HARD[name]()
    leaves = {key: value.clone().requires_grad_() for key, value in problem.items()}
    found = solve_qp(**leaves)
    assert int(found.status) == Status.SOLVED
    assert worst_kkt(problem, found) <= 1e-8
    found.x.square().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


def test_gradient_of_a_vertex_follows_its_constraints():
    h = torch.tensor([2.0, 1.0], requires_grad=True, **FLOAT)
    q = torch.tensor([-1.0, -1.0], requires_grad=True, **FLOAT)
    x = solve_qp(None, q, torch.eye(2, **FLOAT), h).x
    torch.testing.assert_close(x, h)
    torch.testing.assert_close(torch.autograd.grad(x[0], (h, q)), (torch.tensor([1.0, 0.0], **FLOAT), torch.zeros(2, **FLOAT)))


def test_shared_arguments_receive_the_sum():
    batched = random_qp(11, (4,))
    shared = {name: value[0] for name, value in random_qp(11, (4,)).items()} | {"q": batched["q"]}
    leaves = {name: value.clone().requires_grad_() for name, value in shared.items()}
    solve_qp(**leaves).x.pow(3).sum().backward()
    expected = {name: torch.zeros_like(value) for name, value in shared.items()}
    for i in range(4):
        one = {name: (value[i] if name == "q" else value).clone().requires_grad_() for name, value in shared.items()}
        solve_qp(**one).x.pow(3).sum().backward()
        for name in expected:
            if name == "q":
                expected[name][i] = one[name].grad
            else:
                expected[name] += one[name].grad
    for name in expected:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-7, atol=1e-9)


def test_several_batch_dimensions_broadcast():
    problem = random_qp(12, (3, 1)) | {"q": random_qp(13, (2,))["q"]}
    found = solve_qp(**problem)
    assert found.x.shape == (3, 2, 5)
    assert found.z.shape == (3, 2, 4)
    assert found.status.shape == (3, 2)
    one = {name: value[2, 0] for name, value in problem.items() if name != "q"} | {"q": problem["q"][1]}
    torch.testing.assert_close(found.x[2, 1], solve_qp(**one).x)


def test_gradient_of_P_is_symmetric_and_P_is_read_as_its_symmetric_part():
    problem = random_qp(14)
    skew = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), **FLOAT)
    tilted = (problem["P"] + skew - skew.mT).requires_grad_()
    found = solve_qp(**(problem | {"P": tilted}))
    torch.testing.assert_close(found.x, solve_qp(**problem).x)
    (gradient,) = torch.autograd.grad(found.x.sum(), tilted)
    torch.testing.assert_close(gradient, gradient.mT)


def test_multipliers_are_differentiable_in_all_directions():
    problem = random_qp(15, boxed=True)
    leaves = tuple(problem[name].clone().requires_grad_() for name in NAMES)

    def multipliers(*arguments):
        found = solve_qp(*arguments)
        return found.y, found.z, found.z_box

    assert torch.autograd.gradcheck(multipliers, leaves, check_forward_ad=True)


def test_nests_of_transforms_agree_with_a_loop():
    problem = random_qp(16, (3,))
    arguments = tuple(problem[name] for name in NAMES[:6])

    def loss(*arguments):
        return solve_qp(*arguments).x.pow(3).sum()

    for which in range(6):
        nested = torch.func.vmap(torch.func.hessian(loss, argnums=which))(*arguments)
        looped = torch.stack(
            [torch.func.jacrev(torch.func.jacrev(loss, argnums=which), argnums=which)(*one) for one in zip(*arguments, strict=True)]
        )
        torch.testing.assert_close(nested, looped, rtol=1e-7, atol=1e-8)


def test_failures_are_told_apart_element_by_element():
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], **FLOAT)
    h = torch.tensor([[1.0, 1.0], [-2.0, 1.0], [1.0, 1.0], [1.0, 1.0]], **FLOAT, requires_grad=True)
    q = torch.tensor([[0.3, 0.1], [0.3, 0.1], [0.0, -1.0], [torch.nan, 0.0]], **FLOAT, requires_grad=True)
    P = torch.diag(torch.tensor([1.0, 0.0], **FLOAT)).expand(4, 2, 2).clone()
    P[0, 1, 1] = P[1, 1, 1] = P[3, 1, 1] = 1.0
    found = solve_qp(P, q, G, h, on_failure="nan")
    expected = [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE, Status.NUMERICAL_ERROR]
    assert found.status.tolist() == [int(status) for status in expected]
    assert found.x.isnan().all(-1).tolist() == [False, True, True, True]
    gradients = torch.autograd.grad(found.x[0].sum() + 0 * found.x[1:].nan_to_num().sum(), (q, h))
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert (gradient[1:] == 0).all()
    for rows, error in (([0, 1], InfeasibleError), ([0, 2], UnboundedError), ([0, 3], NotConvergedError)):
        with pytest.raises(error) as caught:
            solve_qp(P[rows], q[rows], G, h[rows])
        assert caught.value.indices == [(1,)]
        torch.testing.assert_close(caught.value.solution.x[0], found.x[0].detach())
    with pytest.warns(ConvergenceWarning, match="PRIMAL_INFEASIBLE"):
        solve_qp(P[:2], q[:2], G, h[:2], on_failure="warn")


def test_an_indefinite_P_is_refused():
    with pytest.raises(NotConvergedError, match="not convex"):
        solve_qp(torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2), lb=-torch.ones(2), ub=torch.ones(2))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), m=st.integers(0, 6))
def test_every_contradiction_is_found(seed, n, m):
    problem = random_qp(seed, (), n, m + 1, 0)
    row, side = problem["G"][-1], problem["h"][-1]
    G, h = torch.cat([problem["G"], -row[None]]), torch.cat([problem["h"], (-side - 0.5 * row.norm()).reshape(1)])
    found = solve_qp(problem["P"], problem["q"], G, h, on_failure="nan")
    assert int(found.status) == Status.PRIMAL_INFEASIBLE


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 8), m=st.integers(0, 6))
def test_every_descent_direction_is_found(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    ray = torch.nn.functional.normalize(torch.randn(n, generator=generator, **FLOAT), dim=0)
    problem = random_qp(seed, (), n, m, 0)
    off_ray = torch.eye(n, **FLOAT) - torch.outer(ray, ray)
    P = off_ray @ problem["P"] @ off_ray
    G = problem["G"] - (problem["G"] @ ray).clamp(min=0)[:, None] * ray  # no row stops the ray
    q = off_ray @ problem["q"] - ray
    found = solve_qp((P + P.mT) / 2, q, G, torch.rand(m, generator=generator, **FLOAT), on_failure="nan")
    assert int(found.status) == Status.DUAL_INFEASIBLE


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(0, 12), boxed=st.booleans(), rank=st.none() | st.integers(0, 3))
def test_no_feasible_bounded_problem_is_refused(seed, n, m, boxed, rank):
    problem = random_qp(seed, (), n, m, min(1, n - 1), boxed=boxed or rank is not None, rank=rank)
    found = solve_qp(**problem)
    assert worst_kkt(problem, found) <= 1e-8


def test_float32_comes_back_with_the_accuracy_of_float32():
    problem = random_qp(17, (4,))
    single = {name: value.float().requires_grad_() for name, value in problem.items()}
    found = solve_qp(**single)
    assert found.x.dtype == found.z.dtype == found.primal_residual.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), solve_qp(**problem).x, rtol=1e-4, atol=1e-5)
    found.x.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in single.values())


@pytest.mark.parametrize("solver", ["auto", "interior_point"])
def test_warm_start_gives_the_same_answer_in_fewer_iterations(solver):
    problem = random_qp(18, (24,), 50, 50, 4, boxed=True)
    cold = solve_qp(**problem, solver=solver)
    near = problem | {"q": problem["q"] + 1e-7}
    warm = solve_qp(**near, warm_start=cold, solver=solver)
    torch.testing.assert_close(warm.x, solve_qp(**near).x, rtol=1e-8, atol=1e-9)
    assert int(warm.iterations.sum()) < int(cold.iterations.sum()) / 5
    with pytest.raises(ShapeError, match="warm_start belongs to a batch"):
        solve_qp(**random_qp(1, (6,), 50, 50, 4, boxed=True), warm_start=cold)
    with pytest.raises(ShapeError, match="warm_start"):
        solve_qp(**random_qp(1, (24,), 4, 3, 1), warm_start=cold)


def test_rows_and_bounds_at_infinity_are_absent():
    problem = random_qp(19, (), 5, 4, 1)
    inf = torch.full((5,), torch.inf, **FLOAT)
    wide = problem | {"h": problem["h"].clone(), "lb": -inf, "ub": inf}
    wide["h"][2] = torch.inf
    narrow = problem | {"G": problem["G"][[0, 1, 3]], "h": problem["h"][[0, 1, 3]]}
    torch.testing.assert_close(solve_qp(**wide).x, solve_qp(**narrow).x)


def test_sizes_of_zero():
    eye, q = torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(solve_qp(eye, q).x, -q)
    torch.testing.assert_close(solve_qp(eye, q, torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0)).x, -q)
    empty = torch.zeros(0, 3, requires_grad=True)
    found = solve_qp(eye, empty, lb=torch.zeros(3))
    assert found.x.shape == (0, 3)
    assert found.status.shape == (0,)
    assert torch.autograd.grad(found.x.sum(), empty)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": torch.eye(4)}, r"P must have the shape \(\*batch, 5, 5\)"),
        ({"q": torch.tensor(1.0)}, "q must be a tensor of shape"),
        ({"h": torch.zeros(3)}, r"G must have the shape \(\*batch, 3, 5\)"),
        ({"h": None}, "G and h come together; got only G"),
        ({"A": None}, "A and b come together; got only b"),
        ({"q": torch.zeros(5)}, "convert one of them"),
        ({"q": torch.zeros(5, dtype=torch.int64)}, "q must be a floating tensor"),
        ({"lb": torch.zeros(2, 5, **FLOAT), "ub": torch.ones(3, 5, **FLOAT)}, "do not broadcast"),
        ({"b": [1.0, 2.0]}, "b must be a floating tensor or None, got list"),
    ],
)
def test_bad_shapes_and_types_are_explained(change, message):
    with pytest.raises(ShapeError, match=message):
        solve_qp(**(random_qp(0) | change))


def test_unknown_options_are_explained():
    with pytest.raises(ValueError, match="choose 'auto', 'daqp' or 'interior_point'"):
        solve_qp(**random_qp(0), solver="simplex")
    with pytest.raises(ValueError, match="choose 'raise', 'nan' or 'warn'"):
        solve_qp(**random_qp(0), on_failure="ignore")


def test_module_is_the_function():
    problem = random_qp(20, (2,), boxed=True)
    layer = QPLayer(tol=1e-8, on_failure="nan")
    found = solve_qp(**problem, tol=1e-8)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(*problem.values()), found.x)
    torch.testing.assert_close(layer.solve(**problem).z_box, found.z_box)
    assert repr(layer) == "QPLayer(on_failure='nan', tol=1e-08)"


def test_nothing_is_kept_or_mutated():
    problem = random_qp(21, (3,), boxed=True)
    before = {name: value.clone() for name, value in problem.items()}
    leaves = {name: value.requires_grad_() for name, value in problem.items()}
    with torch.no_grad():
        assert not solve_qp(**leaves).x.requires_grad
    x = solve_qp(**leaves).x
    cotangent = torch.randn_like(x)
    kept = cotangent.clone()
    first = torch.autograd.grad(x, leaves["q"], cotangent, retain_graph=True)[0]
    second = torch.autograd.grad(x, leaves["q"], cotangent)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(cotangent, kept)
    assert all(torch.equal(leaves[name], before[name]) for name in before)


def test_a_layer_that_remembers_gives_the_same_answers():
    layer = QPLayer(warm_start=True)
    for seed in (1, 1, 2):
        problem = random_qp(seed, (24,), 40, 40, 4)
        x = layer(**problem)
        torch.testing.assert_close(x, solve_qp(**problem).x, rtol=1e-9, atol=1e-10)
    problem = random_qp(3, (2,), 5, 4, 1)
    torch.testing.assert_close(layer(**problem), solve_qp(**problem).x)  # other sizes: nothing to remember
    torch.func.vmap(lambda q: layer(**problem | {"q": q}))(problem["q"].expand(3, 2, 5))
    torch.testing.assert_close(copy.deepcopy(layer)(**problem), solve_qp(**problem).x)


@pytest.mark.parametrize("solver", ["daqp", "interior_point"])
def test_every_solver_has_the_same_derivatives(solver):
    problem = {name: part.clone().requires_grad_() for name, part in random_qp(4, (5,), 40, 30, 4, boxed=True).items()}
    weights = torch.linspace(-1, 1, 40, **FLOAT)
    slopes = []
    for which in (solver, "auto"):
        found = solve_qp(**problem, solver=which)
        loss = (found.x * weights).sum() + found.z.square().sum() + found.y.sum() + found.z_box.square().sum()
        first = torch.autograd.grad(loss, list(problem.values()), create_graph=True)
        second = torch.autograd.grad(first[1].square().sum() + first[3].sum(), list(problem.values()))
        slopes.append([*first, *second])
    for mine, other in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_daqp_refuses_another_device():
    with pytest.raises(ValueError, match="CPU"):
        solve_qp(torch.eye(2, device="meta"), torch.ones(2, device="meta"), solver="daqp")
