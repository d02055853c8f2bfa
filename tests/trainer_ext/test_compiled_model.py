"""``TrainingArguments(torch_compile=True)``: the model's names gain a prefix, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_precond.linalg import fused
from tests.trainer_ext.tiny import same_weights, tiny_gpt2, trainer
from trainer_ext.callbacks import our_optimizer

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
OPTIONS = {
    "shared_basis_adagrad": "rank=4,update_interval=2,root_interval=2,start_step=2",
    "muon": "",
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def trained(folder: Path, name: str, *, resume: Path | None = None, **changes: Any) -> Any:
    run = trainer(folder, optim=name, **{"optim_args": OPTIONS[name], **changes})
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


def keys(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "muon" else ()) for name in OPTIONS],
)
def test_a_compiled_model_is_trained_alike(name: str, tmp_path: Path) -> None:
    """And its checkpoints are those of the model: each resumes the other's run."""
    plain = trained(tmp_path / "plain", name)
    compiled = trained(tmp_path / "compiled", name, **COMPILED)
    assert same_weights(compiled.model, plain.model)
    assert not same_weights(compiled.model, tiny_gpt2())
    folders = [tmp_path / kind / "checkpoint-3" for kind in ("plain", "compiled")]
    assert keys(folders[0]) == keys(folders[1])
    assert not any("_orig_mod" in key for key in keys(folders[1]))
    for folder, settings in zip(folders, (COMPILED, {}), strict=True):
        resumed = trained(tmp_path / f"from {folder.parent.name}", name, resume=folder, **settings)
        assert same_weights(resumed.model, plain.model)


def test_the_optimizer_may_be_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BACKEND", "eager")
    both = trained(tmp_path, "muon", optim_args="compile=true", **COMPILED)
    assert our_optimizer(both.optimizer).recipe.numerics.compile
    assert not same_weights(both.model, tiny_gpt2())
