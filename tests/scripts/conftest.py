"""Loads the scripts as modules: they are no package. What training scripts leave behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]

Train = Callable[..., dict[str, float]]
"""Runs a training script with options, and returns its metrics."""

QUIET: Mapping[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
    "save_strategy": "no",
}
RESULT_FILES = frozenset(
    {
        "README.md",
        "config.json",
        "model.safetensors",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
        "all_results.json",
    }
)


def load_script(name: str) -> ModuleType:
    """The module of scripts/NAME.py, loaded once; of a thin one that with the main program."""
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
    main = getattr(sys.modules[qualified], "main", None)
    return sys.modules[getattr(main, "__module__", qualified)]


# --- what training scripts leave ------------------------------------------------------------------


def names_in(output: Path) -> set[str]:
    """Names of the files and folders of a run."""
    return {path.name for path in output.iterdir()}


def losses_in(output: Path) -> list[float]:
    """The logged training losses of a run."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights_in(output: Path) -> dict[str, Tensor]:
    """The saved weights of a run."""
    return load_file(output / "model.safetensors")


def same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two runs have the same weights bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_refused(
    run: Callable[[], Any], capsys: pytest.CaptureFixture[str], message: str
) -> None:
    """Exit status 2, and the message in the last line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        run()
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert message in error[-1]
    assert ": error: " in error[-1]


# --- scripts --------------------------------------------------------------------------------------


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
