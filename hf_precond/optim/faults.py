"""Counting what was left out: parameters whose gradient or factorisation was no good."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from hf_precond.optim.health import Health

logger = logging.getLogger(__name__)


class Faults:
    """Counts faults per parameter and raises when one has had too many in a row.

    Args:
        names: names of all parameters.
        limit: faults of one kind and parameter in a row that raise.
        health: where faults are counted for the logs.
    """

    def __init__(self, names: Sequence[str], limit: int, health: Health) -> None:
        self._names = names
        self._limit = limit
        self._health = health
        self._streaks: dict[tuple[str, int], int] = {}

    def count(
        self, params: Iterable[int], figure: str, what: str, error: type[ArithmeticError]
    ) -> None:
        """Counts a fault of some parameters under the figure's name and logs it.

        Raises:
            ArithmeticError: the given ``error`` when a parameter's streak reaches the limit.
        """
        for index in params:
            self._health.count(figure)
            streak = self._streaks[figure, index] = self._streaks.get((figure, index), 0) + 1
            logger.warning("%s: %s (%d in a row)", self._names[index], what, streak)
            if streak >= self._limit:
                raise error(
                    f"{self._names[index]!r}: {what}, {streak} in a row "
                    f"(max_failures = {self._limit})"
                )

    def clear(self, params: Iterable[int], figure: str) -> None:
        """Ends the streaks of parameters that went well."""
        if self._streaks:
            for index in params:
                self._streaks.pop((figure, index), None)
