r"""The one autograd.Function through which every layer is differentiated.

Let x(θ) solve F(x, θ) = 0, with A = ∂F/∂x invertible there. The implicit function theorem gives

.. math:: \frac{∂x}{∂θ} = -A^{-1} \frac{∂F}{∂θ},

so a cotangent g pulls back to ``(∂F/∂θ)ᵀ u`` with ``Aᵀ u + g = 0``, and a tangent t pushes forward to the v with
``A v + (∂F/∂θ) t = 0``. Both are linear root problems in u and v, with the arguments (x, θ, g). They are handed to this
same Function. So the solve inside a derivative is itself an implicit layer, and derivatives of any order in any nest of
transforms follow from one rule. The linearization of a linear problem is the same operator again: a derivative of order k
costs k solves with it, not 2ᵏ nested ones.

Under vmap the rule rebuilds the problem with one more batch dimension, so that solvers and factorizations always see plain
tensors. If only the right-hand side of a linear problem is batched (as in ``jacrev``), it becomes one more column of the
same factorized system.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ShapeError
from ..pytree import is_differentiable, is_floating
from ..solution import OnFailure, Solution, Status, report_failures
from ..solvers.linearize import block_jacobian, jvp, vjp, without_saved_tensor_hooks
from .methods import LinearMethod

__all__ = [
    "ImplicitFunction",
    "Linearized",
    "Problem",
    "apply_anywhere",
    "check_residual",
    "in_a_transform",
    "nan_free",
    "nan_where_failed",
    "solve_implicitly",
]

Find = Callable[[Callable[[Tensor], Tensor], Tensor, int], Solution]


def solve_implicitly(problem: Problem | Linearized, x0: Tensor, theta: Sequence[Any]) -> Solution:
    """The solution of ``problem`` near ``x0``, differentiable in every floating tensor of ``theta``.

    Args:
        problem: what to solve.
        x0: ``(*batch, n)``, the starting point; no derivative flows to it.
        theta: the arguments of the residual after x; non-tensors pass through.
    """
    found = Solution(*ImplicitFunction.apply(problem, x0.detach(), *theta)[:4])
    # The Function keeps its output for the derivatives; the caller's copy may be modified in place.
    return found._replace(x=found.x.clone())


def in_a_transform(*tensors: Tensor) -> bool:
    """Whether forward mode or a transform is at work here, or autograd's older vmap on one of ``tensors``.

    If none is, and no graph is recorded, what is computed here may be done in place, and needs no Function.
    """
    stack = torch._C._functorch
    return forward_ad._current_level >= 0 or stack.peek_interpreter_stack() is not None or any(map(stack.is_legacy_batchedtensor, tensors))


def check_residual(residual: Tensor, x: Tensor, of: str = "the residual", like: str = "x") -> None:
    """Refuse a residual that has not the shape and dtype of the unknown.

    Args:
        residual: rows, ``(*batch, n)`` as they should be.
        x: ``(*batch, n)``.
        of: what the message calls the residual.
        like: what the message calls x.

    Raises:
        ShapeError: they differ.
    """
    if residual.shape != x.shape:
        raise ShapeError(f"{of} must have the shape of {like}: as rows it has {tuple(residual.shape)}, {like} has {tuple(x.shape)}")
    if residual.dtype != x.dtype:
        raise ShapeError(f"{like} is {x.dtype} and {of} {residual.dtype}; convert {like} or the arguments, so that both have one dtype")


def nan_where_failed(found: Solution, on_failure: OnFailure) -> Tensor:
    """The rows of a solution; with ``"nan"``, failed ones are NaN and pass no cotangent on.

    Args:
        found: with x of shape ``(*batch, n)``.
        on_failure: the caller's choice.
    """
    if on_failure != "nan":
        return found.x
    return torch.where((found.status == Status.SOLVED).unsqueeze(-1), found.x, torch.nan)


def nan_free(theta: Sequence[Any], lost: Tensor) -> list[Any]:
    """θ without its NaNs, if some elements are ``lost`` to them: one would come back as 0 · NaN in the gradient of what it shares.

    Args:
        theta: the arguments; what is no real floating tensor stays.
        lost: ``(*batch,)`` bool.
    """
    return [torch.where(torch.isnan(leaf) & lost.any(), 0, leaf) if is_floating(leaf) else leaf for leaf in theta]


class _Residual:
    """What a problem and its linearizations share: a residual, and its derivatives in θ."""

    residual: Callable[..., Tensor]

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """``(∂F/∂θᵢ)ᵀ u`` for the i in ``which``. A problem that knows a closed form overrides this, in differentiable operations."""
        _, pullback = vjp(self._of(x, theta, which), *(theta[i] for i in which))
        return pullback(u)

    def pushforward(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """``Σ (∂F/∂θᵢ) tᵢ`` over the i in ``which``."""
        return jvp(self._of(x, theta, which), tuple(theta[i] for i in which), tuple(tangents))[1]

    def _of(self, x: Tensor, theta: Sequence[Any], which: Sequence[int]) -> Callable[..., Tensor]:
        """The residual as a function of some of θ, the rest held."""

        def residual(*values: Tensor) -> Tensor:
            full = list(theta)
            for i, value in zip(which, values, strict=True):
                full[i] = value
            return self.residual(x, *full)

        return residual


class Problem(_Residual):
    """A root problem F(x, θ) = 0, batched over the first ``batch_ndim`` dimensions of x.

    Args:
        residual: ``(x, *theta) -> (*batch, n)``, each row depending on its own row of x only.
        find: ``(x -> residual, x0, batch_ndim) -> Solution``, on plain tensors.
        linear: how systems with A = ∂F/∂x are solved.
        batch_ndim: leading dimensions of x that index independent problems.
        elementwise: call ``find`` once for each element that an outer vmap adds, not once for all.
        on_failure: what happens to a derivative whose linear system has no solution.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        find: Find,
        linear: LinearMethod,
        *,
        batch_ndim: int = 0,
        elementwise: bool = False,
        on_failure: OnFailure = "raise",
    ) -> None:
        self.residual = residual
        self.search = find
        self.linear = linear
        self.batch_ndim = batch_ndim
        self.elementwise = elementwise
        self.on_failure = on_failure
        self._factor: Any = None
        self._batched: dict[tuple[Any, ...], Problem] = {}

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        """Solve on plain tensors; a row that is not finite goes back to its starting point (its status tells)."""
        if x0.numel() == 0:
            status = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
            return Solution(x0.clone(), status, x0.new_zeros(x0.shape[:-1]), status.clone())
        found = self.search(lambda x: self.residual(x, *theta), x0, self.batch_ndim)
        finite = torch.isfinite(found.x).all(-1, keepdim=True)
        # A new tensor in any case: a solver that returns x0 itself would turn an input of the Function into its output.
        return found._replace(x=torch.where(finite, found.x, x0))

    def point(self, x: Tensor, theta: Sequence[Any]) -> tuple[Any, ...]:
        """Where the residual is linearized: (x, θ)."""
        return (x, *theta)

    def linearized(self, transpose: bool) -> Linearized:
        """The linear problem ``A u + g = 0``, or with Aᵀ."""
        return Linearized(self, transpose)

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        """``u -> A u`` or ``u -> Aᵀ u`` at ``point``, rows ``(*batch, n)``."""
        x, *theta = point
        if transpose:
            _, pullback = vjp(lambda z: self.residual(z, *theta), x)
            return lambda u: pullback(u)[0]
        return lambda u: jvp(lambda z: self.residual(z, *theta), (x,), (u,))[1]

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve A u = rhs (or Aᵀ u = rhs) on plain tensors; with ``columns`` the first dimension of rhs counts right-hand sides."""
        x = point[0]
        if self.linear.is_dense(x):
            if self._factor is None:
                self._factor = self.linear.factorize(self.matrix(point))
            return self._factor.solve(rhs, transpose=transpose)

        def spread(operator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return torch.func.vmap(operator) if columns else operator

        return self.linear.iterate(
            spread(self.operator(point, transpose)), rhs, lambda: spread(self.operator(point, not transpose)), transpose=transpose
        )

    def matrix(self, point: Sequence[Any]) -> Tensor:
        """A as ``(*batch, n, n)``."""
        x, *theta = point
        return block_jacobian(lambda z: self.residual(z, *theta), x)

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        """The problem with one more leading batch dimension; ``in_dims`` says which of θ carry it in front (0) or not (None)."""
        key = (in_dims, size, randomness)
        if key not in self._batched:
            residual = torch.func.vmap(self.residual, in_dims=(0, *in_dims), randomness=randomness)
            self._batched[key] = (
                _ElementwiseProblem(self, residual, in_dims, size)
                if self.elementwise
                else Problem(residual, self.search, self.linear, batch_ndim=self.batch_ndim + 1, on_failure=self.on_failure)
            )
        return self._batched[key]

    def align(self, theta: list[Any], in_dims: Sequence[int | None]) -> tuple[list[Any], tuple[int | None, ...]]:
        """θ with its new batch dimension in front, as :meth:`batched` wants it."""
        moved = [leaf if dim is None else leaf.movedim(dim, 0) for leaf, dim in zip(theta, in_dims, strict=True)]
        return moved, tuple(None if dim is None else 0 for dim in in_dims)


class _ElementwiseProblem(Problem):
    """A problem under vmap whose solver takes one element at a time (a user's own: SciPy, a C library, a loop)."""

    def __init__(self, inner: Problem, residual: Callable[..., Tensor], in_dims: tuple[int | None, ...], size: int) -> None:
        super().__init__(
            residual, inner.search, inner.linear, batch_ndim=inner.batch_ndim + 1, elementwise=True, on_failure=inner.on_failure
        )
        self.inner, self.in_dims, self.size = inner, in_dims, size

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        found = [
            self.inner.find(x0[i], [leaf if dim is None else leaf[i] for leaf, dim in zip(theta, self.in_dims, strict=True)])
            for i in range(self.size)
        ]
        return Solution(*(torch.stack(parts) for parts in zip(*found, strict=True)))


class Linearized(_Residual):
    """The linear root problem ``A u + g = 0`` (or Aᵀ) of a :class:`Problem`; its θ is (x, θ of the problem, g).

    u and g are ``(*columns, *batch, n)``: the first ``columns`` dimensions are right-hand sides of one and the same system.
    ``outermost`` marks a system that a user posed, not one behind a derivative: its failures are filled by the caller.
    """

    def __init__(self, base: Problem, transpose: bool, columns: int = 0, *, outermost: bool = False) -> None:
        self.base, self.transpose, self.columns, self.outermost = base, transpose, columns, outermost

    def residual(self, u: Tensor, *theta: Any) -> Tensor:
        """A u + g, or Aᵀ u + g."""
        *point, g = theta
        operator = self.base.operator(point, self.transpose)
        if not self.columns:
            return operator(u) + g
        return torch.func.vmap(operator)(u.flatten(0, self.columns - 1)).reshape(g.shape) + g

    def find(self, u0: Tensor, theta: Sequence[Any]) -> Solution:
        """Solve on plain tensors, and report the systems that have no solution."""
        *point, g = theta
        lead = g.shape[: self.columns]
        rhs = -(g.flatten(0, self.columns - 1) if self.columns > 1 else g)
        found = self.base.solve_linear(point, rhs, self.transpose, self.columns > 0)
        found = Solution(*(part.reshape(*lead, *part.shape[1:]) if self.columns > 1 else part for part in found))
        if self.outermost:
            report_failures(found, "linear_solve", self.base.on_failure)
            finite = torch.isfinite(found.x).all(-1, keepdim=True)
            return found._replace(x=torch.where(finite, found.x, 0)) if self.base.on_failure == "nan" else found
        if not bool(found.status.any()):
            return found
        # A cotangent that is NaN is the caller's news, not a failure of the solve: it passes through as NaN.
        failed = (found.status != Status.SOLVED) & torch.isfinite(g).all(-1)
        report_failures(
            found._replace(status=torch.where(failed, found.status, 0)), "the linear system behind a derivative", self.base.on_failure
        )
        if self.base.on_failure == "nan":
            found = found._replace(x=torch.where(failed.unsqueeze(-1), torch.nan, found.x))
        return found

    def point(self, u: Tensor, theta: Sequence[Any]) -> tuple[Any, ...]:
        """Where the problem is linearized; the system is linear, so its own unknown does not matter."""
        return tuple(theta[:-1])

    def linearized(self, transpose: bool) -> Linearized:
        """The same operator, or its transpose."""
        return Linearized(self.base, self.transpose != transpose, self.columns)


class ImplicitFunction(torch.autograd.Function):
    """The map (problem, x0, *θ) -> (x, *diagnostics), differentiable in the floating tensors of θ.

    The diagnostics are what ``problem.find`` returns after x: usually status, residual and iterations.
    """

    @staticmethod
    def forward(problem: Problem | Linearized, x0: Tensor, *theta: Any) -> tuple[Tensor, ...]:
        """Solve; nothing of the iterations is kept."""
        # Nothing in here is saved, and a residual may be a transform itself, which the hooks of a checkpoint forbid.
        with without_saved_tensor_hooks():
            return tuple(problem.find(x0, theta))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the solution and the arguments."""
        problem, _, *theta = inputs
        tensors = [leaf for leaf in theta if isinstance(leaf, Tensor)]
        ctx.problem = problem
        ctx.diagnostics = len(output) - 1
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in theta]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pull a cotangent back by one solve with Aᵀ."""
        count, cotangent = len(ctx.constants), cotangents[0]
        wanted = [i for i in range(count) if ctx.needs_input_grad[2 + i]]
        if cotangent is None or not wanted:
            return (None,) * (2 + count)
        problem = ctx.problem
        x, theta = _saved(ctx)
        point = problem.point(x, theta)
        adjoint = problem.linearized(transpose=True)
        u = apply_anywhere(adjoint, torch.zeros_like(cotangent), *point, cotangent)[0]
        gradients: list[Tensor | None] = [None] * count
        wanted = [i for i in wanted if is_differentiable(theta[i])]
        for i, gradient in zip(wanted, problem.pullback(x, theta, wanted, u), strict=True):
            gradients[i] = gradient
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Push tangents forward by one solve with A."""
        problem = ctx.problem
        x, theta = _saved(ctx)
        # The first two are those of the problem and of the starting point.
        moving = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None and is_differentiable(theta[i])]
        # Forward mode is off inside this rule, which would silently drop the tangents of outer levels: it is
        # switched on again, and the tangents of this level are taken off the saved tensors.
        with forward_ad._set_fwd_grad_enabled(True):
            x, *theta = [_primal(leaf) if isinstance(leaf, Tensor) else leaf for leaf in (x, *theta)]
            if not moving:
                return (torch.zeros_like(x), *[None] * ctx.diagnostics)
            drift = problem.pushforward(x, theta, moving, [tangents[2 + i] for i in moving])
            forward = problem.linearized(transpose=False)
            v = apply_anywhere(forward, torch.zeros_like(x), *problem.point(x, theta), drift)[0]
        return (v, *[None] * ctx.diagnostics)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        """Solve the problem with one more batch dimension, or one more right-hand side."""
        problem, x0, *theta = operands
        _, x_dim, *dims = in_dims
        size = info.batch_size
        if isinstance(problem, Problem):
            x0 = x0.expand(size, *x0.shape) if x_dim is None else x0.movedim(x_dim, 0)
            moved, where = problem.align(list(theta), dims)
            return ImplicitFunction.apply(problem.batched(where, size, info.randomness), x0, *moved), 0
        *point, g = theta
        *point_dims, g_dim = dims
        base, columns = problem.base, problem.columns
        if all(dim is None for dim in point_dims):
            g = g.movedim(g_dim, 0) if g_dim is not None else g.expand(size, *g.shape)
            more = Linearized(base, problem.transpose, columns + 1, outermost=problem.outermost)
            return ImplicitFunction.apply(more, torch.zeros_like(g), *point, g), 0
        x = point[0].expand(size, *point[0].shape) if point_dims[0] is None else point[0].movedim(point_dims[0], 0)
        moved, where = base.align(point[1:], point_dims[1:])
        g = g.movedim(g_dim, columns) if g_dim is not None else g.unsqueeze(columns).expand(*g.shape[:columns], size, *g.shape[columns:])
        deeper = Linearized(base.batched(where, size, info.randomness), problem.transpose, columns, outermost=problem.outermost)
        return ImplicitFunction.apply(deeper, torch.zeros_like(g), x, *moved, g), columns


# Function.apply binds its arguments to this signature at every call, and would work it out anew each time.
vars(ImplicitFunction)["forward"].__func__.__signature__ = inspect.signature(ImplicitFunction.forward)


def apply_anywhere(problem: Problem | Linearized, *operands: Any) -> tuple[Tensor, ...]:
    """``ImplicitFunction.apply``, also under the older vmap that ``autograd.grad(is_grads_batched=True)`` still runs backward in.

    That vmap passes by the rules of a Function, so its batched tensors are taken apart and put together here.
    """
    batched = [isinstance(leaf, Tensor) and torch._C._functorch.is_legacy_batchedtensor(leaf) for leaf in operands]
    if not any(batched):
        return (ImplicitFunction.apply if torch.is_grad_enabled() or in_a_transform() else ImplicitFunction.forward)(problem, *operands)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = [torch._remove_batch_dim(leaf, level, 0, 0) if yes else leaf for leaf, yes in zip(operands, batched, strict=True)]
    size = next(leaf.shape[0] for leaf, yes in zip(plain, batched, strict=True) if yes)
    dims = [0 if yes else None for yes in batched]
    outputs, dim = ImplicitFunction.vmap(_VmapInfo(size, "error"), (None, *dims), problem, *plain)
    return tuple(torch._add_batch_dim(output, dim, level) for output in outputs)


class _VmapInfo(NamedTuple):
    batch_size: int
    randomness: str


def _saved(ctx: Any) -> tuple[Tensor, list[Any]]:
    # The pullback of torch.func.vjp runs after its level has ended, and the tensors saved at that level must not be wrapped again.
    x, *tensors = (torch._C._functorch.unwrap_if_dead(tensor) for tensor in ctx.saved_tensors)
    rest = iter(tensors)
    return x, [next(rest) if constant is None else constant[0] for constant in ctx.constants]


def _primal(tensor: Tensor) -> Tensor:
    return forward_ad.unpack_dual(tensor).primal if is_differentiable(tensor) else tensor
