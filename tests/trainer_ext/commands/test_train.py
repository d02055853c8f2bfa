"""hf-precond train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer_ext.commands.conftest import Command
from trainer_ext import cli
from trainer_ext.commands.train import TASKS


def test_a_task_is_trained_with_changes(config: Path, tmp_path: Path) -> None:
    cli.main(["train", "--task", "autoencoder", str(config), "--max_steps", "2"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_task_has_its_script() -> None:
    scripts = Path(__file__).resolve().parents[3] / "scripts"
    programs = {path.read_text() for path in scripts.glob("train_*.py")}
    assert len(programs) == len(TASKS)
    for task in TASKS:
        assert any(f"from trainer_ext.tasks.{task} import main" in text for text in programs)


def test_mistakes_take_one_line(error_of: Command, config: Path) -> None:
    assert "there is no configuration 'none.yaml'" in error_of("train none.yaml")
    wrong = error_of("train --task autoencode", config)
    assert "must be one of language_model" in wrong
    assert "Did you mean 'autoencoder'" in wrong


def test_mistakes_of_the_task_are_the_task_s(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--task", "autoencoder", str(config), "--preset", "huge"])
    assert stop.value.code == 2
    assert "preset='huge' must be one of" in capsys.readouterr().err.splitlines()[-1]


def test_missing_packages_are_named(
    error_of: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="datasets")

    monkeypatch.setattr("importlib.import_module", missing)
    assert "needs the package 'datasets': pip install" in error_of("train", config)
