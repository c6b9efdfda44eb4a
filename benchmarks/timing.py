"""Contestants side by side in one process: they run in turn, round after round, and medians are compared.

A machine drifts: its clock, its caches, its other users. A drift hits every contestant of a round alike, so the median of the
ratios within each round says more than any single time, and it is the ratio that the tables print. Every second round runs in reverse
order, because whoever follows a large contestant finds cold caches. What is measured is the processor time of this process: with one
thread that is the time on a quiet machine, and on a busy one it leaves out the waiting.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Race", "Table", "describe_machine", "installed", "one_thread", "peak_memory", "race"]

Run = Callable[[], Any]
# What is prepared anew before each run is not timed: ``(prepare, run)`` calls ``run(prepare())``.
Contestant = Run | tuple[Run, Callable[[Any], Any]]

_SHORTEST = 2e-3  # a run that takes less is repeated until it takes about this long: the clock and the loop around it cost microseconds


@dataclass(frozen=True)
class Race:
    """The seconds of each contestant, one entry a round."""

    samples: Mapping[str, Sequence[float]]

    def seconds(self, name: str) -> float:
        """The median time of one run."""
        return statistics.median(self.samples[name])

    def ratio(self, name: str, base: str) -> float:
        """How many times as long as ``base`` one run takes: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.samples[name], self.samples[base], strict=True))


def race(contestants: Mapping[str, Contestant], *, budget: float = 2.0, rounds: tuple[int, int] = (3, 50)) -> Race:
    """Time every contestant, interleaved, after a warm-up.

    Args:
        contestants: by name; a callable, or ``(prepare, run)``.
        budget: seconds for all contestants together, after which no new round begins.
        rounds: the fewest and the most rounds, whatever the budget.
    """
    pairs = {name: each if isinstance(each, tuple) else (None, each) for name, each in contestants.items()}
    repeats = {}
    for name, (prepare, run) in pairs.items():
        once = _timed(prepare, run, 1)
        if once < 0.1:  # the first call of all pays for imports and caches
            once = _timed(prepare, run, 1)
        repeats[name] = min(max(round(_SHORTEST / once), 1), 200)
    samples: dict[str, list[float]] = {name: [] for name in pairs}
    gc.collect()
    begin = time.perf_counter()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() - begin > budget:
            break
        for name in list(pairs)[:: -1 if turn % 2 else 1]:
            samples[name].append(_timed(*pairs[name], repeats[name]))
    return Race(samples)


def _timed(prepare: Run | None, run: Callable[..., Any], repeats: int) -> float:
    inputs = [() if prepare is None else (prepare(),) for _ in range(repeats)]
    begin = time.process_time()
    for arguments in inputs:
        run(*arguments)
    return (time.process_time() - begin) / repeats


def peak_memory(run: Run) -> int:
    """The most bytes that torch's allocator held at once while ``run`` ran, above what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class Table:
    """Rows that are printed as they come: ``Table("title", [("case", 24), ("ours ms", -9)])``; a negative width aligns to the right."""

    def __init__(self, title: str, columns: Sequence[tuple[str, int]]) -> None:
        self.widths = [width for _, width in columns]
        print(f"\n{title}\n")
        self.row(*(heading for heading, _ in columns))
        self.row(*("-" * abs(width) for width in self.widths))

    def row(self, *cells: object) -> None:
        """One row; floats are shown with three digits, None as a dash."""
        texts = [_show(cell) for cell in cells]
        shown = [text.rjust(-width) if width < 0 else text.ljust(width) for text, width in zip(texts, self.widths, strict=False)]
        print("  ".join(shown).rstrip(), flush=True)


def _show(cell: object) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if cell == 0 or 1e-2 <= abs(cell) < 1e4 else f"{cell:.0e}"


def installed(package: str) -> bool:
    """Whether a peer is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def one_thread() -> None:
    """One thread for torch: with more, small batched LAPACK measures the scheduler."""
    torch.set_num_threads(1)


def describe_machine(packages: Sequence[str]) -> None:
    """Print what the figures below depend on."""
    versions = [f"{name} {importlib.metadata.version(name)}" if installed(name) else f"{name} not installed" for name in packages]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {', '.join(versions)}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread, load {load:.1f}")
    if load > 1.3:
        print("The machine is busy: trust the ratios, not the times.")
