"""Fixtures and settings of all tests: one thread, one seed, no network."""

from __future__ import annotations

import os

# Set before the Hugging Face libraries read them. A test that forgets to bring its own data must
# fail here too and not only on a machine without network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

SEED = 1234


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several test processes share the cores; sums also stay the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own, which library calls cannot advance."""
    return torch.Generator().manual_seed(SEED)
