"""hf-precond inspect and convert."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_precond.optim.flat_state import flat_state
from tests.trainer_ext.commands.conftest import Command
from tests.trainer_ext.tiny import NAME, tiny_gpt2, trainer
from trainer_ext.build import build_optimizer
from trainer_ext.checkpoint import load_optimizer, read_state, save_optimizer

OPTIONS = "rank=4,update_interval=2,root_interval=2,start_step=2"


def test_inspect_tells_what_is_there(
    as_json: Callable[..., Any], command: Command, checkpoint: Path
) -> None:
    tensors, header = read_state(checkpoint)
    found = as_json("inspect", checkpoint)
    assert found["hyperparameters"] == header["hyperparameters"]
    assert {key: entry["shape"] for key, entry in found["tensors"].items()} == {
        key: list(tensor.shape) for key, tensor in tensors.items()
    }
    assert sum(entry["bytes"] for entry in found["tensors"].values()) == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors.values()
    )
    assert found["verified"] is False
    shown = command("inspect", checkpoint / "optimizer.safetensors", "--verify")
    assert "checksums are right" in shown
    assert f"{NAME}, " in shown
    assert "weight decay 0.1" in shown
    row = next(line for line in shown.splitlines() if "h.0.mlp.c_fc.weight" in line)
    assert "16x64" in row
    assert "basis float32[1, 16, 4]" in row


def test_inspect_reads_shards(tmp_path: Path, as_json: Callable[..., Any]) -> None:
    run = trainer(tmp_path, max_steps=2, save_strategy="no")
    run.train()
    save_optimizer(run.optimizer.optimizer, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("optimizer-*-of-*.safetensors"))) > 1
    tensors, _ = read_state(tmp_path)
    assert as_json("inspect", tmp_path)["tensors"].keys() == tensors.keys()


def damaged(checkpoint: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    folder.mkdir()
    content = (checkpoint / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(change(content))
    return folder


def test_damage_is_named(error_of: Command, checkpoint: Path, tmp_path: Path) -> None:
    cut = damaged(checkpoint, tmp_path / "cut", lambda content: content[:-100])
    assert "is truncated, altered or missing" in error_of("inspect", cut)
    flipped = damaged(
        checkpoint, tmp_path / "flipped", lambda content: content[:-1] + bytes([content[-1] ^ 1])
    )
    assert "its sha256 does not match" in error_of("inspect --verify", flipped)
    assert "holds no optimizer.safetensors" in error_of("inspect", tmp_path)


def test_there_and_back_is_the_same_bit_for_bit(
    command: Command, checkpoint: Path, model_folder: Path, tmp_path: Path
) -> None:
    pickled, back = tmp_path / "optimizer.pt", tmp_path / "back"
    model = ("--model", model_folder)
    assert f"{NAME}: " in command("convert", checkpoint, pickled, *model)
    command("convert", pickled, back, *model, "--optim_args", OPTIONS)
    first, second = read_state(checkpoint)[0], read_state(back)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_chosen_ranks_go_there_and_back(
    as_json: Callable[..., Any], command: Command, model_folder: Path, tmp_path: Path
) -> None:
    options = "rank=auto,rank_interval=1,state_budget=1.7"
    run = trainer(
        tmp_path / "run", max_steps=3, save_steps=3, optim="two_sided_basis", optim_args=options
    )
    run.train()
    saved, back = tmp_path / "run" / "checkpoint-3", tmp_path / "back"
    ranks = read_state(saved)[1]["view_ranks"]
    assert len({str(of_param) for of_param in ranks.values()}) > 2
    pickled, model = tmp_path / "optimizer.pt", ("--model", model_folder)
    command("convert", saved, pickled, *model)
    command("convert", pickled, back, *model, "--optim_args", options)
    first, second = read_state(saved), read_state(back)
    assert second[1]["view_ranks"] == ranks
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert as_json("inspect", saved)["hyperparameters"]["rank"] == "auto"


def test_a_converted_state_is_what_the_trainer_would_load(
    command: Command, checkpoint: Path, model_folder: Path, tmp_path: Path
) -> None:
    command("convert", checkpoint, tmp_path / "optimizer.pt", "--model", model_folder)
    options = {"rank": 4, "update_interval": 2, "root_interval": 2, "start_step": 2}
    ours = build_optimizer(tiny_gpt2(), NAME, lr=1.0, weight_decay=0.1, **options)
    ours.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    expected = build_optimizer(tiny_gpt2(), NAME, lr=1.0, weight_decay=0.1, **options)
    load_optimizer(expected, checkpoint)
    tensors, others = flat_state(ours)[0], flat_state(expected)[0]
    assert all(torch.equal(tensors[key], others[key]) for key in others)
    assert [group["lr"] for group in ours.param_groups] == [
        group["lr"] for group in expected.param_groups
    ]


def test_nothing_is_replaced_unasked(
    command: Command, error_of: Command, checkpoint: Path, model_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "optimizer.pt"
    target.write_bytes(b"mine")
    model = ("--model", model_folder)
    assert "--overwrite replaces it" in error_of("convert", checkpoint, target, *model)
    assert target.read_bytes() == b"mine"
    command("convert", checkpoint, target, *model, "--overwrite")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    message = error_of("convert", target, copy, *model, "--optim_args", OPTIONS)
    assert "has optimizer state already" in message


class Payload:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_file_does_not_run(error_of: Command, model_folder: Path, tmp_path: Path) -> None:
    source, trace = tmp_path / "optimizer.pt", tmp_path / "trace"
    torch.save({"param_groups": [Payload(trace)]}, source, pickle_module=pickle)
    error = error_of("convert", source, tmp_path / "out", "--model", model_folder)
    assert "holds more than tensors and plain data" in error
    assert not trace.exists()


def test_other_states_are_refused(error_of: Command, model_folder: Path, tmp_path: Path) -> None:
    model = tiny_gpt2()
    adamw = torch.optim.AdamW(model.parameters())
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    arguments = (tmp_path / "out", "--model", model_folder)
    error = error_of("convert", tmp_path / "optimizer.pt", *arguments)
    assert "is not of an optimizer of this package" in error
    assert "must be a .pt file" in error_of("convert", tmp_path, *arguments)
    assert "there is no file" in error_of("convert", tmp_path / "none.pt", *arguments)
    nothing = error_of("convert", tmp_path, tmp_path / "new.pt", "--model", model_folder)
    assert "holds no optimizer.safetensors" in nothing
