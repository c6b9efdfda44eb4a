"""The method of lines on systems with a closed form, and where it must give up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difflayers.errors import NotConvergedError
from difflayers.pde.problems.method_of_lines import cells_for, method_of_lines, refined


def test_stiff_decay() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    rates = torch.tensor([1.0, 1e4], dtype=torch.float64)
    y0 = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], dtype=torch.float64)
    y = method_of_lines(lambda t, y: -rates.numpy() * y, y0, t, rtol=1e-9, atol=1e-12, method="LSODA")
    assert y.shape == (2, 1, 5, 2)
    torch.testing.assert_close(y, y0[:, :, None] * torch.exp(-rates * t[:, None]), rtol=0, atol=1e-8)


def test_a_blow_up_is_an_error_that_names_the_element() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    y0 = torch.tensor([[0.5], [2.0]], dtype=torch.float64)  # y' = y²: 1/y0 is the last moment

    def square(t: float, y: Any) -> Any:
        return y * y

    with pytest.raises(NotConvergedError, match=r"element \(1,\).* beyond t = 0\.") as caught:
        method_of_lines(square, y0, t, rtol=1e-8, atol=1e-10, method="RK45")
    assert caught.value.indices == [(1,)]


def test_refined_keeps_values_and_makes_no_extrema() -> None:
    u = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0]])
    fine = refined(u, 4)
    assert fine.shape == (2, 17)
    assert fine.dtype == torch.float64
    torch.testing.assert_close(fine[:, ::4], u.double())
    assert fine.min() >= 0
    assert fine[0].max() <= 1
    torch.testing.assert_close(fine[1], torch.linspace(1, 5, 17, dtype=torch.float64))
    assert cells_for(1000, 64) == 16
