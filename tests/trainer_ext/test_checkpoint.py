"""optimizer.safetensors: round trip, atomic writing, and a clear error for every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_precond.optim.flat_state import StateMismatchError
from hf_precond.optim.optimizer import PreconditionedOptimizer
from tests.trainer_ext.tiny import NAME, tiny_gpt2, token_blocks
from trainer_ext import build_optimizer, checkpoint, state_files
from trainer_ext.checkpoint import DamagedCheckpointError, load_optimizer, save_optimizer


def make(name: str = NAME, steps: int = 2, n_embd: int = 16, **options: Any) -> Any:
    """An optimizer after a few steps."""
    model = tiny_gpt2(n_embd=n_embd)
    optimizer = build_optimizer(model, name, lr=1e-2, **{"rank": 4, **options})
    batch = {"input_ids": token_blocks(2)[0]["input_ids"][None]}
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def tensors_of(optimizer: PreconditionedOptimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, param in zip(
            optimizer.param_names,
            [param for group in optimizer.param_groups for param in group["params"]],
            strict=True,
        )
        for key, value in optimizer.state.get(param, {}).items()
    }


def assert_same_state(one: PreconditionedOptimizer, two: PreconditionedOptimizer) -> None:
    first, second = tensors_of(one), tensors_of(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Writes the file again after a change of its tensors or metadata, as a forger would."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_round_trip(tmp_path: Path) -> None:
    saved, fresh = make(), make(steps=0)
    saved.param_groups[0]["lr"] = 0.123
    save_optimizer(saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"]
    load_optimizer(fresh, tmp_path)
    assert_same_state(saved, fresh)
    assert fresh.param_groups[0]["lr"] == 0.123


def test_header_says_what_the_file_is(tmp_path: Path) -> None:
    save_optimizer(make(), tmp_path)
    with safe_open(tmp_path / "optimizer.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["header"])
        assert len(file.metadata()["sha256"]) == 64
    assert header["algorithm"] == NAME
    assert header["hyperparameters"]["rank"] == 4
    assert set(header["versions"]) == {"hf_precond", "torch", "transformers", "safetensors"}


def test_shards_with_an_index(tmp_path: Path) -> None:
    saved, fresh = make(), make(steps=0)
    save_optimizer(saved, tmp_path)
    save_optimizer(saved, tmp_path, max_shard_size=20_000)
    shards = sorted(path.name for path in tmp_path.iterdir())
    assert shards[0].startswith("optimizer-00001-of-0000")
    assert "optimizer.safetensors.index.json" in shards
    assert "optimizer.safetensors" not in shards
    assert len(shards) > 3
    load_optimizer(fresh, tmp_path)
    assert_same_state(saved, fresh)
    save_optimizer(saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"]


@pytest.mark.parametrize("fail_at", ["write", "replace"])
def test_a_crash_leaves_the_old_file_whole(
    fail_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_optimizer(make(steps=1), tmp_path)
    before = (tmp_path / "optimizer.safetensors").read_bytes()

    def crash(tensors: Any, path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    target = {"write": (state_files, "save_file"), "replace": (state_files.os, "replace")}[fail_at]
    with monkeypatch.context() as patch:
        patch.setattr(*target, crash if fail_at == "write" else lambda *_: crash(None, *_[:1]))
        with pytest.raises(OSError, match="disk full"):
            save_optimizer(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"]
    assert (tmp_path / "optimizer.safetensors").read_bytes() == before


def set_version(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["header"] = json.dumps({**json.loads(metadata["header"]), "format_version": 99})


def set_learning_rate(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["header"] = metadata["header"].replace('"lr": 0.01', '"lr": 9.01')


def drop_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del metadata["header"]


def break_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["header"] = "{"


def drop_tensor(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors.pop(sorted(tensors)[0])


def rename_tensor(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["state.other.step"] = tensors.pop(sorted(tensors)[0])


def reshape_tensor(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name].reshape(-1)


def change_value(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors[sorted(tensors)[0]].view(-1)[0] += 1e-3


TAMPERED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "empty": (lambda path: path.write_bytes(b""), DamagedCheckpointError, "cannot be read"),
    "one byte short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        DamagedCheckpointError,
        "cannot be read",
    ),
    "half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        DamagedCheckpointError,
        "cannot be read",
    ),
    "cut in the header": (
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        DamagedCheckpointError,
        "cannot be read",
    ),
    "trailing bytes": (
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        DamagedCheckpointError,
        "cannot be read",
    ),
    "pickle": (lambda path: torch.save({"a": 1}, path), DamagedCheckpointError, "cannot be read"),
    "last bit": (lambda path: flip_bit(path, -1), DamagedCheckpointError, "sha256 does not match"),
    "bit in the middle": (
        lambda path: flip_bit(path, -5000, 6),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "value": (
        lambda path: rewrite(path, change_value),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "learning rate": (
        lambda path: rewrite(path, set_learning_rate),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "tensor dropped": (
        lambda path: rewrite(path, drop_tensor),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "tensor renamed": (
        lambda path: rewrite(path, rename_tensor),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "tensor reshaped": (
        lambda path: rewrite(path, reshape_tensor),
        DamagedCheckpointError,
        "sha256 does not match",
    ),
    "no header": (
        lambda path: rewrite(path, drop_header),
        DamagedCheckpointError,
        "was not written by this package",
    ),
    "broken header": (
        lambda path: rewrite(path, break_header),
        DamagedCheckpointError,
        "unreadable header",
    ),
    "model weights": (
        lambda path: save_file({"w": torch.ones(2)}, path),
        DamagedCheckpointError,
        "was not written by this package",
    ),
    "other version": (
        lambda path: rewrite(path, set_version),
        StateMismatchError,
        "has format version 99, this package reads 1",
    ),
    "other optimizer": (
        lambda path: save_optimizer(make("shared_basis_adam"), path.parent),
        StateMismatchError,
        "optimizer: expected 'shared_basis_adagrad', found 'shared_basis_adam'",
    ),
    "other shapes": (
        lambda path: save_optimizer(make(n_embd=24), path.parent),
        StateMismatchError,
        "shape of 'transformer.wte.weight': expected .*16.*, found .*24",
    ),
    "other rank": (
        lambda path: save_optimizer(make(rank=2), path.parent),
        StateMismatchError,
        "shape of 'state.transformer.h.0.*expected .*found",
    ),
    "other grouping": (
        lambda path: save_optimizer(make(attention_grouping="kernel"), path.parent),
        StateMismatchError,
        "views of 'transformer.h.0.attn.*attention_grouping",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_file(case: str, tmp_path: Path) -> None:
    tamper, error, message = TAMPERED[case]
    save_optimizer(make(), tmp_path)
    tamper(tmp_path / "optimizer.safetensors")
    target, untouched = make(steps=1), make(steps=1)
    with pytest.raises(error, match=message):
        load_optimizer(target, tmp_path)
    assert_same_state(target, untouched)
    assert target.param_groups[0]["lr"] == untouched.param_groups[0]["lr"]


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    save_optimizer(make(), tmp_path)
    whole = path.read_bytes()
    # "format" is the only thing outside the checksum; it is a note for other readers.
    free = range(whole.index(b'"format":"pt"'), whole.index(b'"format":"pt"') + 13)
    offsets = [*range(0, len(whole), len(whole) // 60), len(whole) - 1]
    target = make(steps=0)
    for offset in offsets:
        if offset in free:
            continue
        flip_bit(path, offset, offset % 8)
        with pytest.raises((DamagedCheckpointError, StateMismatchError)):
            load_optimizer(target, tmp_path)
        path.write_bytes(whole)
    assert not target.state


SHARDED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "missing shard": (lambda shard, _: shard.unlink(), "missing and cannot be read"),
    "altered shard": (lambda shard, _: flip_bit(shard, -1), "sha256 does not match"),
    "shard of another save": (
        lambda shard, other: shard.write_bytes(other.read_bytes()),
        "belongs to another save",
    ),
    "broken index": (
        lambda shard, _: (shard.parent / checkpoint.INDEX_NAME).write_text("{"),
        "not a readable index",
    ),
    "empty index": (
        lambda shard, _: (shard.parent / checkpoint.INDEX_NAME).write_text(
            '{"metadata": {"sha256": {}}}'
        ),
        "names no files",
    ),
}


@pytest.mark.parametrize("case", SHARDED)
def test_tampered_shards(case: str, tmp_path: Path) -> None:
    tamper, message = SHARDED[case]
    save_optimizer(make(), tmp_path / "a", max_shard_size=20_000)
    save_optimizer(make(steps=3), tmp_path / "b", max_shard_size=20_000)
    first = sorted(path.name for path in (tmp_path / "a").glob("optimizer-*"))[0]
    tamper(tmp_path / "a" / first, tmp_path / "b" / first)
    target = make(steps=0)
    with pytest.raises(DamagedCheckpointError, match=message):
        load_optimizer(target, tmp_path / "a")
    assert not target.state
