"""Which optimizers stand for others where a test costs much: the rest runs with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# Mostly another one's code, with other options: that of shared_basis_adagrad, rs_kfac, b_kfac (two
# of them), adadiag and adafacdiag.
RELATIVES = frozenset(
    ("shared_basis_adam", "sre_kfac", "b_r_kfac", "b_kfac_c", "adadiag_pp", "adafacdiag_pp")
)


def slow_for_relatives(names: Iterable[str]) -> list[Any]:
    """Test parameters: all names, those of relatives slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in RELATIVES else ()) for name in names
    ]


def alternating(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Test parameters: all pairs. The second takes turns with the first; other pairs are slow."""
    others = list(second)
    return [
        pytest.param(one, other, marks=pytest.mark.slow if (row + column) % len(others) else ())
        for row, one in enumerate(first)
        for column, other in enumerate(others)
    ]
