"""The ranks that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes at most, started with the first scenario."""
    pool = Ranks()
    yield pool
    pool.close()
