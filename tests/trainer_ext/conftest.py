"""Fixtures of the tests of the Trainer glue."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import trainer_ext


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Every test starts and ends with the optimizers registered."""
    trainer_ext.register()
    yield
    trainer_ext.register()


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The lines of the package logger, which does not propagate to the root."""
    logger = logging.getLogger("trainer_ext")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
