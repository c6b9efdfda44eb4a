r"""The hard constraint of ``difflayers.pde`` beside its alternatives: time, memory, and how wrong solution and gradient are.

``python -m benchmarks.hard_constraint``. Diffusion–sorption on meshes of times × points, with a smooth synthetic basis of sixteen
functions in place of a network's; float64, one thread. δ = 0.01 in the retardation factor: with 1e-6
its derivative has spikes of 1e6 wherever u changes sign, and no contestant converges.

* **Jacobians**: the forward pass with Jacobians from the features, with forward mode inside the same solver, and by a plain
  Levenberg–Marquardt loop over ``vmap(jacfwd(...))``, restated in torch from the method of the published JAX code. It is asked for the same
  solution, and stops by the same scaled gradient. "from tight" is the distance of u from a solution at 1e-12.
* **Memory**: what autograd saves for the backward pass and the most that is held at once, implicit and unrolled.
* **Tolerance**: error of the implicit gradient, relative to the largest entry, with Newton steps after the solver (the layer) and without.
* **Experts**: the mesh cut into domains, all points used; and two processes beside one, wall-clock with a core for each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.timing import Table, describe_machine, one_thread, peak_memory, race
from difflayers.implicit import implicit_root
from difflayers.pde import HardConstraint, MixtureOfConstraints
from difflayers.pde.problems import DiffusionSorption
from difflayers.solution import Solution
from difflayers.solvers import levenberg_marquardt

__all__ = ["Case", "main"]

_FUNCTIONS = 16


class Rows(NamedTuple):
    """The data of the rows: features ``(batch, P, N)`` by name; matrix ``(batch, m, N)`` and target ``(batch, m)`` of the linear ones."""

    features: dict[str, Tensor]
    matrix: Tensor
    target: Tensor


Jacobian = Callable[[Tensor, Rows], tuple[Tensor, Tensor]]


def main(*, short: bool = False) -> None:
    """Print all the tables."""
    one_thread()
    describe_machine([])
    meshes, batch, budget = ([(11, 24)], 2, 0.1) if short else ([(51, 128), (101, 128), (101, 256)], 4, 3.0)
    jacobians(meshes, batch, budget)
    memory(Case(*meshes[0], batch=batch), (5,) if short else (5, 17, 50))
    tolerance(Case(*meshes[0], batch=batch), (1e-2, 1e-8) if short else (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12))
    experts(Case(*meshes[-1], batch=batch), (1, 2) if short else (1, 4, 8, 16), budget)
    processes(meshes[-1], batch, 2 if short else 8, rounds=1 if short else 5)


class Case:
    """A batch of constraints: the problem, a basis and initial values."""

    def __init__(self, times: int, points: int, *, batch: int) -> None:
        self.problem = DiffusionSorption(times=times, points=points, regularization=1e-2)
        draw = torch.Generator().manual_seed(0)
        t, x = self.problem.t[:, None, None] / self.problem.duration, self.problem.x[:, None] / self.problem.length
        width, wave, phase, decay = torch.rand(4, batch, 1, 1, _FUNCTIONS, generator=draw, dtype=torch.float64)
        # Fronts that run in from the left, on waves that fade.
        fronts = torch.special.erfc(x / ((0.05 + 0.6 * width) * (t + 0.02).sqrt()))
        self.basis = fronts + 0.3 * torch.cos(3 * torch.pi * wave * x + 2 * torch.pi * phase) * torch.exp(-2 * decay * t)
        self.u0 = self.problem.initial(batch, generator=draw, dtype=torch.float64) + 0.02
        self.target = self.problem.solve(self.u0)
        self.grid = f"{times} × {points}"

    def layer(self, *, structured: bool = True, **options: Any) -> HardConstraint:
        """The constraint; its interior rows are scaled as if time ran from 0 to 10."""
        function, features = (self.residual, self.problem.features) if structured else (self.on_mesh, None)
        return HardConstraint(function, features=features, rows=self.problem.rows(), grid_ndim=2, x0=1.0, **options)

    def residual(self, products: dict[str, Tensor], u0: Tensor) -> Tensor:
        """That of the problem in the scaled time."""
        return self.problem.duration / 10 * self.problem.residual(products, u0)

    def on_mesh(self, u: Tensor, u0: Tensor) -> Tensor:
        """The same as a function of u."""
        return self.problem.duration / 10 * self.problem.mesh_residual(u, u0)

    def loss(self, u: Tensor) -> Tensor:
        """The mean squared distance from the reference solution."""
        return (u - self.target).square().mean()

    def gradient(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the loss in the basis."""
        basis = self.basis.clone().requires_grad_()
        return torch.autograd.grad(self.loss(run(basis)), basis)[0]

    def rows(self, basis: Tensor) -> Rows:
        """The data of all rows, for the plain loops."""
        made = self.layer().assemble(basis, self.u0)
        batch = basis.shape[:1]
        matrix = torch.cat([rows.matrix.expand(*batch, -1, -1) for rows in made.linear], -2)
        return Rows(made.points[0].features, matrix, torch.cat([rows.target.expand(*batch, -1) for rows in made.linear], -1))

    def values(self, w: Tensor, rows: Rows) -> Tensor:
        """r(w), of one element or of all."""
        products = {name: torch.einsum("...pn,...n->...p", T, w) for name, T in rows.features.items()}
        linear = torch.einsum("...pn,...n->...p", rows.matrix, w) - rows.target
        return torch.cat([self.residual(products, self.u0), linear], -1)

    def combine(self, basis: Tensor, w: Tensor) -> Tensor:
        """u."""
        return torch.einsum("btxn,bn->btx", basis, w)

    def by_jacfwd(self, w: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """r and J, by forward mode through the rows."""

        def twice(w: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            r = self.values(w, rows)
            return r, r

        jacobian, r = torch.func.vmap(torch.func.jacfwd(twice, has_aux=True))(w, rows)
        return r, jacobian

    def by_features(self, w: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """r and J, from the slopes of the residual; autograd goes through."""
        products = {name: torch.einsum("bpn,bn->bp", T, w) for name, T in rows.features.items()}
        r = self.residual(products, self.u0)
        slopes = torch.autograd.grad(r.sum(), list(products.values()), create_graph=True)
        interior = sum(slope.unsqueeze(-1) * T for slope, T in zip(slopes, rows.features.values(), strict=True))
        linear = torch.einsum("bpn,bn->bp", rows.matrix, w) - rows.target
        return torch.cat([r, linear], -1), torch.cat([interior, rows.matrix], -2)

    def plain(self, basis: Tensor, jacobian: Jacobian, steps: int, tol: float = 0.0) -> tuple[Tensor, int]:
        """Levenberg–Marquardt, all elements in step: the solution, and the trial points it took."""
        rows, w = self.rows(basis), torch.ones(basis.shape[0], _FUNCTIONS, dtype=basis.dtype)
        mu = torch.full(basis.shape[:1], 1e-3, dtype=basis.dtype)
        r, J = jacobian(w, rows)
        for step in range(steps):
            gram, gradient = J.mT @ J, (r.unsqueeze(-2) @ J).squeeze(-2)
            if tol and float(scaled_gradient(w, r, J).amax()) <= tol:
                return self.combine(basis, w), step
            damped = gram + torch.diag_embed(mu.unsqueeze(-1) * gram.diagonal(dim1=-2, dim2=-1))
            trial = w - torch.linalg.solve(damped, gradient)
            better = self.values(trial, rows).square().sum(-1) <= r.square().sum(-1)
            w, mu = torch.where(better.unsqueeze(-1), trial, w), torch.where(better, mu / 10, mu * 10).clamp(1e-15, 1e12)
            r, J = jacobian(w, rows)
        return self.combine(basis, w), steps

    def unpolished(self, basis: Tensor, tol: float) -> Tensor:
        """u where the solver stopped, its derivative by the implicit function theorem as if it were the minimum."""
        rows = self.rows(basis)

        def gradient(w: Tensor, rows: Rows) -> Tensor:
            r, pullback = torch.func.vjp(lambda w: self.values(w, rows), w)
            return pullback(r)[0]

        def solver(residual_fn: object, w: Tensor, *, batch_ndim: int) -> Solution:
            fixed = Rows(*torch.utils._pytree.tree_map(torch.Tensor.detach, tuple(rows)))
            return levenberg_marquardt(lambda w: self.values(w, fixed), w, batch_ndim=batch_ndim, tol=tol)

        start = torch.ones(basis.shape[0], _FUNCTIONS, dtype=basis.dtype)
        return self.combine(basis, implicit_root(gradient, solver, symmetric=True, batch_ndim=1)(start, rows))


def scaled_gradient(w: Tensor, r: Tensor, J: Tensor) -> Tensor:
    """What the layer's stopping rule measures."""
    columns = torch.linalg.vector_norm(J, dim=-2)
    extent = torch.linalg.vector_norm(r, dim=-1) + (columns * w.abs()).sum(-1)
    return ((r.unsqueeze(-2) @ J).squeeze(-2).abs() / columns).amax(-1) / extent


def jacobians(meshes: list[tuple[int, int]], batch: int, budget: float) -> None:
    """The forward pass."""
    columns = [("mesh", 10), ("Jacobian", 26), ("ms", -7), ("times as long", -13), ("trials", -6), ("gradient", -8), ("from tight", -10)]
    table = Table(f"Forward pass, {batch} problems with {_FUNCTIONS} functions, tol 1e-8", columns)
    for mesh in meshes:
        case = Case(*mesh, batch=batch)
        structured, free = case.layer(), case.layer(structured=False)
        runs: dict[str, Callable[[], Any]] = {
            "features": lambda case=case, layer=structured: layer(case.basis, case.u0),
            "forward mode, same solver": lambda case=case, layer=free: layer(case.basis, case.u0),
            "vmap(jacfwd), plain loop": lambda case=case: case.plain(case.basis, case.by_jacfwd, 200, 1e-8),
        }
        with torch.no_grad():
            tight = case.layer(tol=1e-12)(case.basis, case.u0)
            times = race(runs, budget=budget)
            for name, run in runs.items():
                u, trials = run() if "plain" in name else (run(), None)
                gradient = None
                if trials is None:
                    found = (structured if name == "features" else free).solve(case.basis, case.u0)
                    trials, gradient = int(found.iterations.max()), float(found.gradient_norm.max())
                distance = float((u - tight).abs().max())
                table.row(case.grid, name, 1e3 * times.seconds(name), times.ratio(name, "features"), trials, gradient, distance)


def memory(case: Case, steps: tuple[int, ...]) -> None:
    """What is kept for the backward pass."""
    columns = [("by", 20), ("saved MB", -8), ("times as much", -13), ("peak MB", -8), ("ms", -7), ("gradient error", -14)]
    table = Table(f"Forward and backward on {case.grid}: what is kept", columns)
    exact = case.gradient(lambda basis: case.layer(tol=1e-12)(basis, case.u0))
    ways = {f"implicit, {tol:.0e}": lambda basis, tol=tol: case.layer(tol=tol)(basis, case.u0) for tol in (1e-4, 1e-8, 1e-12)}
    ways |= {f"unrolled, {count} steps": lambda basis, count=count: case.plain(basis, case.by_features, count)[0] for count in steps}
    base = saved(case, ways["implicit, 1e-08"])
    for name, way in ways.items():
        kept, begin = saved(case, way), time.process_time()
        error = relative_error(case.gradient(way), exact)
        seconds = time.process_time() - begin
        table.row(name, kept / 1e6, kept / base, peak_memory(lambda way=way: case.gradient(way)) / 1e6, 1e3 * seconds, error)


def saved(case: Case, way: Callable[[Tensor], Tensor]) -> int:
    """Bytes of all storages that autograd saves."""
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = case.loss(way(case.basis.clone().requires_grad_()))
    assert loss.requires_grad
    return sum(storages.values())


def tolerance(case: Case, tols: tuple[float, ...]) -> None:
    """The error of the gradient."""
    columns = [("tol", 6), ("trials", -6), ("ms", -7), ("layer", -9), ("without Newton", -14), ("Gauss-Newton", -12)]
    table = Table(f"Forward and backward on {case.grid}: error of the gradient, relative", columns)
    exact = case.gradient(lambda basis: case.layer(tol=1e-13)(basis, case.u0))
    for tol in tols:
        layer, approximate = case.layer(tol=tol), case.layer(tol=tol, hessian="gauss_newton")
        begin = time.process_time()
        error = relative_error(case.gradient(lambda basis, layer=layer: layer(basis, case.u0)), exact)
        seconds = time.process_time() - begin
        plain = relative_error(case.gradient(lambda basis, tol=tol: case.unpolished(basis, tol)), exact)
        without = relative_error(case.gradient(lambda basis, layer=approximate: layer(basis, case.u0)), exact)
        trials = int(layer.solve(case.basis, case.u0).iterations.max())
        table.row(f"{tol:.0e}", trials, 1e3 * seconds, error, plain, without)
    along = case.basis.square()  # smooth, and not in the span of the basis, which alone decides u
    layer, h = case.layer(), 1e-5
    losses = [case.loss(layer(case.basis + step * along, case.u0)) for step in (-2 * h, -h, h, 2 * h)]
    slope = (8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / (12 * h)
    mine = (case.gradient(lambda basis: layer(basis, case.u0)) * along).sum()
    print(f"\ndefault tolerance against finite differences along a direction: {float((mine / slope - 1).abs()):.0e}")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest entry."""
    return float((found - exact).abs().max() / exact.abs().max())


def experts(case: Case, counts: tuple[int, ...], budget: float) -> None:
    """Domains along x, all points in use."""
    columns = [("experts", -7), ("forward ms", -10), ("and backward", -12), ("trials", -6), ("|r| an expert", -13), ("error of u", -10)]
    table = Table(f"Experts on {case.grid}, all in one batch, ridge 1e-4", columns)
    layers = {count: mixture(case, count) for count in counts}

    def forward(count: int) -> Tensor:
        return layers[count](case.basis, case.u0)

    runs = {f"{count} forward": lambda count=count: forward(count) for count in counts}
    runs |= {f"{count} both": lambda count=count: case.gradient(lambda basis: layers[count](basis, case.u0)) for count in counts}
    times = race(runs, budget=2 * budget)
    for count in counts:
        found = layers[count].solve(case.basis, case.u0)
        residual = float(found.residual_norm.square().mean().sqrt())
        error = float((found.u - case.target).abs().mean())
        seconds = [1e3 * times.seconds(f"{count} {what}") for what in ("forward", "both")]
        table.row(count, *seconds, int(found.iterations.max()), residual, error)


def mixture(case: Case, count: int, group: Any = None) -> HardConstraint | MixtureOfConstraints:
    """So many experts."""
    layer = case.layer(ridge=1e-4, on_failure="warn")
    return layer if count == 1 else MixtureOfConstraints(layer, (1, count), group=group)


def processes(mesh: tuple[int, int], batch: int, count: int, rounds: int) -> None:
    """One process, and two that share its experts."""
    table = Table(f"{count} experts, forward and backward: processor time of the slower process", [("processes", -9), ("ms", -7)])
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_process, (world, folder, mesh, batch, count, rounds), nprocs=world)
            seconds = [float(torch.load(os.path.join(folder, f"{rank}.pt"))) for rank in range(world)]
        table.row(world, 1e3 * max(seconds))


def _process(rank: int, world: int, folder: str, mesh: tuple[int, int], batch: int, count: int, rounds: int) -> None:
    one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    case = Case(*mesh, batch=batch)
    layer = mixture(case, count, dist.group.WORLD if world > 1 else None)
    samples = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        case.gradient(lambda basis: layer(basis, case.u0))
        samples.append(time.process_time() - begin)
    torch.save(torch.tensor(samples[1:]).median(), os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
