r"""Spectral derivatives of smooth functions: Fourier series on a periodic mesh, Chebyshev polynomials between two ends.

**Fourier**, on n equidistant points of a period L:

.. math:: u(x) = \sum_k \hat u_k\, e^{2 π i k x / L}, \qquad \widehat{u^{(m)}}_k = (2 π i k / L)^m\, \hat u_k.

For even n the values cannot tell the highest frequency k = n/2 from −n/2. It stands for its cosine, whose derivatives of odd order are
zero on the mesh.

**Chebyshev**, on the points :math:`x_j = -\cos(π j / (n - 1))` of [−1, 1], which gather at the ends: u = Σ a_k T_k, where a comes from a
cosine transform, and the coefficients b of the derivative from the recurrence :math:`b_{k-1} = b_{k+1} + 2 k a_k` (with b₀ halved), that
is, from two cumulative sums. Both take O(n log n), and their error falls faster than any power of n where u is analytic.

Reference: Trefethen, Spectral Methods in MATLAB, SIAM (2000), chapters 3, 6 and 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ShapeError
from .mesh_arguments import check_values

__all__ = ["chebyshev_derivative", "chebyshev_points", "spectral_derivative"]


def spectral_derivative(u: Tensor, length: Tensor | float, *, dim: int = -1, order: int = 1) -> Tensor:
    """The derivative of a periodic function, by its Fourier series.

    Exact for trigonometric polynomials below the highest frequency of the mesh. Mixed derivatives are two calls. A derivative of order 2
    is not one of order 1 taken twice, where n is even: the first keeps the highest frequency, the others lose it.

    Args:
        u: ``(..., n, ...)``, floating, at n equidistant points along ``dim``; the first point of the next period is left out.
        length: of the period, a number or a tensor without dimensions; differentiable.
        dim: the dimension to differentiate along.
        order: of the derivative, at least 1.

    Returns:
        of the shape and dtype of u.

    Raises:
        ShapeError: u is not floating or has no such dimension, or length is a tensor with dimensions.
        ValueError: order is less than 1, or length is not positive and finite.

    Example:
        >>> import torch
        >>> from difflayers.pde import spectral_derivative
        >>> x = torch.arange(8, dtype=torch.float64) / 8
        >>> spectral_derivative(torch.sin(2 * torch.pi * x), 1.0)[0] / torch.pi
        tensor(2.0000, dtype=torch.float64)
    """
    dim = check_values(u, dim, order)
    n = u.shape[dim]
    if isinstance(length, Tensor):
        if length.dim() or not length.is_floating_point():
            raise ShapeError(
                f"length must be a number or a floating tensor without dimensions, got {length.dtype} of the shape {tuple(length.shape)}"
            )
    elif not (length > 0 and math.isfinite(length)):
        raise ValueError(f"length must be positive and finite, got {length}")
    if u.numel() == 0:  # which MKL's transform refuses
        return u / length
    factor = (2 * math.pi * torch.arange(n // 2 + 1, dtype=u.dtype, device=u.device)) ** order
    if order % 2 and n % 2 == 0:
        factor = torch.where(torch.arange(n // 2 + 1, device=u.device) < n // 2, factor, 0)
    factor = 1j**order * factor.reshape(-1, *[1] * (u.dim() - dim - 1))
    return torch.fft.irfft(factor * torch.fft.rfft(u, dim=dim), n, dim=dim) / length**order


def chebyshev_points(
    n: int, interval: tuple[float, float] = (-1.0, 1.0), *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """The n points that :func:`chebyshev_derivative` takes its values at, growing, both ends of the interval included.

    Args:
        n: how many, at least 2.
        interval: its lower and upper end.
        dtype: of the points.
        device: of the points.

    Returns:
        ``(n,)``.

    Raises:
        ValueError: n is less than 2, or the interval is empty.

    Example:
        >>> from difflayers.pde import chebyshev_points
        >>> chebyshev_points(5, (0.0, 1.0))
        tensor([0.0000, 0.1464, 0.5000, 0.8536, 1.0000], dtype=torch.float64)
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    lower, upper = _ends(interval)
    # The sine of an angle around zero keeps the points symmetric to the last digit, where a cosine would not.
    angle = math.pi / (2 * (n - 1)) * torch.arange(1 - n, n, 2, dtype=torch.float64)
    x = (lower + upper) / 2 + (upper - lower) / 2 * torch.sin(angle)
    x[0], x[-1] = lower, upper
    return x.to(device=device, dtype=dtype)


def chebyshev_derivative(u: Tensor, interval: tuple[float, float] = (-1.0, 1.0), *, dim: int = -1, order: int = 1) -> Tensor:
    """The derivative of the polynomial through values at :func:`chebyshev_points`.

    Exact for polynomials of a degree below n. The rounding error grows like n² for each order, most at the ends: take as few points as
    the function needs.

    Args:
        u: ``(..., n, ...)``, floating, with n of at least 2 along ``dim``.
        interval: its lower and upper end.
        dim: the dimension to differentiate along.
        order: of the derivative, at least 1.

    Returns:
        of the shape and dtype of u.

    Raises:
        ShapeError: u is not floating, or has no such dimension, or less than two points.
        ValueError: order is less than 1, or the interval is empty.

    Example:
        >>> from difflayers.pde import chebyshev_derivative, chebyshev_points
        >>> chebyshev_derivative(chebyshev_points(4, (0.0, 1.0)) ** 2, (0.0, 1.0))
        tensor([0.0000, 0.5000, 1.5000, 2.0000], dtype=torch.float64)
    """
    dim = check_values(u, dim, order)
    n = u.shape[dim]
    if n < 2:
        raise ShapeError(f"u of the shape {tuple(u.shape)} must have at least 2 points along dimension {dim}")
    lower, upper = _ends(interval)
    if u.numel() == 0:
        return u.clone()
    # Even around both ends, the values are a periodic function of the angle, and their Fourier coefficients those of T_k.
    values = u.movedim(dim, -1).flip(-1)
    scale = torch.full((n,), 2.0, dtype=u.dtype, device=u.device)
    scale[0] = scale[-1] = 1.0
    coefficients = torch.fft.rfft(torch.cat([values, values[..., 1:-1].flip(-1)], -1)).real * scale / (2 * n - 2)
    twice_k = 2.0 * torch.arange(n, dtype=u.dtype, device=u.device)
    for _ in range(order):
        coefficients = _lowered(twice_k * coefficients)
    cosines = coefficients / scale
    values = torch.fft.irfft(torch.complex(cosines, torch.zeros_like(cosines)), 2 * n - 2)[..., :n] * (2 * n - 2)
    return values.flip(-1).movedim(-1, dim) * (2 / (upper - lower)) ** order


def _lowered(terms: Tensor) -> Tensor:
    """b_k = Σ terms_j over j = k + 1, k + 3, …, and b₀ halved."""
    n = terms.shape[-1]
    # Two interleaved sums from the end: the rows are pairs, and n is made even.
    pairs = torch.nn.functional.pad(terms, (0, 1 + (n + 1) % 2)).unflatten(-1, (-1, 2))
    sums = pairs.flip(-2).cumsum(-2).flip(-2).flatten(-2)[..., 1 : n + 1]
    return torch.cat([sums[..., :1] / 2, sums[..., 1:]], -1)


def _ends(interval: tuple[float, float]) -> tuple[float, float]:
    lower, upper = interval
    if not (lower < upper and math.isfinite(upper - lower)):
        raise ValueError(f"interval must be (lower, upper) with lower < upper, got {interval}")
    return float(lower), float(upper)
