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
from tests.trainer_ext.tiny import NAME, arguments, same_weights, tiny_gpt2, token_blocks, trainer
from trainer_ext import checkpoint
from trainer_ext.checkpoint import DamagedCheckpointError
from trainer_ext.resume import (
    ResumeError,
    begin_checkpoint,
    incomplete_because,
    last_complete_checkpoint,
)

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


# --- which checkpoint is whole --------------------------------------------------------------------


def cut(name: str, size: int = -100) -> Callable[[Path], Any]:
    """Cuts a file of a checkpoint short."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name: str) -> Callable[[Path], Any]:
    """Removes a file of a checkpoint."""
    return lambda folder: (folder / name).unlink()


def altered(folder: Path) -> None:
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-7] ^= 4
    (folder / "optimizer.safetensors").write_bytes(content)


INCOMPLETE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "killed before the end": (
        remove("trainer_state.json"),
        "trainer_state.json, which is written last, is missing",
    ),
    "killed at the end": (cut("trainer_state.json"), "trainer_state.json cannot be read"),
    "empty trainer state": (cut("trainer_state.json", 0), "trainer_state.json cannot be read"),
    "no weights": (remove("model.safetensors"), "no weights of the model"),
    "half the weights": (cut("model.safetensors", 9000), "model.safetensors cannot be read"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors cannot be read"),
    "no optimizer": (remove("optimizer.safetensors"), "optimizer.pt is missing"),
    "half the optimizer": (cut("optimizer.safetensors"), "optimizer.safetensors is truncated"),
    "altered optimizer": (altered, "sha256 does not match"),
    "no schedule": (remove("scheduler.pt"), "scheduler.pt is missing"),
    "half the schedule": (cut("scheduler.pt"), "scheduler.pt is cut short"),
    "no random state": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "half the random state": (cut("rng_state.pth"), "rng_state.pth is cut short"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_checkpoint_is_named_and_passed_over(
    case: str, folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    spoil, message = INCOMPLETE[case]
    newer = shutil.copytree(folder, tmp_path / "checkpoint-20")
    spoil(newer)
    assert message in incomplete_because(newer)
    assert last_complete_checkpoint(tmp_path) == str(folder)
    (line,) = [record.getMessage() for record in logs.records]
    assert line.startswith(f"{newer} IS NOT A COMPLETE CHECKPOINT and is passed over: ")
    assert message in line


def test_the_newest_complete_checkpoint_is_found(
    folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    """By its number, not its name; other folders are none."""
    for name in ("checkpoint-20", "checkpoint-100"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7000").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert not logs.records


def test_without_a_complete_checkpoint_there_is_none(
    folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    (folder / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-1").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert [record.args[0].name for record in logs.records] == ["checkpoint-3", "checkpoint-1"]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_sharded_weights_and_states_are_complete(folder: Path) -> None:
    run_model = tiny_gpt2()
    (folder / "model.safetensors").unlink()
    run_model.save_pretrained(folder, max_shard_size="10KB")
    tensors, _ = checkpoint.read_state(folder)
    assert tensors
    assert incomplete_because(folder) == ""
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} cannot be read" in incomplete_because(folder)
    shard.unlink()
    assert f"{shard.name} cannot be read" in incomplete_because(folder)


def test_a_stock_checkpoint_is_complete(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="adamw_torch", optim_args=None)
    run.train()
    assert incomplete_because(checkpoint_of(run)) == ""
    (checkpoint_of(run) / "optimizer.pt").unlink()
    assert "optimizer.pt is missing" in incomplete_because(checkpoint_of(run))


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(folder: Path) -> None:
    begin_checkpoint(folder)
    assert "trainer_state.json" in incomplete_because(folder)
    begin_checkpoint(folder / "not there yet")


def test_an_incomplete_checkpoint_is_never_resumed_from(folder: Path, tmp_path: Path) -> None:
    """Named by its path, too: the Trainer reads its own state before it trains."""
    (folder / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        resume(folder, tmp_path)


def test_a_damaged_schedule_is_an_error(folder: Path, tmp_path: Path) -> None:
    cut("scheduler.pt")(folder)
    with pytest.raises(DamagedCheckpointError, match=r"scheduler\.pt is cut short"):
        resume(folder, tmp_path)


def test_a_damaged_optimizer_pt_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "optimizer.safetensors").unlink()
    write_adamw(folder)
    cut("optimizer.pt")(folder)
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt is cut short"):
        resume(folder, tmp_path)


def test_an_optimizer_pt_of_other_shapes_is_not_loaded_in_part(
    folder: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    """Ours, of a model of the same parameters in another size."""
    (folder / "optimizer.safetensors").unlink()
    other = trainer(tmp_path / "other", tiny_gpt2(n_embd=24), max_steps=1, save_strategy="no")
    other.train()
    torch.save(other.optimizer.state_dict(), folder / "optimizer.pt")
    run = resume(folder, tmp_path)
    assert "THE OPTIMIZER STARTS FRESH" in logs.text
    assert re.search(r"does not fit: .*transformer\.wte\.weight", logs.text)
    assert run.state.global_step == 6


# --- the Trainer's own choice ---------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], Trainer]] = {
    "stock Trainer": trainer,
    "our Trainer": lambda folder: trainer(folder, kind=trainer_ext.PrecondTrainer),
    "factory": lambda folder: Trainer(
        tiny_gpt2(),
        arguments(folder, optim="adamw_torch", optim_args=None),
        train_dataset=token_blocks(),
        optimizer_cls_and_kwargs=(
            trainer_ext.OptimizerFactory(NAME, rank=4, update_interval=2, root_interval=2),
            {"lr": 1e-2, "start_step": 2},
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_passes_over_a_half_written_checkpoint(
    kind: str,
    folder: Path,
    tmp_path: Path,
    finished: dict[str, Trainer],
    logs: pytest.LogCaptureFixture,
) -> None:
    """``resume_from_checkpoint=True``: the stock Trainer would fail at the newest folder."""
    half = shutil.copytree(folder, tmp_path / "checkpoint-5")
    (half / "trainer_state.json").unlink()
    run = KINDS[kind](tmp_path)
    run.train(resume_from_checkpoint=True)
    assert f"{half} IS NOT A COMPLETE CHECKPOINT" in logs.text
    assert same_weights(run.model, finished["fp32"].model)


def test_without_a_complete_checkpoint_the_trainer_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_in_the_way_is_incomplete_while_it_is_written_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run in the folder of an old one is killed after it has written the weights."""

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_optimizer", crash)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert "trainer_state.json" in incomplete_because(folder)


AUTO = {
    "optim": "shared_basis_adam",
    "optim_args": "rank=auto,rank_interval=2,state_budget=1.7,start_step=2",
}


@pytest.mark.parametrize("pickled", [False, True])
def test_resume_begins_with_the_ranks_that_were_chosen(tmp_path: Path, pickled: bool) -> None:
    straight = trainer(tmp_path / "straight", **AUTO)
    first = straight.create_optimizer().view_ranks
    straight.train()
    folder = checkpoint_of(straight)
    assert re.search(r"rank \| auto \(\d+ to \d+, half", (folder / "README.md").read_text())
    if pickled:
        halfway = trainer(tmp_path / "halfway", **AUTO).create_optimizer()
        checkpoint.load_optimizer(halfway, folder)
        torch.save(halfway.state_dict(), folder / "optimizer.pt")
        (folder / "optimizer.safetensors").unlink()
    run = trainer(tmp_path / "resumed", **AUTO)
    run.train(resume_from_checkpoint=str(folder))
    assert same_weights(run.model, straight.model)
    ranks = [one.optimizer.optimizer.view_ranks for one in (run, straight)]
    assert ranks[0] == ranks[1] != first
