"""Hyperparameters that change along a run, written as text.

    0.16                              constant
    0.16*0.8^(epoch/10)               exponential: times 0.8 every ten epochs, smoothly
    0.1/0.05@epoch25/0.01@step9000    table: 0.05 from epoch 25 on, 0.01 from step 9000 on

Slashes separate, as in every list of ``optim_args``; a YAML list of the entries says the same.
Steps count from 1. The epoch is (step - 1) / steps_per_epoch, a fraction inside an epoch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONSTANT = re.compile(_NUMBER)
_EXPONENTIAL = re.compile(
    rf"(?P<initial>{_NUMBER})\*(?P<factor>{_NUMBER})\^\((?P<unit>step|epoch)/(?P<period>{_NUMBER})\)"
)
_ENTRY = re.compile(rf"(?P<value>{_NUMBER})@(?P<unit>step|epoch)(?P<start>{_NUMBER})")
FORMS = "a number, VALUE*FACTOR^(epoch/PERIOD) or VALUE/VALUE@epochN/VALUE@stepN"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number as a function of step and epoch; :meth:`parse` makes one.

    Attributes:
        text: what it was parsed from.
        initial: its first value.
        factor: what it is multiplied with every ``period`` of ``unit``.
        table: (unit, start, value): the value from that step or epoch on; the last that has begun
            counts.
    """

    text: str
    initial: float
    factor: float = 1.0
    unit: str = "step"
    period: float = 1.0
    table: tuple[tuple[str, float, float], ...] = ()

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """Returns the schedule that a number, a text or a list of table entries describes.

        >>> Schedule.parse("0.1/0.05@epoch25").at(step=1, epoch=lambda: 30.0)
        0.05

        Raises:
            ValueError: if it is none of the three forms, or a factor, period or start is not
                positive and finite.
        """
        if isinstance(value, Schedule):
            return value
        parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        text = "/".join(str(part).replace(" ", "") for part in parts)
        if match := _EXPONENTIAL.fullmatch(text):
            factor, period = float(match["factor"]), float(match["period"])
            if 0 < factor < inf and 0 < period < inf:
                return cls(text, float(match["initial"]), factor, match["unit"], period)
        elif not isinstance(value, bool):
            first, *rest = text.split("/")
            entries = [_ENTRY.fullmatch(part) for part in rest]
            if _CONSTANT.fullmatch(first) and all(entries):
                table = tuple(
                    (entry["unit"], float(entry["start"]), float(entry["value"]))
                    for entry in entries
                    if entry
                )
                if all(0 <= start < inf for _, start, _ in table):
                    return cls(text, float(first), table=table)
        raise ValueError(f"{value!r} is not a schedule: it must be {FORMS}")

    @property
    def values(self) -> tuple[float, ...]:
        """All values it names; an exponential lies between its first value and zero or infinity."""
        return (self.initial, *(value for _, _, value in self.table))

    def at(self, step: int, epoch: Callable[[], float]) -> float:
        """Returns the value at a step.

        Args:
            step: 1 for the first.
            epoch: asked only where the schedule speaks of epochs.

        Raises:
            ValueError: if an exponential has grown out of the range of numbers.
        """
        if self.factor != 1.0:
            passed = epoch() if self.unit == "epoch" else step - 1
            try:
                return float(self.initial * self.factor ** (passed / self.period))
            except OverflowError:
                raise ValueError(f"schedule {self.text!r} is out of range at step {step}") from None
        value = self.initial
        for unit, start, later in self.table:
            if (epoch() if unit == "epoch" else step) >= start:
                value = later
        return value

    def __str__(self) -> str:
        return self.text
