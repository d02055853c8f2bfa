"""Cheap figures about a run, gathered without a host sync and read at logging steps."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

# Pairs of device events kept for the mean step time; older ones are dropped.
_MAX_EVENTS = 100


class Health:
    """Means of observed tensors, counts of events and the time of steps since the last reading."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._observed: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_MAX_EVENTS)

    def observe(self, name: str, values: Tensor) -> None:
        """Adds a tensor to the mean of a figure; stays on its device."""
        mean = values.detach().float().mean()
        self._sums[name] = self._sums[name] + mean if name in self._sums else mean
        self._observed[name] += 1

    def count(self, name: str) -> None:
        """Counts one event."""
        self._counts[name] += 1

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Times one step: device time on CUDA, wall time elsewhere."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = perf_counter()
        yield
        self._seconds += perf_counter() - start
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Returns all figures and starts anew."""
        figures = {name: float(total) / self._observed[name] for name, total in self._sums.items()}
        for name in ("skipped_nonfinite", "failed_updates", "missing_columns"):
            figures[name] = float(self._counts[name])
        if self._events:
            self._events[-1][1].synchronize()
            times = [begin.elapsed_time(end) for begin, end in self._events]
            figures["step_ms"] = sum(times) / len(times)
        elif self._steps:
            figures["step_ms"] = 1e3 * self._seconds / self._steps
        self.__init__()  # type: ignore[misc]
        return figures
