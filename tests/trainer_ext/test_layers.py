"""View rules: which views the weights of each architecture get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_precond.views.rules import GENERAL_RULES, Assignment, assign_all
from tests.trainer_ext.models import CASES, Case
from trainer_ext.layers import view_rules

BY_NAME = {case.name: case for case in CASES}
per_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assignments(model: nn.Module, **options: object) -> dict[str, Assignment]:
    return {info.name: found for info, found in assign_all(model, view_rules(model, **options))}


def shown(assignment: Assignment) -> tuple[str, ...]:
    return tuple(str(view) for view in assignment.views)


def coverage(assignment: Assignment, param: Tensor) -> Tensor:
    counts = torch.zeros(param.shape)
    for view in assignment.views:
        view.window(counts).add_(1)
    return counts


@per_case
@pytest.mark.parametrize("grouping", ["head", "kernel"])
def test_every_parameter_is_covered_exactly_once(case: Case, grouping: str) -> None:
    model = case.build()
    found = assignments(model, attention_grouping=grouping)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert found.keys() == params.keys()
    for name, assignment in found.items():
        assert assignment.reason
        if assignment.views:
            torch.testing.assert_close(
                coverage(assignment, params[name]), torch.ones(params[name].shape), msg=name
            )


@per_case
def test_views_per_head(case: Case) -> None:
    found = assignments(case.build())
    assert {name: shown(found[name]) for name in case.views} == dict(case.views)


@per_case
def test_whole_kernels_keep_pieces_apart(case: Case) -> None:
    """Grouping by kernel has one group where grouping by head has several, and the same pieces."""
    model = case.build()
    heads, kernels = assignments(model), assignments(model, attention_grouping="kernel")
    for name in case.views:
        assert [view.name for view in kernels[name].views] == [v.name for v in heads[name].views]
        assert [view.numel for view in kernels[name].views] == [v.numel for v in heads[name].views]
        groups = {view.shape[0] for view in kernels[name].views}
        assert groups <= ({3} if "experts." in name else {1}), name


@pytest.mark.parametrize(
    ("case_name", "parameter", "head", "kernel"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", "q kernel, 4 heads", "q kernel, whole"),
        ("llama", "model.layers.0.self_attn.k_proj", "k kernel, 2 heads", "k kernel, whole"),
        (
            "llama",
            "model.layers.0.self_attn.o_proj",
            "attention output kernel, 4 heads",
            "attention output kernel, whole",
        ),
        (
            "phi3",
            "model.layers.0.self_attn.qkv_proj",
            "fused q, k, v kernel, 4/2 heads",
            "fused q, k, v kernel, one group each",
        ),
        (
            "bloom",
            "transformer.h.0.self_attention.query_key_value",
            "interleaved q, k, v kernel, 4 heads",
            "interleaved q, k, v kernel, one group each",
        ),
        (
            "phi3",
            "model.layers.0.mlp.gate_up_proj",
            "fused gate, up kernel",
            "fused gate, up kernel",
        ),
        ("llama", "lm_head", "output embedding", "output embedding"),
        ("gpt2", "transformer.wte", "tied to an embedding", "tied to an embedding"),
    ],
)
def test_reasons(case_name: str, parameter: str, head: str, kernel: str) -> None:
    model = BY_NAME[case_name].build()
    assert assignments(model)[f"{parameter}.weight"].reason == head
    by_kernel = assignments(model, attention_grouping="kernel")
    assert by_kernel[f"{parameter}.weight"].reason == kernel


@pytest.mark.parametrize(("min_head_dim", "views"), [(8, "4 x [32, 8]"), (9, "1 x [32, 32]")])
def test_small_heads_leave_the_output_kernel_whole(min_head_dim: int, views: str) -> None:
    found = assignments(BY_NAME["llama"].build(), min_head_dim=min_head_dim)
    output = found["model.layers.0.self_attn.o_proj.weight"]
    assert shown(output) == (views,)
    assert ("head size 8 is below 9" in output.reason) == (min_head_dim == 9)
    assert shown(found["model.layers.0.self_attn.q_proj.weight"]) == ("4 x [8, 32]",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_grouping": "heads"}, "'head', 'kernel', got 'heads'"),
        ({"attention_grouping": None}, "'head', 'kernel', got None"),
        ({"min_head_dim": 0}, "min_head_dim must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_rules(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_output_embedding_appears_once(tied: bool) -> None:
    found = assignments(BY_NAME["llama"].build(tie_word_embeddings=tied))
    assert found["model.embed_tokens.weight"].reason == (
        "tied to an embedding" if tied else "embedding"
    )
    assert ("lm_head.weight" in found) is not tied


def test_output_embedding_is_what_the_model_says() -> None:
    """Models name it as they like; tying is off so that only the getter tells."""
    for case_name, head in (
        ("bert", "cls.predictions.decoder.weight"),
        ("whisper", "proj_out.weight"),
        ("electra", "generator_lm_head.weight"),
    ):
        found = assignments(BY_NAME[case_name].build(tie_word_embeddings=False))
        assert (found[head].views, found[head].reason) == ((), "output embedding")


FALCON_QKV = "transformer.h.0.self_attention.query_key_value"


def break_config(model: nn.Module, **counts: object) -> nn.Module:
    for module in model.modules():
        for name, value in counts.items():
            for target in (module, getattr(module, "config", None)):
                if target is not None and hasattr(target, name):
                    setattr(target, name, value)
    return model


@pytest.mark.parametrize(
    ("case_name", "counts", "parameter", "why"),
    [
        ("llama", {"num_attention_heads": 3}, "model.layers.0.self_attn.q_proj", "do not"),
        ("llama", {"head_dim": 5}, "model.layers.0.self_attn.o_proj", "4 heads of size 5"),
        ("gpt2", {"num_heads": 5}, "transformer.h.0.attn.c_attn", "do not make 96"),
        ("phi3", {"num_key_value_heads": 3}, "model.layers.0.self_attn.qkv_proj", "do not divide"),
        ("falcon-grouped", {"num_kv_heads": 1}, FALCON_QKV, "do not make 64"),
    ],
)
def test_wrong_head_counts_leave_the_kernel_whole(
    case_name: str, counts: dict[str, object], parameter: str, why: str
) -> None:
    model = break_config(BY_NAME[case_name].build(), **counts)
    found = assignments(model)[f"{parameter}.weight"]
    assert [view.shape[0] for view in found.views] == [1]
    assert "whole: " in found.reason
    assert why in found.reason


def test_a_model_without_head_counts_keeps_whole_kernels() -> None:
    model = BY_NAME["gpt-neox"].build()
    for module in model.modules():
        module.__dict__.pop("config", None)
    found = assignments(model)["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert shown(found) == ("1 x [96, 32]",)
    assert found.reason.endswith("whole: the model does not tell its head counts")


def test_odd_fused_halves_stay_whole() -> None:
    class Phi3MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Linear(4, 7)

    found = assignments(Phi3MLP())["gate_up_proj.weight"]
    assert shown(found) == ("1 x [7, 4]",)
    assert found.reason == "fused gate, up kernel, whole: 2 equal pieces do not make 7"


def test_a_subclass_follows_its_architecture() -> None:
    model = BY_NAME["gpt-neox"].build()
    for module in model.modules():
        if type(module).__name__ == "GPTNeoXAttention":
            module.__class__ = type("MyOwnLayer", (type(module),), {})
    found = assignments(model)["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert [view.name for view in found.views] == ["q", "k", "v"]


def test_attention_of_releases_before_separate_projections() -> None:
    """ViT kept its kernels under ``attention.query`` and ``output.dense`` in earlier releases."""

    class Heads(nn.Module):
        num_attention_heads, attention_head_size = 4, 8

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    class ViTAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.output = Heads(), nn.Module()
            self.output.dense = nn.Linear(32, 32)

    found = assignments(ViTAttention())
    assert shown(found["attention.key.weight"]) == ("4 x [8, 32]",)
    assert shown(found["output.dense.weight"]) == ("4 x [32, 8]",)


def test_an_unknown_model_follows_the_general_rules() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 6), Conv1D(5, 6), nn.LayerNorm(5), nn.Conv2d(2, 4, 3)
    )
    expected = {info.name: shown(found) for info, found in assign_all(model, GENERAL_RULES)}
    assert {name: shown(found) for name, found in assignments(model).items()} == expected
    assert expected["2.weight"] == ("1 x [5, 6]",)


def test_a_model_of_models_reads_the_nearest_config() -> None:
    """Two LLaMAs of different head counts in one module, as in vision-language models."""
    llama = BY_NAME["llama"]
    model = nn.ModuleDict(
        {"wide": llama.build(), "narrow": llama.build(num_attention_heads=2, head_dim=16)}
    )
    found = assignments(model)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert shown(found[f"wide.{layer}"]) == ("4 x [8, 32]",)
    assert shown(found[f"narrow.{layer}"]) == ("2 x [16, 32]",)
