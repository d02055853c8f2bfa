"""General rules: every trainable parameter once, with the view of its module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_precond.views.rules import (
    GENERAL_RULES,
    Assignment,
    ParamInfo,
    assign,
    assign_all,
    canonical_name,
    is_conv1d,
    iter_params,
)
from hf_precond.views.view import columns, rows


class Conv1D(nn.Module):
    """Stands for the class of transformers, which is known by its name."""

    def __init__(self, out: int, size_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size_in, out))
        self.bias = nn.Parameter(torch.zeros(out))


class Holder(nn.Module):
    """A module with one bare parameter of a given name and shape."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(9, 4)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.second.weight = self.first.weight
        self.lm_head.weight = self.wte.weight


def only(module: nn.Module, name: str = "weight") -> Assignment:
    return {info.name: found for info, found in assign_all(module)}[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("module.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("h.0._checkpoint_wrapped_module.mlp.weight", "h.0.mlp.weight"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.weight", "h.0.weight"),
        ("modules.0.weight", "modules.0.weight"),
        ("", ""),
    ],
)
def test_canonical_name(name: str, expected: str) -> None:
    assert canonical_name(name) == expected
    assert canonical_name(canonical_name(name)) == expected


def test_iter_params_keeps_the_order_and_skips_frozen_ones() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    infos = list(iter_params(model))
    assert [info.name for info in infos] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [info.module_name for info in infos] == ["0", "0", "2", "2"]
    assert [info.local_name for info in infos] == ["weight", "bias"] * 2
    assert all(info.param is getattr(info.module, info.local_name) for info in infos)


def test_iter_params_gives_tied_weights_once() -> None:
    model = TiedLanguageModel()
    infos = {info.name: info for info in iter_params(model)}
    assert infos.keys() == {"wte.weight", "first.weight"}
    assert infos["wte.weight"].tied_names == ("lm_head.weight",)
    assert infos["wte.weight"].owners == (model.wte, model.lm_head)
    assert infos["first.weight"].owners == (model.first, model.second)


def test_iter_params_gives_a_shared_module_once() -> None:
    layer = nn.Linear(2, 2)
    infos = list(iter_params(nn.ModuleDict({"a": layer, "b": layer})))
    assert [info.name for info in infos] == ["a.weight", "a.bias"]
    assert infos[0].tied_names == ()


def test_a_bare_module_has_no_prefix() -> None:
    assert [info.name for info in iter_params(nn.Linear(2, 2))] == ["weight", "bias"]


def test_a_weight_tied_to_an_embedding_follows_the_fallback_wherever_it_comes_first() -> None:
    model = TiedLanguageModel()
    assert only(model, "wte.weight").reason == "tied to an embedding"
    reordered = nn.ModuleDict({"head": model.lm_head, "tokens": model.wte})
    assert only(reordered, "head.weight") == only(model, "wte.weight")
    assert only(model, "first.weight").views == (rows((4, 4)),)


@pytest.mark.parametrize(
    ("module", "name", "views", "reason"),
    [
        (nn.Linear(4, 6), "weight", (rows((6, 4)),), "linear"),
        (nn.Linear(4, 6), "bias", (), "vector or scalar"),
        (Conv1D(6, 4), "weight", (columns((4, 6)),), "transposed linear (Conv1D)"),
        (nn.Conv2d(4, 6, 3), "weight", (rows((6, 4, 3, 3)),), "convolution"),
        (nn.Conv1d(4, 6, 3, groups=2), "weight", (rows((6, 2, 3), groups=2),), "convolution"),
        (nn.Conv2d(6, 6, 3, groups=6), "weight", (), "depthwise convolution"),
        (nn.Embedding(9, 4), "weight", (), "embedding"),
        (nn.LayerNorm(4), "weight", (), "vector or scalar"),
        (nn.LayerNorm((3, 4)), "weight", (), "norm"),
        (Holder(3, 4), "weight", (rows((3, 4)),), "matrix"),
        (Holder(3, 4, name="gate_up_proj_bias"), "gate_up_proj_bias", (), "bias"),
        (Holder(1, 5, 4), "weight", (), "no matrix view for 3 dimensions"),
        (Holder(1, 2, 3, 4), "weight", (), "no matrix view for 4 dimensions"),
        (nn.ModuleDict({"lm_head": nn.Linear(4, 6)}), "lm_head.weight", (), "output head"),
    ],
)
def test_general_rules(
    module: nn.Module, name: str, views: tuple[object, ...], reason: str
) -> None:
    found = only(module, name)
    assert found.views == views
    assert found.reason == reason


def test_three_dimensions_are_stacked_matrices() -> None:
    found = only(Holder(3, 5, 4))
    assert [view.shape for view in found.views] == [(3, 5, 4)]
    assert found.reason == "stacked matrices"


def test_conv1d_is_known_below_a_class_made_on_the_fly() -> None:
    layer = Conv1D(6, 4)
    layer.__class__ = type("FSDPConv1D", (Conv1D,), {})
    assert is_conv1d(layer)
    assert not is_conv1d(nn.Conv1d(1, 1, 1))


def test_the_first_rule_that_answers_wins() -> None:
    def my_rule(info: ParamInfo) -> Assignment | None:
        if info.name != "0.weight":
            return None
        return Assignment(views=(rows(info.param.shape, groups=2),), reason="mine")

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    found = {info.name: a.reason for info, a in assign_all(model, (my_rule, *GENERAL_RULES))}
    assert (found["0.weight"], found["1.weight"]) == ("mine", "linear")


def test_a_rule_with_a_wrong_cover_names_the_parameter() -> None:
    def wrong(info: ParamInfo) -> Assignment:
        return Assignment(views=(rows((2, 2)),), reason="wrong")

    with pytest.raises(ValueError, match=r"parameter 'weight': .* shape \(3, 4\) have a split"):
        assign_all(nn.Linear(4, 3), (wrong,))


def test_no_matching_rule_is_an_error() -> None:
    (info, *_) = iter_params(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"no view rule matches parameter 'weight' .*\(3, 4\)"):
        assign(info, (lambda info: None,))
