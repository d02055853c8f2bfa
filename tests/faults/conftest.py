"""Fixtures of the fault tests: every registered name, and solvers that fail when told to."""

from __future__ import annotations

import pytest

from hf_precond import list_optimizers
from tests.faults.solvers import Solvers


@pytest.fixture(params=list_optimizers())
def name(request: pytest.FixtureRequest) -> str:
    """A registered name; none is exempt."""
    return request.param


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> Solvers:
    """The solvers of ``torch.linalg``, to be broken."""
    return Solvers(monkeypatch)
