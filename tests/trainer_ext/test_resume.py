"""Resuming in the Trainer: bit for bit, or with a loud warning."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState

import trainer_ext
from tests.trainer_ext.tiny import NAME, same_weights, tiny_gpt2, trainer
from trainer_ext import checkpoint
from trainer_ext.checkpoint import DamagedCheckpointError
from trainer_ext.resume import ResumeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAVED = {
    "model.safetensors",
    "optimizer.safetensors",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "README.md",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trainer]:
    """An uninterrupted run of six steps in each dtype, saved at step 3."""
    trainer_ext.register()
    runs = {}
    for label, dtype in DTYPES.items():
        run = trainer(tmp_path_factory.mktemp(label), tiny_gpt2(dtype))
        run.train()
        runs[label] = run
    return runs


@pytest.fixture
def folder(finished: dict[str, Trainer], tmp_path: Path) -> Path:
    """A copy of the fp32 checkpoint of step 3, to be changed by a test."""
    return shutil.copytree(checkpoint_of(finished["fp32"]), tmp_path / "checkpoint-3")


def checkpoint_of(run: Trainer) -> Path:
    return Path(run.args.output_dir) / "checkpoint-3"


class FirstRate(TrainerCallback):
    """Notes the learning rate of the first step."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if not any("rate" in entry for entry in state.log_history):
            state.log_history.append({"rate": kwargs["optimizer"].param_groups[0]["lr"]})


def resume(path: Path, tmp_path: Path, **changes: Any) -> Trainer:
    """Resumes the fp32 run from ``path`` in another folder."""
    run = trainer(tmp_path / "resumed", **changes)
    run.add_callback(FirstRate)
    run.train(resume_from_checkpoint=str(path))
    return run


def test_checkpoint_holds_no_pickled_optimizer(finished: dict[str, Trainer]) -> None:
    names = {path.name for path in checkpoint_of(finished["fp32"]).iterdir()}
    assert names >= SAVED
    assert "optimizer.pt" not in names


@pytest.mark.parametrize("label", DTYPES)
def test_resume_is_bit_exact(label: str, finished: dict[str, Trainer], tmp_path: Path) -> None:
    # Weights of another start, so that what is equal at the end came from the checkpoint.
    torch.manual_seed(7)
    model = tiny_gpt2(DTYPES[label])
    torch.nn.init.normal_(model.transformer.wte.weight)
    run = trainer(tmp_path, model)
    run.train(resume_from_checkpoint=str(checkpoint_of(finished[label])))
    assert same_weights(run.model, finished[label].model)
    assert not same_weights(run.model, tiny_gpt2(DTYPES[label]))
    learning_rates = [
        [entry["learning_rate"] for entry in one.state.log_history if "loss" in entry][-1]
        for one in (run, finished[label])
    ]
    assert learning_rates[0] == learning_rates[1]


def test_statistics_stay_float32_beside_bf16_weights(
    finished: dict[str, Trainer], tmp_path: Path
) -> None:
    run = trainer(tmp_path, tiny_gpt2(torch.bfloat16))
    run.train(resume_from_checkpoint=str(checkpoint_of(finished["bf16"])))
    tensors, _ = checkpoint.read_state(Path(run.args.output_dir) / "checkpoint-6")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_resume_from_shards(
    finished: dict[str, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoint.save_optimizer.__kwdefaults__, "max_shard_size", 20_000)
    first = trainer(tmp_path / "first")
    first.train()
    saved = checkpoint_of(first)
    assert (saved / checkpoint.INDEX_NAME).is_file()
    assert not (saved / checkpoint.FILE_NAME).exists()
    assert same_weights(resume(saved, tmp_path).model, finished["fp32"].model)


def test_our_optimizer_pt_still_loads(folder: Path, tmp_path: Path, finished: Any) -> None:
    halfway = trainer(tmp_path / "halfway", max_steps=6, save_strategy="no")
    halfway.create_optimizer_and_scheduler(6)
    checkpoint.load_optimizer(halfway.optimizer, folder)
    torch.save(halfway.optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "optimizer.safetensors").unlink()
    assert same_weights(resume(folder, tmp_path).model, finished["fp32"].model)


def write_adamw(folder: Path) -> None:
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(param.sum() for param in model.parameters()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def write_object(folder: Path) -> None:
    torch.save({"state": Path(), "param_groups": []}, folder / "optimizer.pt")


WITHOUT_STATE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, "neither optimizer.safetensors nor optimizer.pt"),
    "AdamW": (write_adamw, "optimizer.pt does not fit: .*another"),
    "pickled object": (write_object, "optimizer.pt holds more than tensors and plain data"),
}


@pytest.mark.parametrize("case", WITHOUT_STATE)
def test_resume_without_state_warns(
    case: str, folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture, finished: Any
) -> None:
    prepare, message = WITHOUT_STATE[case]
    (folder / "optimizer.safetensors").unlink()
    prepare(folder)
    run = resume(folder, tmp_path)
    assert "THE OPTIMIZER STARTS FRESH" in logs.text
    assert re.search(message, logs.text)
    assert not same_weights(run.model, finished["fp32"].model)
    # The schedule goes on where it was, from the first step on.
    assert [entry["rate"] for entry in run.state.log_history if "rate" in entry] == [0.0075]


@pytest.mark.parametrize("case", WITHOUT_STATE)
def test_strict_resume_raises(case: str, folder: Path, tmp_path: Path) -> None:
    prepare, message = WITHOUT_STATE[case]
    (folder / "optimizer.safetensors").unlink()
    prepare(folder)
    with pytest.raises(ResumeError, match=message):
        resume(
            folder,
            tmp_path,
            optim_args="rank=4,update_interval=2,root_interval=2,start_step=2,strict_resume=true",
        )


def test_state_of_another_rank_warns(
    folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    resume(folder, tmp_path, optim_args="rank=2")
    assert "THE OPTIMIZER STARTS FRESH" in logs.text
    assert "found" in logs.text


def test_state_of_our_other_optimizer_warns(
    folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    resume(folder, tmp_path, optim="shared_basis_adam")
    assert f"optimizer: expected 'shared_basis_adam', found '{NAME}'" in logs.text


def test_damaged_state_always_raises(folder: Path, tmp_path: Path) -> None:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        resume(folder, tmp_path)


def test_a_stock_optimizer_keeps_the_stock_files(tmp_path: Path) -> None:
    changes = {"optim": "adamw_torch", "optim_args": None}
    first = trainer(tmp_path / "first", **changes)
    first.train()
    names = {path.name for path in checkpoint_of(first).iterdir()}
    assert "optimizer.pt" in names
    assert not names & {"optimizer.safetensors", "README.md"}
    assert same_weights(resume(checkpoint_of(first), tmp_path, **changes).model, first.model)
