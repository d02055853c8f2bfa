"""Cheap figures about a run, gathered without a host sync and read at logging steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor


class Health:
    """Means of observed tensors, counts of events and the time of steps since the last reading."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def observe(self, name: str, values: Tensor) -> None:
        """Adds a tensor to the mean of a figure; stays on its device."""
        self._sums[name].append(values.detach().float().mean())

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
        self._seconds.append(perf_counter() - start)

    def take(self) -> dict[str, float]:
        """Returns all figures and starts anew."""
        figures = {name: float(torch.stack(sums).mean()) for name, sums in self._sums.items()}
        figures |= {
            name: float(self._counts[name]) for name in ("skipped_nonfinite", "failed_updates")
        }
        milliseconds = [1e3 * seconds for seconds in self._seconds]
        if self._events:
            torch.cuda.synchronize()
            milliseconds += [begin.elapsed_time(end) for begin, end in self._events]
        if milliseconds:
            figures["step_ms"] = sum(milliseconds) / len(milliseconds)
        self.__init__()  # type: ignore[misc]
        return figures
