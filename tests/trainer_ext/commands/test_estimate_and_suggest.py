"""hf-precond estimate and suggest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_ext.commands.conftest import Command
from tests.trainer_ext.tiny import tiny_gpt2
from trainer_ext.build import build_optimizer
from trainer_ext.commands.models import meta_model
from trainer_ext.commands.suggest import planned_state


def state_of(name: str, **options: Any) -> int:
    """Bytes that a real optimizer's plan has."""
    optimizer = build_optimizer(tiny_gpt2(), name, lr=1e-3, **options)
    return sum(row.state_bytes for row in optimizer.plan())


def test_estimate_is_the_plan_beside_adamw(
    as_json: Callable[..., Any], command: Command, model_folder: Path
) -> None:
    line = f"estimate --model {model_folder} --optim soap --optim_args max_dim=64"
    result = as_json(line)
    adamw, soap = result["rows"]
    tensors = len(list(tiny_gpt2().parameters()))
    assert result["parameters"] == sum(p.numel() for p in tiny_gpt2().parameters())
    assert adamw["state_bytes"]["max"] == 8 * result["parameters"] + 4 * tensors
    assert soap["state_bytes"]["max"] == state_of("soap", max_dim=64) + 4 * tensors
    assert soap["operations"]["mean"]["products"] > 0
    assert "| soap:max_dim=64 |" in command(line)


def test_ranks_share_the_state(as_json: Callable[..., Any], model_folder: Path) -> None:
    line = f"estimate --model {model_folder} --optim shared_basis_adam"
    alone, shared = (as_json(f"{line} {mesh}") for mesh in ("", "--ranks 4 --parallel fsdp2"))
    assert shared["rows"][1]["state_bytes"]["max"] < alone["rows"][1]["state_bytes"]["max"]
    assert shared["rows"][1]["sent"]
    assert not alone["rows"][1]["sent"]


def test_presets_are_models(as_json: Callable[..., Any]) -> None:
    result = as_json("estimate --model gpt2-7m --optim muon --dtype bfloat16")
    adamw = result["rows"][0]["state_bytes"]["max"]
    assert adamw == pytest.approx(4 * result["parameters"], rel=1e-3)


@pytest.mark.parametrize("name", ["two_sided_basis", "shared_basis_adam", "sketchy"])
def test_suggested_rank_is_the_largest_that_fits(
    name: str, as_json: Callable[..., Any], model_folder: Path
) -> None:
    found = as_json(f"suggest --model {model_folder} --budget 1.6x --optim {name}")
    assert found["state_bytes"] == state_of(name, rank=found["rank"]) <= found["budget_bytes"]
    more = state_of(name, rank=found["rank"] + 1)
    assert more > found["budget_bytes"] or more == state_of(name, rank=1000)
    assert f"rank={found['rank']},update_interval=1" in found["optim_args"]


def test_sizes_are_budgets_and_further_options_stay(
    as_json: Callable[..., Any], command: Command, model_folder: Path
) -> None:
    line = f"suggest --model {model_folder} --budget 90KiB --optim shared_basis_adam"
    found = as_json(line, "--optim_args", "attention_grouping=kernel")
    assert found["budget_bytes"] == 90 * 1024
    assert found["optim_args"].endswith("attention_grouping=kernel")
    shown = command(line)
    assert shown.startswith("--optim shared_basis_adam --optim_args rank=")
    assert "budget 90.0 KiB" in shown


def test_a_model_without_memory_is_planned_as_one_with(model_folder: Path) -> None:
    assert planned_state(meta_model(str(model_folder)), "soap", {}) == state_of("soap")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("suggest --model MODEL --budget lots", "budget='lots' must be a multiple of AdamW's"),
        ("suggest --model MODEL --budget 0x", "budget='0x' must be a multiple"),
        ("suggest --model MODEL --budget 1B", "two_sided_basis with rank=1 has"),
        ("suggest --model MODEL --optim muon", "optim='muon' has no rank"),
        ("suggest --model MODEL --optim mion", "Did you mean 'muon'"),
        ("suggest --model MODEL --optim_args rank=3", "has a rank already"),
        ("estimate --model MODEL --optim muon --parallel zero3", "parallel = 'zero3' must be one"),
        ("estimate --model MODEL --optim muon --dtype int8", "dtype='int8' must be one of"),
        ("estimate --model ./nowhere --optim muon", "./nowhere"),
        ("estimate --model MODEL --optim muon --ranks 0", "--ranks"),
    ],
)
def test_mistakes_take_one_line(
    error_of: Command, model_folder: Path, line: str, message: str
) -> None:
    assert message in error_of(line.replace("MODEL", str(model_folder)))
