"""Methods that look inside the layers, under what the Trainer does to a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from tests.trainer_ext.tiny import arguments, same_weights, tiny_gpt2, trainer
from trainer_ext.callbacks import our_optimizer

ARGS = {
    "kfac": "update_interval=2,inverse_interval=2",
    "b_kfac": "rank=4,max_columns=8,brand_interval=2,factor_form=brand",
    "seng": "update_interval=2,max_columns=64",
    "ng_plus_per_sample": "update_interval=2",
}
each_method = pytest.mark.parametrize("name", ARGS)


def run(folder: Path, name: str, model: nn.Module | None = None, **changes: Any) -> Trainer:
    """A finished run of six steps; dropout would tell recomputed passes apart."""
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if model is None else model
    options = {"optim": name, "optim_args": ARGS[name], "save_strategy": "no", **changes}
    finished = trainer(folder, model, **options)
    finished.train()
    return finished


def assert_near(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    """Weights equal up to rounding."""
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    for (name, one), other in pairs:
        assert torch.allclose(one, other, atol=tolerance), name


def missing(finished: Trainer) -> float:
    """Layers that had a gradient but no columns, over the whole run."""
    return sum(entry.get("optim_missing_columns", 0.0) for entry in finished.state.log_history)


@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", name)
    recomputed = run(
        tmp_path / "recomputed",
        name,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_near(recomputed.model, plain.model, 1e-5)
    assert missing(recomputed) == missing(plain) == 0


@pytest.mark.parametrize("name", ["kfac", "ng_plus_per_sample"])
def test_accumulation_equals_a_larger_batch(name: str, tmp_path: Path) -> None:
    """SENG and B-KFAC draw fewer positions than there are here."""
    options = {"data_seed": 3, "max_grad_norm": 0.0}
    large = run(tmp_path / "large", name, per_device_train_batch_size=8, **options)
    small = run(
        tmp_path / "small",
        name,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **options,
    )
    assert_near(small.model, large.model, 2e-4)
    assert not same_weights(large.model, tiny_gpt2())


@each_method
def test_training_twice_hooks_the_model_once(name: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    for turn in range(2):
        before = copy.deepcopy(model)
        finished = run(tmp_path / str(turn), name, model)
        assert missing(finished) == 0
        assert not same_weights(model, before)
    finished.train()
    assert missing(finished) == 0


@each_method
def test_bf16_autocast_trains(name: str, tmp_path: Path) -> None:
    finished = run(tmp_path, name, bf16=True)
    assert missing(finished) == 0
    optimizer = our_optimizer(finished.optimizer)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state)


@each_method
def test_lora_adapters_get_the_method(name: str, tmp_path: Path) -> None:
    adapters = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_gpt2(), adapters)
    base = {key: value.clone() for key, value in model.state_dict().items() if "lora" not in key}
    finished = run(tmp_path, name, model)
    plan = {row.algorithm: row.num_tensors for row in our_optimizer(finished.optimizer).plan()}
    assert plan == {name: 12}  # A and B of c_attn and two c_proj in two blocks
    assert missing(finished) == 0
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in base.items())
    assert all(after[key].any() for key in after if "lora_B" in key)


class Images(torch.utils.data.Dataset):
    """Random images of two classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": torch.tensor(index % 2)}


def image_models() -> dict[str, nn.Module]:
    """A small ViT and a small residual network."""
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    resnet = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return {"vit": ViTForImageClassification(vit), "resnet": ResNetForImageClassification(resnet)}


@each_method
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_image_models_train(name: str, kind: str, tmp_path: Path) -> None:
    model = image_models()[kind]
    args = arguments(
        tmp_path, optim=name, optim_args=ARGS[name], save_strategy="no", learning_rate=1e-3
    )
    if name == "seng":  # one sample of the first convolution has 64 places
        args.optim_args = "update_interval=2,max_columns=256"
    finished = Trainer(model, args, train_dataset=Images())
    finished.train()
    assert missing(finished) == 0
    assert all(param.isfinite().all() for param in model.parameters())


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="kfac", optim_args="update_interval=2")
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())
    args.optim, args.optim_args = "shampoo", None
    Trainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())
