"""Running a network on data without leaving a trace: its mode comes back, and a loader may give labels too."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["inputs", "kept_modes"]


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
