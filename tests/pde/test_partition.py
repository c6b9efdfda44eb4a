"""The cut of a mesh: every point has an owner, and the experts' values blend to one field."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ShapeError
from difflayers.pde.partition import Cut, Domains, block_labels, find_borders, hard_cut, soft_cut


def _labels(seed: int, grid: tuple[int, ...], experts: int, lead: tuple[int, ...] = ()) -> Tensor:
    return torch.randint(experts, (*lead, *grid), generator=torch.Generator().manual_seed(seed))


def _points(cut: Cut | Domains, *at: int) -> list[int]:
    """The points of one expert, padding left out."""
    domains = cut.domains() if isinstance(cut, Cut) else cut
    return domains.index[at][domains.weight[at] > 0].tolist()


def test_blocks_of_unequal_sizes() -> None:
    sizes = torch.bincount(block_labels((101,), (4,))).tolist()
    assert sizes == [26, 25, 25, 25]
    assert torch.bincount(block_labels((101, 3), ((30, 30, 41), 1))[:, 0]).tolist() == [30, 30, 41]
    cut = hard_cut(block_labels((101,), (4,)), 1)
    assert cut.domains().index.shape == (4, 26)
    assert _points(cut, 1) == list(range(26, 51))


@pytest.mark.parametrize("partition", [(4,), (0, 1), (4, 1), (-1, 1), ((1, 1), 1), ((3, 0), 1), ((), 1)])
def test_a_partition_that_does_not_fit_is_refused(partition: tuple[object, ...]) -> None:
    with pytest.raises(ShapeError, match="partition"):
        block_labels((3, 5), partition)


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.tensor([0, -1]), torch.tensor([True, False])])
def test_labels_are_integers_that_count(labels: Tensor) -> None:
    with pytest.raises(ShapeError, match="labels must be integers"):
        hard_cut(labels, 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    grid=st.sampled_from([(7,), (4, 5), (3, 2, 4), (1, 6), (1,)]),
    experts=st.integers(1, 5),
    overlap=st.integers(0, 4),
    lead=st.sampled_from([(), (2,), (2, 3)]),
)
def test_a_cut_field_is_stitched_together_again(
    seed: int, grid: tuple[int, ...], experts: int, overlap: int, lead: tuple[int, ...]
) -> None:
    labels = _labels(seed, grid, experts, lead)
    labels = labels if lead else labels.unique(return_inverse=True)[1]
    cut = hard_cut(labels, len(grid), overlap=overlap)
    size = math.prod(grid)
    field = torch.randn(*lead, size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    domains = cut.domains()
    taken = domains.take(field)
    # Where an expert counts, the point is in its domain.
    seen = torch.full_like(cut.phi, torch.nan).scatter(-1, domains.index.expand(taken.shape[:-1]), taken[..., 1])
    assert seen[cut.phi > 0].isfinite().all()
    seen = seen.nan_to_num()
    torch.testing.assert_close(cut.stitch(seen), field[..., 1], rtol=0, atol=1e-14)
    torch.testing.assert_close(cut.phi.sum(-2), torch.ones_like(field[..., 0]), rtol=0, atol=1e-14)
    if overlap == 0:
        assert torch.equal(cut.phi.argmax(-2), labels.flatten(-len(grid)))


def test_labels_that_skip_a_number_are_refused() -> None:
    with pytest.raises(ShapeError, match="no point has label 1"):
        hard_cut(torch.tensor([0, 2]), 1)


def test_overlap_is_a_ramp_across_a_border() -> None:
    cut = hard_cut(block_labels((12,), (2,)), 1, overlap=2)
    assert _points(cut, 0) == list(range(8))
    assert _points(cut, 1) == list(range(4, 12))
    torch.testing.assert_close(5 * cut.phi[0], torch.tensor([5, 5, 5, 5, 4, 3, 2, 1, 0, 0, 0, 0], dtype=torch.float64))


def test_overlap_of_blocks_grows_along_diagonals() -> None:
    cut = hard_cut(block_labels((4, 4), (2, 2)), 2, overlap=1)
    assert all(len(_points(cut, e)) == 9 for e in range(4))


def test_an_empty_expert_repeats_the_fullest_and_is_not_read() -> None:
    cut = hard_cut(torch.tensor([[0, 2, 2], [0, 1, 2]]), 1)
    assert _points(cut, 0, 1) == _points(cut, 0, 2) == [1, 2]
    assert not cut.phi[0, 1].any()


def test_points_of_a_region_are_numbered_there() -> None:
    cut = hard_cut(torch.tensor([0, 0, 0, 1, 1, 2]), 1)
    domains = cut.domains(torch.tensor([1, 2, 4]))
    assert [_points(domains, e) for e in range(3)] == [[0, 1], [2], []]
    soft = soft_cut(torch.zeros(5, 2), 1).domains(torch.tensor([1, 2]))
    assert soft.index is None
    assert soft.weight.shape == (2, 2)


def test_borders_are_found_once() -> None:
    borders = find_borders(torch.tensor([[0, 0, 1], [2, 0, 1]]), 2)
    found = sorted(zip(borders.point.tolist(), borders.first.tolist(), borders.second.tolist(), strict=True))
    # Point 0 is above one of expert 2, 3 is below and beside expert 0, 4 has both others for neighbours.
    assert found == [(0, 0, 2), (1, 0, 1), (2, 0, 1), (3, 0, 2), (4, 0, 1), (4, 0, 2), (5, 0, 1)]
    assert borders.present.all()


def test_borders_of_a_batch_are_padded() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    borders = find_borders(labels, 1)
    assert borders.present.sum(-1).tolist() == [2, 4, 0]
    assert borders.point[0][borders.present[0]].tolist() == [1, 2]
    assert find_borders(torch.zeros(5, dtype=torch.int64), 1).point.numel() == 0


def test_a_sample_has_as_many_points_as_asked_for_and_none_twice() -> None:
    cut = hard_cut(torch.tensor([0, 0, 0, 0, 0, 1, 1]), 1)
    first, again = (cut.domains().sample((3,), 4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.index, again.index)
    assert first.index.shape == (3, 2, 4)
    assert (first.weight > 0).sum(-1).tolist() == [[4, 2]] * 3
    for sample in range(3):
        for expert in range(2):
            chosen = _points(first, sample, expert)
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) <= set(_points(cut, expert))
    soft = soft_cut(torch.zeros(3, 7, 2), 1).domains().sample((3,), 4)
    assert soft.index.shape == soft.weight.shape == (3, 2, 4)


def test_soft_cut_is_differentiable_where_a_share_underflows() -> None:
    logits = torch.tensor([[0.0, -2000.0], [0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    cut = soft_cut(logits, 1)
    assert cut.phi[1, 0] == 0
    slope = torch.autograd.grad((cut.weight + cut.phi).sum(), logits)[0]
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(cut.weight**2, cut.phi)


@pytest.mark.parametrize("kind", ["shared", "batched", "soft"])
def test_derivatives_of_taking_and_stitching(kind: str) -> None:
    logits = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    shared, batched = (hard_cut(_labels(3, (5,), 2, lead), 1, overlap=1) for lead in ((), (2,)))

    def blend(field: Tensor, logits: Tensor) -> Tensor:
        cut = {"shared": shared, "batched": batched, "soft": soft_cut(logits, 1)}[kind]
        domains = cut.domains()
        taken = domains.take(field).square().sum(-1).cos() * domains.weight
        return cut.stitch(taken.sum(-1, keepdim=True) * field[..., 0].unsqueeze(-2))

    field = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    inputs = (field, logits) if kind == "soft" else (field,)
    call = blend if kind == "soft" else lambda field: blend(field, logits.detach())
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)
