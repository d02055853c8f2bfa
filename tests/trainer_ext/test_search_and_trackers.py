"""The Trainer's hyperparameter search and its trackers with our optimizers."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

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


def test_health_is_in_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: runs lie in a database below TRACKIO_DIR."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    changes = {"optim": "two_sided_basis", "optim_args": "rank=4", "save_strategy": "no"}
    Trainer(
        tiny_gpt2(),
        arguments(tmp_path, **changes, report_to=["trackio"], project="health", run_name="tiny"),
        train_dataset=token_blocks(),
    ).train()
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    text = " ".join(str(row) for row in rows)
    assert "optim_escaped_mass_share" in text
    assert len(rows) >= 3
