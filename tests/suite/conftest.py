"""Every law runs on every row of the registry, unless the row says in writing why not."""

from __future__ import annotations

import pytest

from hf_precond import list_optimizers, optimizer_info


@pytest.fixture(params=list_optimizers())
def name(request: pytest.FixtureRequest) -> str:
    """A registered name. A law is exempt under its test's name without ``test_``."""
    law = request.node.originalname.removeprefix("test_")
    reason = optimizer_info(request.param).exemptions.get(law)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
