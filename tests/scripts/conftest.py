"""Loads the scripts as modules: they are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    """The module of scripts/NAME.py, loaded once."""
    qualified = f"hf_precond_script_{name}"
    if qualified not in sys.modules:
        path = REPOSITORY / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while it is executed.
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def train_lm() -> ModuleType:
    """scripts/train_lm.py"""
    return load_script("train_lm")


@pytest.fixture(scope="session")
def sweep() -> ModuleType:
    """scripts/sweep.py"""
    return load_script("sweep")


@pytest.fixture(scope="session")
def plot_results() -> ModuleType:
    """scripts/plot_results.py"""
    return load_script("plot_results")


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    """scripts/bench_step.py"""
    return load_script("bench_step")
