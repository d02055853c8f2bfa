"""hf-precond list and info."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_precond import create_optimizer
from hf_precond.registry import list_optimizers, optimizer_info, option_specs
from tests.trainer_ext.commands.conftest import Command
from trainer_ext.commands.info import numbers_per_weight, state_tensors
from trainer_ext.commands.output import print_table

# What looks into layers; everything else needs gradients only.
OF_LAYERS = {
    *("ng_plus_per_sample", "kfac", "rs_kfac", "sre_kfac", "b_kfac", "b_r_kfac", "b_kfac_c"),
    "seng",
}


def test_list_says_what_each_needs(as_json: Callable[..., Any], command: Command) -> None:
    rows = as_json("list")
    assert [row["name"] for row in rows] == list(list_optimizers())
    assert {row["name"] for row in rows if row["needs"]} == OF_LAYERS
    lines = command("list").splitlines()
    assert len(lines) == 1 + len(rows)
    column = lines[0].index("needs")
    assert lines[1 + [row["name"] for row in rows].index("kfac")][column:].startswith("layers")


@pytest.mark.parametrize("name", list_optimizers())
def test_info_tells_all_of_every_optimizer(
    name: str, as_json: Callable[..., Any], command: Command
) -> None:
    found = as_json("info", name)
    assert found["formula"] == optimizer_info(name).formula
    assert len(found["formula"]) > 40
    assert [row["name"] for row in found["options"]] == list(option_specs(name))
    shown = command("info", name)
    assert found["formula"] in shown
    assert found["paper"] in shown
    assert all(key in shown for key in found["state"])


@pytest.mark.parametrize("name", list_optimizers())
def test_state_in_terms_of_m_and_n_is_that_of_another_layer(name: str) -> None:
    """The symbols, read from one shape, give the bytes of another."""
    tensors = state_tensors(name)
    tiny = name == "full_matrix_adagrad"
    m, n = (16, 24) if tiny else (640, 1000)
    values = {"m": m, "n": n, "m n": m * n, "m/4": m // 4, "n/8": n // 8}
    counted = sum(
        torch.Size([values[s] if s in values else int(s) for s in sizes]).numel()
        for sizes in tensors.values()
    )
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(n, m, bias=False))
    layout = create_optimizer(model, name).state_layout()
    assert counted == sum(tensor.numel() for _, _, tensor in layout if tensor.ndim)


def test_numbers_per_weight() -> None:
    assert numbers_per_weight("muon") == 1
    assert state_tensors("shampoo")["left_root"] == ["m", "m"]


def test_wrong_names_have_the_nearest(error_of: Command) -> None:
    assert "Did you mean 'shampoo'?" in error_of("info shampo")


def test_terminals_get_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    print_table(("a", "b"), [("one", "word " * 12)])
    assert len(capsys.readouterr().out.splitlines()) > 3
