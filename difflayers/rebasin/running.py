"""Running a network on data: what a loader gives, once or again and again, and the mode of the network, which comes back."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["STATISTICS", "inputs", "kept_modes", "number", "repeated"]

# Buffers of normalization layers that are measured, not trained.
STATISTICS = ("running_mean", "running_var")


def inputs(loader: Iterable[Any]) -> Iterator[Any]:
    """The inputs of a network: the batches, or the first entry of those that are tuples or lists.

    Args:
        loader: of batches.

    Raises:
        ValueError: there is no batch.
    """
    batch = None
    for batch in loader:
        yield batch[0] if isinstance(batch, tuple | list) else batch
    if batch is None:
        raise ValueError("the loader gave no batch; an iterator can be read but once, pass a list or a DataLoader")


def repeated(batches: Iterable[Any] | None) -> Iterator[tuple[Any, ...]]:
    """Batches as tuples, without end; empty tuples for None.

    Args:
        batches: read again when it ends.

    Raises:
        ValueError: there is no batch.
    """
    while True:
        batch = None
        for batch in [()] if batches is None else batches:
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if batch is None:
            raise ValueError("batches gave nothing; an iterator can be read only once, pass a list or a DataLoader")


def number(value: float | Tensor) -> float:
    """A score as a float; NaN is worse than anything.

    Args:
        value: what is to be small.
    """
    return math.inf if math.isnan(float(value)) else float(value)


@contextmanager
def kept_modes(model: nn.Module) -> Generator[None]:
    """Every module is afterwards in the mode (training or evaluation) that it was in.

    Args:
        model: may be switched inside.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
