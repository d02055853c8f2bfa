"""View rules see through wrappers, and adapters are matrices of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_precond.views.rules import Assignment, assign_all
from tests.trainer_ext.models import CASES
from trainer_ext.build import explain_groups
from trainer_ext.layers import view_rules

BY_NAME = {case.name: case for case in CASES}
WRAPPED = ("gpt2", "llama", "gpt-neox", "mixtral", "t5")


def found_in(model: nn.Module) -> dict[str, Assignment]:
    return {info.name: assignment for info, assignment in assign_all(model, view_rules(model))}


def shown(assignment: Assignment) -> tuple[str, ...]:
    return tuple(str(view) for view in assignment.views)


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process that is its own group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case_name", WRAPPED)
def test_compile_changes_nothing(case_name: str) -> None:
    model = BY_NAME[case_name].build()
    assert found_in(torch.compile(model)) == found_in(model)


@pytest.mark.parametrize("case_name", WRAPPED)
def test_activation_checkpointing_changes_nothing(case_name: str) -> None:
    model = BY_NAME[case_name].build()
    expected = found_in(model)
    apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__.endswith(("Attention", "MLP"))
    )
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert found_in(model) == expected


@pytest.mark.parametrize("case_name", WRAPPED)
@pytest.mark.usefixtures("process_group")
def test_ddp_changes_nothing(case_name: str) -> None:
    model = BY_NAME[case_name].build()
    expected = found_in(model)
    wrapped = DistributedDataParallel(model)
    assert found_in(wrapped) == expected
    assert found_in(torch.compile(wrapped)) == expected


@pytest.mark.parametrize("case_name", WRAPPED)
@pytest.mark.usefixtures("process_group")
def test_fsdp2_changes_nothing(case_name: str) -> None:
    """Its parameters are distributed tensors of the full shape, its classes are made on the fly."""
    model = BY_NAME[case_name].build()
    expected = found_in(model)
    for module in reversed(list(model.modules())):
        if type(module).__name__.endswith(("Attention", "Conv1D", "Experts")):
            fully_shard(module)
    fully_shard(model)
    assert all(isinstance(param, dist.tensor.DTensor) for param in model.parameters())
    assert found_in(model) == expected


def with_lora(case_name: str, targets: list[str], **options: object) -> PeftModel:
    config = LoraConfig(r=4, target_modules=targets, **options)
    return get_peft_model(BY_NAME[case_name].build(), config)


@pytest.mark.parametrize(
    ("case_name", "targets", "prefix", "factor_a", "factor_b"),
    [
        ("llama", ["k_proj"], "model.layers.0.self_attn.k_proj", "4, 32", "16, 4"),
        ("gpt2", ["c_attn"], "transformer.h.0.attn.c_attn", "4, 32", "96, 4"),
    ],
)
def test_lora_factors_are_matrices(
    case_name: str, targets: list[str], prefix: str, factor_a: str, factor_b: str
) -> None:
    """Also where the wrapped kernel is a Conv1D, whose factors are ordinary linear layers."""
    found = found_in(with_lora(case_name, targets, fan_in_fan_out=case_name == "gpt2"))
    assert len(found) == 4
    first = found[f"base_model.model.{prefix}.lora_A.default.weight"]
    second = found[f"base_model.model.{prefix}.lora_B.default.weight"]
    assert (shown(first), first.reason) == ((f"1 x [{factor_a}]",), "LoRA A")
    assert (shown(second), second.reason) == ((f"1 x [{factor_b}]",), "LoRA B")


@pytest.mark.parametrize(
    ("case_name", "target", "kernel"),
    [
        ("llama", "k_proj", "model.layers.0.self_attn.k_proj"),
        ("gpt2", "c_attn", "transformer.h.0.attn.c_attn"),
        ("phi3", "qkv_proj", "model.layers.0.self_attn.qkv_proj"),
    ],
)
def test_a_kernel_below_lora_keeps_its_heads(case_name: str, target: str, kernel: str) -> None:
    expected = found_in(BY_NAME[case_name].build())[f"{kernel}.weight"]
    model = with_lora(case_name, [target]).requires_grad_(True)
    assert found_in(model)[f"base_model.model.{kernel}.base_layer.weight"] == expected


def test_trainable_copies_of_kernels_and_heads_keep_their_views() -> None:
    found = found_in(with_lora("llama", ["v_proj"], modules_to_save=["q_proj", "lm_head"]))
    copies = {name: found[name] for name in found if ".modules_to_save." in name}
    head = copies.pop("base_model.model.lm_head.modules_to_save.default.weight")
    assert (head.views, head.reason) == ((), "output embedding")
    assert [(shown(copy), copy.reason) for copy in copies.values()] == [
        (("4 x [8, 32]",), "q kernel, 4 heads")
    ] * 2


def test_lora_of_embeddings_and_heads() -> None:
    """What is looked up by token follows the fallback, the other factor is a matrix."""
    found = found_in(with_lora("llama", ["embed_tokens", "lm_head"]))
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    assert shown(found[f"{embedding}.lora_embedding_A.default"]) == ()
    assert shown(found[f"{embedding}.lora_embedding_B.default"]) == ("1 x [32, 4]",)
    assert shown(found[f"{head}.lora_A.default.weight"]) == ("1 x [4, 32]",)
    assert shown(found[f"{head}.lora_B.default.weight"]) == ("1 x [64, 4]",)


def test_adapters_without_a_matrix_follow_the_fallback() -> None:
    """Scales and singular values stored as columns, and rows that are looked up by token."""
    kernels, tokens = ["q_proj", "down_proj"], {"embed_tokens": [1, 2]}
    configs = {
        ".ia3_l.": IA3Config(target_modules=kernels, feedforward_modules=["down_proj"]),
        ".lora_E.": AdaLoraConfig(init_r=4, total_step=9, target_modules=kernels),
        ".trainable_tokens_delta.": LoraConfig(
            target_modules=kernels, trainable_token_indices=tokens
        ),
    }
    for part, config in configs.items():
        found = found_in(get_peft_model(BY_NAME["llama"].build(), config))
        picked = [assignment for name, assignment in found.items() if part in name]
        assert picked
        assert all(assignment.views == () for assignment in picked), part


def test_factors_that_no_layer_is_called_for() -> None:
    """LoRA of a bare parameter takes its factors' weights: matrices without an input."""
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.up_proj.weight"])
    model = get_peft_model(BY_NAME["llama"].build(), config)
    for name, algorithm in (("two_sided_basis", "two_sided_basis"), ("kfac", "adam")):
        rows = explain_groups(model, name)
        assert rows
        assert {row.algorithm for row in rows} == {algorithm}
        assert {"never called" in row.reason for row in rows} == {name == "kfac"}
