"""The Trainer's hyperparameter search and its trackers with our optimizers."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.trainer_ext.tiny import arguments, tiny_gpt2, token_blocks
from trainer_ext import PrecondTrainer, PrecondTrainingArguments


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Fields of TrainingArguments, as the search sets them."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
        "optim_args": trial.suggest_categorical("optim_args", ["rank=2", "rank=4"]),
    }


def test_hyperparameter_search_over_options(tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks: list[int] = []

    class Watched(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            ranks.append(optimizer.recipe.algorithm.rank)
            return optimizer

    trainer = Watched(
        args=arguments(tmp_path, optim="two_sided_basis", optim_args=None, save_strategy="no"),
        model_init=lambda: tiny_gpt2(),
        train_dataset=token_blocks(),
        eval_dataset=token_blocks(8),
    )
    sampler = optuna.samplers.GridSampler(
        {"learning_rate": [1e-3, 1e-2], "optim_args": ["rank=2", "rank=4"]}
    )
    best = trainer.hyperparameter_search(
        space, n_trials=4, direction="minimize", backend="optuna", sampler=sampler
    )
    assert sorted(ranks) == [2, 2, 4, 4]
    assert best.hyperparameters["learning_rate"] == 1e-2
    assert best.objective < 4


def test_hyperparameter_search_over_a_mapping_of_options(tmp_path: Path) -> None:
    """PrecondTrainingArguments takes numbers as numbers."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer = PrecondTrainer(
        args=arguments(
            tmp_path,
            PrecondTrainingArguments,
            optim="two_sided_basis",
            optim_args=None,
            save_strategy="no",
        ),
        model_init=lambda: tiny_gpt2(),
        train_dataset=token_blocks(),
        eval_dataset=token_blocks(8),
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"optim_args": f"rank={trial.suggest_int('rank', 1, 8)}"},
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert 1 <= best.hyperparameters["rank"] <= 8


def test_a_wrong_option_ends_the_search_with_its_own_error(tmp_path: Path) -> None:
    trainer = Trainer(
        args=arguments(tmp_path, optim="two_sided_basis", optim_args=None, save_strategy="no"),
        model_init=lambda: tiny_gpt2(),
        train_dataset=token_blocks(),
        eval_dataset=token_blocks(8),
    )
    with pytest.raises(ValueError, match="rank = 0 is not allowed"):
        trainer.hyperparameter_search(
            lambda trial: {"optim_args": "rank=0"},
            n_trials=1,
            direction="minimize",
            backend="optuna",
        )


class Watched(Trainer):
    """Remembers what every trial was built from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.names: list[str] = []
        self.hooks: list[int] = []
        self.models: list[weakref.ref[nn.Module]] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        self.names.append(getattr(optimizer, "algorithm_name", type(optimizer).__name__))
        self.hooks.append(sum(len(module._forward_hooks) for module in self.model.modules()))
        self.models.append(weakref.ref(self.model))
        return optimizer


def watched(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Watched:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return Watched(
        args=arguments(folder, kind, **{"optim_args": None, **changes}),
        model_init=lambda: tiny_gpt2(),
        train_dataset=token_blocks(),
        eval_dataset=token_blocks(8),
    )


@pytest.mark.parametrize(
    "kind", [pytest.param(TrainingArguments, marks=pytest.mark.slow), PrecondTrainingArguments]
)
def test_the_optimizer_itself_may_be_searched(kind: type, tmp_path: Path) -> None:
    """Ours and transformers', each with hooks of its own only, and gone with its trial."""
    names = ["two_sided_basis", "kfac", "adamw_torch"]
    trainer = watched(tmp_path, kind, save_strategy="no")
    best = trainer.hyperparameter_search(
        lambda trial: {"optim": trial.suggest_categorical("optim", names)},
        n_trials=3,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"optim": names}),
    )
    assert best.hyperparameters["optim"] in names
    assert sorted(trainer.names) == ["AdamW", "kfac", "two_sided_basis"]
    assert [hooks > 0 for hooks in trainer.hooks] == [name == "kfac" for name in trainer.names]
    gc.collect()
    assert [model() is not None for model in trainer.models] == [False, False, True]


def test_trials_that_are_pruned_and_those_that_save(tmp_path: Path) -> None:
    """A pruned trial ends in the middle; the best one's checkpoint goes on as any other."""
    trainer = watched(tmp_path, optim="kfac", eval_strategy="steps", eval_steps=3)
    rates = [1e-2, 1e-6]
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
        pruner=optuna.pruners.ThresholdPruner(upper=3.245),
    )
    assert best.hyperparameters == {"learning_rate": 1e-2}
    saved = tmp_path / f"run-{best.run_id}" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    states = {path.parts[-2] for path in tmp_path.glob("run-*/checkpoint-6")}
    assert states == {f"run-{best.run_id}"}
    again = watched(tmp_path / "again", optim="kfac", learning_rate=1e-2)
    again.train(resume_from_checkpoint=str(saved))
    finished = load_file(tmp_path / f"run-{best.run_id}" / "checkpoint-6" / "model.safetensors")
    weights = again.model.state_dict()
    assert all(torch.equal(weights[name], finished[name]) for name in finished)


def test_health_is_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    changes = {"optim": "two_sided_basis", "optim_args": "rank=4", "save_strategy": "no"}
    Trainer(
        tiny_gpt2(),
        arguments(tmp_path, **changes, report_to=["tensorboard"]),
        train_dataset=token_blocks(),
    ).train()
    (events,) = (tmp_path / "board").rglob("events.*")
    board = EventAccumulator(str(events)).Reload()
    shares = board.Scalars("train/optim_escaped_mass_share")
    assert [event.step for event in shares] == [2, 4, 6]
    assert all(0 < event.value < 1 for event in shares)
    assert board.Scalars("train/loss")[-1].value > 0


def test_health_is_in_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline: runs lie in a database below TRACKIO_DIR; no server is asked or left behind."""
    # Read where trackio is first imported, which this test does.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"not offline: {args}")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "bind"), (os, "fork")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    threads = set(threading.enumerate())
    changes = {"optim": "two_sided_basis", "optim_args": "rank=4", "save_strategy": "no"}
    Trainer(
        tiny_gpt2(),
        arguments(tmp_path, **changes, report_to=["trackio"], project="health", run_name="tiny"),
        train_dataset=token_blocks(),
    ).train()
    assert {thread.name for thread in threading.enumerate() if thread not in threads} == set()
    assert list((tmp_path / "trackio").glob("health*.db"))

    from trackio import cli

    values = {}
    for figure in ("escaped_mass_share", "skipped_nonfinite", "step_ms"):
        line = (
            f"trackio get metric --project health --run tiny --json --metric train/optim_{figure}"
        )
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", line.split())
        cli.main()
        shown = json.loads(capsys.readouterr().out)
        values[figure] = [entry["value"] for entry in shown["values"]]
    assert all(0 < value < 1 for value in values["escaped_mass_share"])
    assert values["skipped_nonfinite"] == [0, 0, 0]
    assert len(values["step_ms"]) == 3
