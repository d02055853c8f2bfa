"""PEFT's kinds of adapters below the Trainer: what is trained, with which method, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_precond
from tests.trainer_ext.tiny import arguments, tiny_gpt2, token_blocks
from trainer_ext.callbacks import our_optimizer

peft = pytest.importorskip("peft", reason="needs the extra dev")

PROJECTIONS = ["c_attn", "c_proj"]
BARE = "LoRA of bare parameters"


def lora(**changes: Any) -> Any:
    values = {"r": 4, "target_modules": PROJECTIONS, "fan_in_fan_out": True}
    return peft.LoraConfig(**{**values, **changes})


# Adapters, and what of them is preconditioned: matrices, but no vectors and no embeddings.
KINDS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "LoRA with DoRA's magnitudes": (lambda: lora(use_dora=True), {"lora_A", "lora_B"}),
    "LoRA with biases and norms": (
        lambda: lora(bias="all", modules_to_save=["ln_f", "mlp.c_fc"]),
        {"lora_A", "lora_B", "modules_to_save"},
    ),
    "LoRA with new tokens": (
        lambda: lora(trainable_token_indices={"wte": [1, 2, 3]}, ensure_weight_tying=True),
        {"lora_A", "lora_B"},
    ),
    "LoRA from singular vectors": (lambda: lora(init_lora_weights="pissa"), {"lora_A", "lora_B"}),
    BARE: (
        lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.c_fc.weight"]),
        {"lora_A", "lora_B"},
    ),
    "IA3": (
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        set(),
    ),
    "VeRA": (lambda: peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), set()),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        set(),
    ),
}
METHODS = ["two_sided_basis", "kfac"]


def adapted(config: Any) -> nn.Module:
    """The tiny model with adapters, the same weights at every call."""
    model = tiny_gpt2(n_positions=32)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


def trained(
    folder: Path, model: nn.Module, checkpoint: Path | None = None, **options: Any
) -> Trainer:
    """Six steps with a checkpoint after three."""
    changes = {"optim_args": None, "label_names": ["labels"]}
    more = {key: options.pop(key) for key in ("optimizers", "callbacks") if key in options}
    run = Trainer(
        model, arguments(folder, **{**changes, **options}), train_dataset=token_blocks(), **more
    )
    run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return run


def check_faultless(run: Trainer) -> None:
    logged = [entry for entry in run.state.log_history if "optim_step_ms" in entry]
    assert logged
    for figure in ("skipped_nonfinite", "failed_updates", "missing_columns"):
        assert [entry[f"optim_{figure}"] for entry in logged] == [0] * len(logged), figure


def check_same(first: nn.Module, second: nn.Module) -> None:
    found = dict(second.named_parameters())
    for name, param in first.named_parameters():
        assert torch.equal(param, found[name]), name


# Where nothing is preconditioned, one method is as good as another.
CASES = [
    (kind, method) for kind, (_, found) in KINDS.items() for method in METHODS[: 2 if found else 1]
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_adapters_train_and_resume(kind: str, method: str, tmp_path: Path) -> None:
    config, matrices = KINDS[kind]
    if method == "kfac" and kind == BARE:
        matrices = set()  # no layer is called, so none has an input
    start = {name: param.clone() for name, param in adapted(config()).named_parameters()}
    run = trained(tmp_path / "straight", adapted(config()), optim=method)
    check_faultless(run)
    for name, param in run.model.named_parameters():
        assert torch.equal(param, start[name]) != param.requires_grad, name

    optimizer = our_optimizer(run.optimizer)
    plain = [views for group in optimizer.param_groups for views in group["views"]]
    seen = [name for name, views in zip(optimizer.param_names, plain, strict=True) if views]
    assert {part for name in seen for part in matrices if f".{part}." in name} == matrices
    assert all(any(f".{part}." in name for part in matrices) for name in seen)

    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    resumed = trained(tmp_path / "resumed", adapted(config()), saved, optim=method)
    check_same(resumed.model, run.model)


class Allocation(TrainerCallback):
    """What PEFT asks of whoever trains AdaLoRA."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_are_pruned_while_training(method: str, tmp_path: Path) -> None:
    """AdaLoRA zeroes what it prunes between our steps. (Its checkpoints PEFT cannot load.)"""
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=6,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    run = trained(
        tmp_path, adapted(config), optim=method, save_strategy="no", callbacks=[Allocation()]
    )
    check_faultless(run)
    values = [param for name, param in run.model.named_parameters() if ".lora_E." in name]
    assert sum(int((value != 0).sum()) for value in values) == 2 * 3


@pytest.mark.parametrize("method", ["TwoSidedBasis", "SharedBasisAdam", "Muon", "KFAC"])
def test_lora_plus_takes_our_classes(method: str, tmp_path: Path) -> None:
    """PEFT makes the groups and the optimizer, the stock Trainer is handed it."""
    from peft.optimizers import create_loraplus_optimizer

    def run(folder: str, checkpoint: Path | None = None) -> Trainer:
        model = adapted(lora())
        optimizer = create_loraplus_optimizer(
            model, getattr(hf_precond, method), lr=1e-2, loraplus_lr_ratio=8
        )
        optimizer.attach(model)
        assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {0.01, 0.08}
        return trained(
            tmp_path / folder,
            model,
            checkpoint,
            optim="adamw_torch",
            optimizers=(optimizer, None),
        )

    straight = run("straight")
    check_faultless(straight)
    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    check_same(run("resumed", saved).model, straight.model)
