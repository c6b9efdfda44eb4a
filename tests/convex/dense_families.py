"""Batches of dense QPs by construction: with a solution, without a feasible point, without a lower bound."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.convex.active_set import DenseQP, KKTPoint

FLOAT = {"dtype": torch.float64}


class Draw:
    """Normal and uniform numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, **FLOAT)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, **FLOAT)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def feasible(kind: str, n: int, batch: int = 8, seed: int = 0) -> DenseQP:
    """A batch of feasible and bounded problems of one kind, with m = n inequalities and p = n // 4 equalities where the kind has some."""
    draw = Draw(seed)
    root, q, G, A, inside = (
        draw.normal(batch, n, n),
        draw.normal(batch, n),
        draw.normal(batch, n, n),
        draw.normal(batch, n // 4, n),
        draw.normal(batch, n),
    )
    P = root @ root.mT / n + 0.1 * torch.eye(n, **FLOAT)
    h, b = apply(G, inside) + draw.uniform(batch, n), apply(A, inside)
    lb, ub = inside - draw.uniform(batch, n), inside + draw.uniform(batch, n)
    infinite = torch.full_like(q, torch.inf)
    random = DenseQP(P, q, G, h, A, b)
    no_rows = {"G": G[:, :0], "h": h[:, :0]}
    no_equalities = {"A": A[:, :0], "b": b[:, :0]}
    if kind == "random":
        return random
    if kind == "box":
        return random._replace(**no_rows, **no_equalities, lb=lb, ub=ub)
    if kind == "simplex":
        return random._replace(
            **no_rows, A=torch.ones(batch, 1, n, **FLOAT), b=torch.ones(batch, 1, **FLOAT), lb=torch.zeros_like(q), ub=infinite
        )
    if kind == "ill-conditioned":
        basis = torch.linalg.qr(root)[0]
        P = basis @ torch.diag_embed(10 ** torch.linspace(-3, 3, n, **FLOAT)) @ basis.mT
        size = 10 ** (6 * draw.uniform(batch, n) - 3)
        return random._replace(P=(P + P.mT) / 2, G=G * size.unsqueeze(-1), h=h * size)
    if kind == "singular P":
        half = root[:, :, : n // 2]
        return random._replace(P=half @ half.mT, lb=lb, ub=ub)
    if kind == "linear":
        return random._replace(P=0 * P, lb=lb, ub=ub)
    if kind == "linear, rows only":
        G = draw.normal(batch, 3 * n, n)
        return DenseQP(0 * P, -apply(G.mT, draw.uniform(batch, 3 * n)), G, apply(G, inside) + draw.uniform(batch, 3 * n), A, b)
    if kind == "redundant equalities":
        return random._replace(A=torch.cat((A, 2 * A, A[:, :1] * 0), 1), b=torch.cat((b, 2 * b, b[:, :1] * 0), 1))
    if kind == "duplicate rows":
        return random._replace(G=torch.cat((G, 3 * G), 1), h=torch.cat((h, 3 * h), 1))
    if kind == "many rows":
        G = draw.normal(batch, 5 * n, n)
        return random._replace(G=G, h=apply(G, inside) + draw.uniform(batch, 5 * n))
    if kind == "fixed variables":
        fixed = torch.arange(n) < n // 3
        return random._replace(lb=torch.where(fixed, inside, lb), ub=torch.where(fixed, inside, ub))
    if kind == "one feasible point":
        eye = torch.eye(n, **FLOAT).expand(batch, -1, -1)
        return DenseQP(P, q, torch.cat((eye, -eye), 1), torch.cat((inside, -inside), 1), A[:, :0], b[:, :0])
    if kind == "equalities as rows":
        return DenseQP(P, q, torch.cat((G, A, -A), 1), torch.cat((h, b, -b), 1), A[:, :0], b[:, :0])
    if kind == "far and absent limits":
        h = torch.where(torch.arange(n) % 3 == 0, h, torch.where(torch.arange(n) % 3 == 1, 1e6, torch.inf))
        return random._replace(h=h, lb=torch.full_like(q, -1e6), ub=infinite)
    if kind == "assignment":
        rows = torch.zeros(2 * n, n * n, **FLOAT)
        for i in range(n):
            rows[i, i * n : (i + 1) * n] = rows[n + i, i::n] = 1
        zeros, ones = torch.zeros(batch, n * n, **FLOAT), torch.ones(batch, 2 * n, **FLOAT)
        return DenseQP(
            torch.zeros(1, n * n, n * n, **FLOAT),
            draw.normal(batch, n * n),
            rows[None, :0],
            ones[:, :0],
            rows[None],
            ones,
            zeros,
            zeros + 2,
        )
    if kind == "equalities only":
        return random._replace(**no_rows)
    if kind == "unconstrained":
        return random._replace(**no_rows, **no_equalities)
    if kind == "zero":
        return DenseQP(*(None if t is None else 0 * t for t in random))
    raise ValueError(kind)


FEASIBLE = [
    "random",
    "box",
    "simplex",
    "ill-conditioned",
    "singular P",
    "linear",
    "linear, rows only",
    "redundant equalities",
    "duplicate rows",
    "many rows",
    "fixed variables",
    "one feasible point",
    "equalities as rows",
    "far and absent limits",
    "equalities only",
    "unconstrained",
    "zero",
]


def infeasible(kind: str, n: int, batch: int = 16, seed: int = 0, linear: bool = False) -> DenseQP:
    """A batch of problems without a feasible point, by gaps between 1e-3 and 1."""
    draw = Draw(seed)
    P, q, G, h, A, b, _, _ = feasible("random", n, batch, seed)
    A, b = (A, b) if n >= 4 else (G[:, :1], h[:, :1])
    P = 0 * P if linear else P
    gap, inside = 10 ** (-3 * draw.uniform(batch, 1)), draw.normal(batch, n)
    lb, ub = inside - 1, inside + 1
    if kind == "opposite rows":
        return DenseQP(P, q, torch.cat((G, -G[:, :1]), 1), torch.cat((h, -h[:, :1] - gap), 1), A[:, :0], b[:, :0])
    if kind == "combination of rows":
        weights = draw.uniform(batch, n)
        return DenseQP(
            P,
            q,
            torch.cat((G, -(weights.unsqueeze(1) @ G)), 1),
            torch.cat((h, -(weights * h).sum(-1, keepdim=True) - gap), 1),
            A[:, :0],
            b[:, :0],
        )
    if kind == "equality beyond the box":
        normal = draw.uniform(batch, 1, n) + 0.1
        return DenseQP(P, q, G[:, :0], h[:, :0], normal, (normal.squeeze(1) * ub).sum(-1, keepdim=True) + gap, lb, ub)
    if kind == "halfspace beyond the box":
        normal = draw.normal(batch, 1, n)
        least = torch.minimum(normal.squeeze(1) * lb, normal.squeeze(1) * ub).sum(-1, keepdim=True)
        return DenseQP(P, q, torch.cat((G, normal), 1), torch.cat((h + 10, least - gap), 1), A[:, :0], b[:, :0], lb, ub)
    if kind == "opposite equalities":
        return DenseQP(P, q, G, h, torch.cat((A, 2 * A[:, :1]), 1), torch.cat((b, 2 * b[:, :1] + gap), 1))
    if kind == "row against equality":
        return DenseQP(P, q, torch.cat((G, -A[:, :1]), 1), torch.cat((h, -b[:, :1] - gap), 1), A, b)
    if kind == "more equalities than variables":
        return DenseQP(P, q, G[:, :0], h[:, :0], draw.normal(batch, n + 1, n), draw.normal(batch, n + 1))
    if kind == "many rows":
        return DenseQP(P, q, draw.normal(batch, 5 * n, n), -0.3 - draw.uniform(batch, 5 * n), A[:, :0], b[:, :0])
    if kind == "zero row":
        return DenseQP(P, q, torch.cat((G, 0 * G[:, :1]), 1), torch.cat((h, -gap), 1), A[:, :0], b[:, :0])
    if kind == "unbounded as well":
        return DenseQP(0 * P, q, torch.cat((G[:, :1], -G[:, :1]), 1), torch.cat((h[:, :1], -h[:, :1] - gap), 1), A[:, :0], b[:, :0])
    if kind == "crossing bounds":
        return DenseQP(P, q, G[:, :0], h[:, :0], A[:, :0], b[:, :0], lb, torch.where(torch.arange(n) == 0, lb - gap, ub))
    raise ValueError(kind)


INFEASIBLE = [
    "opposite rows",
    "combination of rows",
    "equality beyond the box",
    "halfspace beyond the box",
    "opposite equalities",
    "row against equality",
    "more equalities than variables",
    "many rows",
    "zero row",
    "unbounded as well",
    "crossing bounds",
]


def unbounded(kind: str, n: int, batch: int = 16, seed: int = 0) -> DenseQP:
    """A batch of feasible problems whose objective falls without limit along a random direction."""
    draw = Draw(seed)
    ray, inside = draw.normal(batch, n), draw.normal(batch, n)

    def flat(*size: int) -> Tensor:
        rows = draw.normal(*size)
        return rows - apply(rows, ray).unsqueeze(-1) * (ray / ray.square().sum(-1, keepdim=True)).unsqueeze(1)

    root, A, G, q = flat(batch, n, n), flat(batch, max(n // 4, 1), n), draw.normal(batch, n, n), draw.normal(batch, n)
    P = root.mT @ root / n
    P = (P + P.mT) / 2
    G = torch.where(apply(G, ray).unsqueeze(-1) > 0, -G, G)
    q = torch.where((q * ray).sum(-1, keepdim=True) > 0, -q, q)
    h, b = apply(G, inside) + draw.uniform(batch, n), apply(A, inside)
    lb, ub = torch.where(ray > 0, inside - 1, -torch.inf), torch.where(ray < 0, inside + 1, torch.inf)
    if kind == "singular P":
        return DenseQP(P, q, G, h, A, b)
    if kind == "linear":
        return DenseQP(0 * P, q, G, h, A, b)
    if kind == "free":
        return DenseQP(P, q, G[:, :0], h[:, :0], A[:, :0], b[:, :0])
    if kind == "equalities only":
        return DenseQP(P, q, G[:, :0], h[:, :0], A, b)
    if kind == "bounds":
        return DenseQP(P, q, G, h, A, b, lb, ub)
    if kind == "linear, bounds only":
        return DenseQP(0 * P, q, G[:, :0], h[:, :0], A[:, :0], b[:, :0], lb, ub)
    if kind == "cone":
        return DenseQP(P, q, G, 0 * h, A, 0 * b)
    raise ValueError(kind)


UNBOUNDED = ["singular P", "linear", "free", "equalities only", "bounds", "linear, bounds only", "cone"]


def kkt_violation(problem: DenseQP, point: KKTPoint) -> dict[str, float]:
    """The largest violation of each optimality condition in absolute terms, from the definitions."""
    P, q, G, h, A, b, lb, ub = problem
    x, y, z, z_lower, z_upper = point
    gradient = apply(P, x) + q + apply(A.mT, y) + apply(G.mT, z)
    slack, multipliers = h - apply(G, x), z
    if lb is not None and ub is not None:
        gradient = gradient - z_lower + z_upper
        slack, multipliers = torch.cat((slack, x - lb, ub - x), -1), torch.cat((z, z_lower, z_upper), -1)
    equality = apply(A, x) - b
    conditions = {
        "stationarity": gradient.abs(),
        "equalities": equality.abs(),
        "inequalities": -slack,
        "signs": -multipliers,
        "complementarity": multipliers * torch.where(slack.isinf(), 0.0, slack).abs(),
        "multipliers of absent limits": multipliers * slack.isinf(),
    }
    return {name: float(value.max()) if value.numel() else 0.0 for name, value in conditions.items()}
