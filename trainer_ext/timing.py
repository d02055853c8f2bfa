"""Wall times, and methods timed width by width within a budget."""

from __future__ import annotations

import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

GROWTH = 10.0
"""Of a method's time per doubling of the width: 2^3, and a little for larger matrices."""


def now(device: torch.device) -> float:
    """Wall time after the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in time: of the wall clock, or in a CUDA stream."""


def mark(device: torch.device) -> Mark:
    """This point in time, without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Mark, end: Mark) -> float:
    """Between two marks; of a stream they must have been passed (``torch.cuda.synchronize``)."""
    if isinstance(start, float) and isinstance(end, float):
        return 1e3 * (end - start)
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)


@dataclass(kw_only=True)
class Cell(ABC):
    """One method at one width; a benchmark's own class keeps the times.

    Attributes:
        estimate_s: of one round, from the width before; none at the first width.
    """

    method: str
    width: int
    estimate_s: float | None

    @property
    @abstractmethod
    def rounds_s(self) -> Sequence[float]:
        """Seconds of each round so far; none where the estimate was above the budget."""

    def has_time(self, max_seconds: float) -> bool:
        """Whether one more round is expected to stay within the budget of a cell."""
        if self.rounds_s:
            return sum(self.rounds_s) + self.rounds_s[-1] <= max_seconds
        return self.estimate_s is None or self.estimate_s <= max_seconds

    def as_row(self) -> dict[str, Any]:
        """The cell in milliseconds, as plain data."""
        return {
            "method": self.method,
            "width": self.width,
            "left_out": not self.rounds_s,
            "estimate_ms": None if self.estimate_s is None else 1e3 * self.estimate_s,
        }


AnyCell = TypeVar("AnyCell", bound=Cell)


def time_cells(
    cell_type: type[AnyCell],
    methods: Sequence[str],
    widths: Iterable[int],
    time_row: Callable[[list[AnyCell]], None],
) -> list[AnyCell]:
    """All cells, width by width.

    Args:
        time_row: times the methods of one width in turn, as far as their cells have time.
    """
    cells: list[AnyCell] = []
    last: dict[str, AnyCell] = {}
    for width in sorted(set(widths)):
        row = [
            cell_type(method=method, width=width, estimate_s=estimate(last.get(method), width))
            for method in methods
        ]
        time_row(row)
        last |= {cell.method: cell for cell in row if cell.rounds_s}
        cells += row
        print(f"width {width} done", file=sys.stderr)
    return cells


def estimate(last: Cell | None, width: int) -> float | None:
    """Seconds of one round, from the last width at which the method ran."""
    if last is None:
        return None
    return statistics.median(last.rounds_s) * GROWTH ** math.log2(width / last.width)
