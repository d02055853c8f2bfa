"""hf-precond diagnose."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.trainer_ext.commands.conftest import Command
from trainer_ext import callbacks, cli

SCRIPT = """
import sys
from pathlib import Path
from tests.trainer_ext.tiny import trainer
run = trainer(Path(sys.argv[1]), optim="adamw_torch", optim_args=None)
run.train()
run.save_model()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training script that knows nothing of this project."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return path


def test_a_script_is_diagnosed_and_saves_nothing(script: Path, tmp_path: Path) -> None:
    report, out = tmp_path / "report", tmp_path / "out"
    line = ["diagnose", "--output", report, "--steps", 3, "--start", 1, "--layers", "*.mlp.*"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, line), str(script), str(out)])
    assert stop.value.code == 0
    (look,) = json.loads((report / "findings.json").read_text())["looks"]
    assert look["first_step"] == 2
    assert {kernel["name"].split(".")[3] for kernel in look["kernels"]} == {"mlp"}
    assert (report / "index.html").is_file()
    assert not list(out.rglob("*.safetensors"))
    assert callbacks.FOR_EVERY_TRAINER == []


def test_a_configuration_is_diagnosed_in_its_own_folder(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["diagnose", "--steps", "3", "--task", "autoencoder", str(config)])
    found = json.loads((tmp_path / "out" / "diagnostics" / "findings.json").read_text())
    assert len(found["looks"][0]["kernels"]) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diagnostics"]


def test_mistakes_take_one_line(
    error_of: Command, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no script 'none.py'" in error_of("diagnose none.py")
    assert "there is no configuration 'none.yaml'" in error_of("diagnose none.yaml")
    assert "steps=1 must be at least 2" in error_of("diagnose --steps 1", script)
    monkeypatch.setattr("trainer_ext.commands.diagnose.find_spec", lambda name: None)
    assert "diagnose needs the package 'matplotlib'" in error_of("diagnose", script)
