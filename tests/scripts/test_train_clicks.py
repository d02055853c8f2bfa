"""scripts/train_clicks.py on made-up rows, and its metric."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.scripts.conftest import (
    QUIET,
    Train,
    assert_refused,
    load_script,
    losses_in,
    same_weights,
    weights_in,
)
from trainer_ext.data.clicks import (
    CATEGORIES,
    COUNTS,
    AreaUnderCurve,
    ClicksConfig,
    ClicksDataset,
    ClicksModel,
)


def rows(count: int) -> str:
    """Clicks wherever the first category is `a`; some cells are empty."""
    generator = np.random.default_rng(0)
    lines = [",".join(["Id", "Label", *COUNTS, *CATEGORIES])]
    for number in range(count):
        click = generator.random() < 0.4
        counts = ["", "-1", *generator.integers(0, 50, 11).astype(str)]
        categories = ["a" if click else "b", "", *generator.choice(list("xyz"), 24)]
        lines.append(",".join([str(number), str(int(click)), *counts, *categories]))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def train_clicks() -> ModuleType:
    """scripts/train_clicks.py"""
    return load_script("train_clicks")


@pytest.fixture
def train(train_clicks: ModuleType, tmp_path: Path) -> Train:
    """Runs the script in this process with tiny defaults."""
    (tmp_path / "rows.csv").write_text(rows(200))

    def run(**options: Any) -> dict[str, float]:
        merged = {
            **QUIET,
            "config_overrides": "num_buckets=20,embedding_size=4,hidden_sizes=[16]",
            "train_file": tmp_path / "rows.csv",
            "per_device_train_batch_size": 20,
            "learning_rate": 1e-2,
            "output_dir": tmp_path / "out",
            **options,
        }
        return train_clicks.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


@pytest.mark.parametrize("optim", ["adamw_torch", "ng_plus", "shared_basis_adam"])
def test_run_learns(train: Train, tmp_path: Path, optim: str) -> None:
    metrics = train(max_steps=40, optim=optim)
    losses = losses_in(tmp_path / "out")
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["eval_auc"] > 0.95


def test_it_resumes(train: Train, tmp_path: Path) -> None:
    saving = {"optim": "ng_plus", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(**saving)
    whole = weights_in(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    train(**saving, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert same_weights(whole, weights_in(tmp_path / "resumed"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "resumed")
    assert isinstance(again, ClicksModel)


def test_cells_become_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(rows(3))
    row = ClicksDataset(tmp_path / "rows.csv")[0]
    assert row["counts"][:2].tolist() == [0, 0]
    assert row["categories"][1] == 0  # CRC-32 of nothing
    assert len(row["categories"]) == 26


def test_categories_do_not_share_rows() -> None:
    torch.manual_seed(0)
    model = ClicksModel(ClicksConfig(num_buckets=5, embedding_size=2, hidden_sizes=[16]))
    model(torch.full((1, 26), 7), torch.zeros(1, 13), torch.ones(1)).loss.backward()
    used = model.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [5 * index + 2 for index in range(26)]


def test_area_is_the_share_of_ordered_pairs() -> None:
    generator = np.random.default_rng(1)
    scores, labels = generator.integers(0, 6, 60) / 2, generator.integers(0, 2, 60)
    pairs = [(s > t) + 0.5 * (s == t) for s in scores[labels == 1] for t in scores[labels == 0]]
    metric = AreaUnderCurve(keep_in_memory=True)
    metric.add_batch(predictions=scores, references=labels)
    assert metric.compute()["auc"] == pytest.approx(np.mean(pairs))
    metric.add_batch(predictions=[0.1, 0.2], references=[1, 1])
    assert np.isnan(metric.compute()["auc"])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {"train_file": None}, "train_file is needed"),
        ("Id,Label\n1,0\n", {}, "has no column C1, C10"),
        (rows(2).replace("\n0,", "\n0,2"), {}, "must be 0 or 1"),
        (rows(0), {}, "holds no row"),
        (rows(1), {}, "has too few rows to hold some out: 1"),
        (rows(3) + "\n3,1,5", {}, "line 5 of"),
        (rows(3).replace(",-1,", ",x,"), {}, "could not convert string to float: 'x'"),
        (None, {"preset": "large"}, "preset='large' must be one of small"),
        (None, {"validation_split_percentage": 0}, "must be in 1..99"),
    ],
)
def test_mistakes_take_one_line(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    options: dict[str, Any],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)
    assert_refused(lambda: train(**options), capsys, message)
