"""The solvers of ``torch.linalg``, counted and broken on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch

RAISING = ("eigh", "eigvalsh", "qr", "svd", "svdvals", "cholesky", "solve", "inv", "lstsq", "pinv")
# These report in a tensor of numbers, zero for matrices that went well.
REPORTING = ("cholesky_ex", "solve_ex", "inv_ex")


class Solvers:
    """Stands in for all solvers of ``torch.linalg`` while a test runs.

    Attributes:
        calls: calls of each solver since the last :meth:`mend`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self._broken: tuple[str, ...] = ()
        self._left = 0.0
        for solver in (*RAISING, *REPORTING):
            monkeypatch.setattr(torch.linalg, solver, self._standing_in_for(solver))

    def fail(self, *solvers: str, times: float = inf) -> None:
        """Lets the next calls of some solvers fail, of all where none is named."""
        self._broken, self._left = solvers or (*RAISING, *REPORTING), times

    def mend(self) -> None:
        """Lets all solvers work again."""
        self._left = 0
        self.calls.clear()

    def _standing_in_for(self, solver: str) -> Callable[..., Any]:
        real = getattr(torch.linalg, solver)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            self.calls[solver] += 1
            if solver not in self._broken or self._left <= 0:
                return real(*args, **kwargs)
            self._left -= 1
            if solver in REPORTING:
                result = real(*args, **kwargs)
                result.info.fill_(1)
                return result
            raise torch.linalg.LinAlgError("did not converge")

        return stand_in
