from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers.convex import Cones
from difflayers.convex.cone_geometry import blocks, project, project_near, spectrum, triangle, unpack_triangle
from tests.convex.cone_programs import KINDS


def points(cones: Cones, seed: int, batch: int = 3) -> torch.Tensor:
    return 2 * torch.randn(batch, cones.rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_moreau(kind: str, seed: int) -> None:
    cones, _ = KINDS[kind]
    v = points(cones, seed)
    s = project(cones, v)
    y = s - v
    torch.testing.assert_close((s * y).sum(-1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(project(cones, s), s, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(project(cones, -y), torch.zeros_like(y), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_spectrum_is_that_of_the_derivative(kind: str) -> None:
    cones, _ = KINDS[kind]
    v = points(cones, 1, 4)
    found = spectrum(cones, v, project(cones, v))
    assert bool(((found.eigenvalues >= 0) & (found.eigenvalues <= 1)).all())
    for i in range(4):
        derivative = torch.autograd.functional.jacobian(lambda w: project(cones, w), v[i])
        columns = torch.eye(cones.rows, dtype=torch.float64)
        rotated = torch.stack([found.rotate(column.expand_as(v))[i] for column in columns], -1)
        torch.testing.assert_close(rotated.mT @ rotated, torch.eye(cones.rows, dtype=torch.float64))
        torch.testing.assert_close(rotated.mT @ (found.eigenvalues[i, :, None] * rotated), derivative, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.rotate(found.rotate(v), back=True), v)


@pytest.mark.parametrize("v", [[-1.0, 1.0, -2.0], [1.0, -2.0, 0.3], [-1.0, -1.0, 2.0], [0.0, -1.0, 1.0]])
@pytest.mark.parametrize("cones", [Cones(exp=1), Cones(pow=(0.3,))])
def test_spectrum_on_flat_faces(cones: Cones, v: list[float]) -> None:
    rows = torch.tensor([v], dtype=torch.float64)
    found = spectrum(cones, rows, project(cones, rows))
    derivative = torch.autograd.functional.jacobian(lambda w: project(cones, w), rows[0])
    (_, basis), *_ = found.bases
    torch.testing.assert_close(basis[0, 0] @ torch.diag(found.eigenvalues[0]) @ basis[0, 0].mT, derivative, atol=1e-9, rtol=1e-9)


def test_spectrum_of_one_dimensional_and_zero_second_order_cones() -> None:
    v = torch.tensor([[2.0, -1.0, 0.5, 0.0, 0.0], [-1.0, 3.0, -0.5, 0.0, 0.0]], dtype=torch.float64)
    found = spectrum(Cones(soc=(1, 1, 3)), v, project(Cones(soc=(1, 1, 3)), v))
    assert found.eigenvalues.tolist() == [[1, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


@given(st.integers(0, 1000), st.floats(0, 1e-2))
@settings(max_examples=25, deadline=None)
def test_projection_from_a_guess_is_the_projection(seed: int, away: float) -> None:
    cones = Cones(nonneg=1, exp=6)
    v = points(cones, seed, 5)
    s = project(cones, v)
    torch.testing.assert_close(project_near(cones, v + away, s), project(cones, v + away), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(project_near(cones, v, torch.zeros_like(v)), s, atol=1e-11, rtol=1e-11)


def test_triangles_keep_the_inner_product() -> None:
    a, b = (torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    a, b = a + a.mT, b + b.mT
    rows, columns, scale = triangle(4, a.device)
    packed = [scale * matrix[:, rows, columns] for matrix in (a, b)]
    torch.testing.assert_close((packed[0] * packed[1]).sum(-1), (a * b).sum((-2, -1)), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(unpack_triangle(packed[0], 4), a, rtol=1e-14, atol=1e-14)


def test_blocks_cover_the_rows_in_order() -> None:
    cones = Cones(2, 3, (3, 3, 4), (2, 2), 2, (0.5, 0.5, 0.2))
    found = list(blocks(cones))
    assert [(block.kind, block.count, block.dim) for block in found] == [
        ("zero", 2, 1),
        ("nonneg", 3, 1),
        ("soc", 2, 3),
        ("soc", 1, 4),
        ("psd", 2, 3),
        ("exp", 2, 3),
        ("pow", 2, 3),
        ("pow", 1, 3),
    ]
    assert [block.start for block in found] == [0, 2, 5, 11, 15, 21, 27, 33]
    assert cones.rows == 36
