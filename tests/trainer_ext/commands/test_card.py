"""hf-precond card: a finished run in its model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.trainer_ext.commands.conftest import Command
from trainer_ext.training_card import reached_words

METRICS = {"eval_loss": 3.0, "eval_perplexity": 20.1, "train_step_ms": 12.34, "other": 1.0}


def run_folder(folder: Path, losses: list[float], metrics: dict[str, Any]) -> Path:
    folder.mkdir()
    history: list[dict[str, float]] = []
    for number, loss in enumerate(losses, start=1):
        history += [
            {"step": 100 * number, "loss": loss + 0.5},
            {"step": 100 * number, "eval_loss": loss},
        ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "all_results.json").write_text(json.dumps(metrics))
    text = "---\nlicense: mit\ntags:\n- mine\n---\n\n# A model\n\n## Optimizer\n\nours\n"
    (folder / "README.md").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", [5.0, 4.0, 3.0], METRICS)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "adamw", [5.5, 5.0, 4.5, 4.0], {"eval_loss": 4.0})


def test_curves_and_figures_come_into_the_card(run: Path, command: Command) -> None:
    shown = command("card", run)
    card = ModelCard.load(run / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["mine"]
    assert "## Optimizer" in card.text
    assert "![loss against step](training_curves.png)" in card.text
    assert "| validation loss | 3.0000 |" in card.text
    assert "| milliseconds of a training step | 12.3 |" in card.text
    assert "baseline" not in card.text
    assert (run / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "README.md") in shown


def test_a_baseline_stands_beside(
    run: Path, baseline: Path, as_json: Callable[..., Any], command: Command
) -> None:
    found = as_json("card", run, "--baseline", baseline)
    text = Path(found["card"]).read_text()
    assert "| | this run | baseline |" in text
    assert "| validation loss | 3.0000 | 4.0000 |" in text
    assert "| perplexity | 20.10 |  |" in text
    assert "loss of 4.0000 was reached after 200 steps, 50% of its own." in text
    command("card", run)
    again = (run / "README.md").read_text()
    assert again.count("## Training") == 1
    assert "50% of its own" not in again


def test_a_loss_that_is_not_reached_is_said() -> None:
    worse, better = {"eval_loss": [(1, 5.0)]}, {"eval_loss": [(1, 4.0)]}
    assert "of 4.0000 was not reached" in reached_words([worse, better])
    assert reached_words([worse]) == ""
    assert reached_words([worse, {"loss": [(1, 4.0)]}]) == ""


def test_other_folders_are_refused(run: Path, tmp_path: Path, error_of: Command) -> None:
    assert "has no README.md: trainer.create_model_card()" in error_of("card", tmp_path)
    assert "is no folder of a run" in error_of("card", run, "--baseline", tmp_path)
    (run / "trainer_state.json").write_text("{}")
    assert "is no folder of a run: trainer_state.json" in error_of("card", run)


def test_metadata_for_the_hub(run: Path, command: Command) -> None:
    options = "--license apache-2.0 --language en --dataset allenai/c4 --task text-generation"
    command(f"card {run} {options}")
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["allenai/c4"])
    assert data.pipeline_tag == "text-generation"
    assert data.metrics == ["loss", "perplexity"]
    assert data.tags == ["mine"]
    found = {result.metric_type: result for result in data.eval_results}
    assert found["perplexity"].metric_value == 20.1
    assert found["loss"].dataset_name == "allenai/c4"
    # A later call without options keeps what is there, and does not say it twice.
    command("card", run)
    again = ModelCard.load(run / "README.md").data
    assert again.to_dict() == data.to_dict()


def test_without_data_or_task_nothing_is_made_up(run: Path, command: Command) -> None:
    command("card", run)
    data = ModelCard.load(run / "README.md").data
    assert data.eval_results is None
    assert data.datasets is None
    assert data.license == "mit"
