"""scripts/chaos.py: what counts as a difference, and that kills make none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scripts.conftest import REPOSITORY, load_script
from tests.trainer_ext.tiny import trainer
from trainer_ext.checkpoint import load_optimizer, save_optimizer


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    """scripts/chaos.py"""
    return load_script("chaos")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer with a checkpoint of step 3."""
    run = trainer(tmp_path_factory.mktemp("run"), logging_steps=1, max_steps=3)
    run.train()
    return run


def change_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][3] += 1e-7
    save_file(weights, folder / "model.safetensors")


def change_schedule(folder: Path) -> None:
    torch.save({"last_epoch": 7}, folder / "scheduler.pt")


def change_losses(folder: Path) -> None:
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["loss"] += 1e-3
    path.write_text(json.dumps(state))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weight": (change_weight, "weight transformer.ln_f.bias"),
    "schedule": (change_schedule, "scheduler.pt"),
    "losses": (change_losses, "the logged losses"),
    "random state": (lambda folder: torch.save({}, folder / "rng_state.pth"), "rng_state.pth"),
    "half": (
        lambda folder: (folder / "trainer_state.json").unlink(),
        "checkpoint-3 is not complete: trainer_state.json, which is written last, is missing",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_difference_is_named(
    case: str, chaos: ModuleType, saved: Any, tmp_path: Path
) -> None:
    expected = Path(saved.args.output_dir) / "checkpoint-3"
    found = shutil.copytree(expected, tmp_path / "checkpoint-3")
    assert chaos.differences(expected, found) == []
    change, message = CHANGES[case]
    change(found)
    assert chaos.differences(expected, found) == [message]


def test_a_different_optimizer_state_is_named(
    chaos: ModuleType, saved: Any, tmp_path: Path
) -> None:
    expected = Path(saved.args.output_dir) / "checkpoint-3"
    found = shutil.copytree(expected, tmp_path / "checkpoint-3")
    optimizer = saved.optimizer.optimizer
    load_optimizer(optimizer, expected)
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["step"] += 1
    optimizer.param_groups[0]["lr"] = 0.7
    save_optimizer(optimizer, found)
    name = f"state.{optimizer.param_names[0]}.step"
    assert chaos.differences(expected, found) == [name, "the header of the optimizer's state"]


def test_steps_and_checkpoints_must_agree(
    chaos: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        chaos.main(["--steps", "5", "--save_steps", "2"])
    assert "--steps 5 must be a multiple of --save_steps 2" in capsys.readouterr().err


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own: it forks, which a process that has trained must not."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "chaos.py"), "--quiet", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_fails_is_a_difference(tmp_path: Path) -> None:
    done = run_script("--optim_args", "rank=0", "--output_dir", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert "uninterrupted ended with exit status 1" in done.stdout
    assert "rank = 0 is not allowed" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "half_written"), [(2, 0), (20, 3)])
def test_kills_make_no_difference(kills: int, half_written: int, tmp_path: Path) -> None:
    """At random instants of real runs; half-written checkpoints are named and passed over."""
    work = tmp_path / "runs"
    done = run_script("--kills", str(kills), "--output_dir", str(work))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all chains equal the uninterrupted run bit for bit" in done.stdout
    found = re.search(
        rf"{kills} kills in \d+ chains, (\d+) of them left a half-written", done.stdout
    )
    assert found is not None
    assert int(found[1]) >= half_written
    if not int(found[1]):
        return
    logs = "".join(path.read_text() for path in work.glob("chain*.log"))
    assert "IS NOT A COMPLETE CHECKPOINT and is passed over: trainer_state.json" in logs
