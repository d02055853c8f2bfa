"""Commands run in this process: a start of Python with torch and transformers takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_ext.tiny import tiny_gpt2, trainer
from trainer_ext import cli

Command = Callable[..., str]
"""Runs a command line and returns what it prints."""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(line: str, *arguments: object) -> str:
        capsys.readouterr()
        cli.main([*line.split(), *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def as_json(command: Command) -> Callable[..., Any]:
    """The same with --json, parsed."""
    return lambda line, *arguments: json.loads(command(line, *arguments, "--json"))


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Command:
    """The one line on stderr of a command that ends with exit status 2."""

    def run(line: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*line.split(), *map(str, arguments)])
        assert stop.value.code == 2
        (error,) = capsys.readouterr().err.splitlines()
        return error

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny autoencoder of drawn images."""
    content = {
        "preset": "tiny",
        "config_overrides": "hidden_sizes=[8,4]",
        "image_size": 8,
        "max_train_samples": 40,
        "max_eval_samples": 10,
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "optim": "two_sided_basis",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the tiny GPT-2 that the runs train."""
    folder = tmp_path_factory.mktemp("model")
    config = {**tiny_gpt2().config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at step 3 of a run of the Trainer."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=3, weight_decay=0.1).train()
    return folder / "checkpoint-3"
