"""scripts/plan_memory.py: the command line, the figures of a small model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts.conftest import assert_refused, load_script

SMALL = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "vocab_size=96"]
SMALL += ["num_attention_heads=2", "num_key_value_heads=1"]
MODEL = ["--model_type", "llama", "--set", *SMALL]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/plan_memory.py"""
    return load_script("plan_memory")


def planned(script: ModuleType, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The JSON file of a run."""
    output = tmp_path / "plan.json"
    assert script.main([*MODEL, *arguments, "--output", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_state_is_a_share_of_each_rank(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = ["--ranks", "4", "--parallel", "fsdp2"]
    result = planned(script, tmp_path, *mesh, "--optims", "shared_basis_adam:rank=2", "soap")
    adamw, shared_basis, soap = result["rows"]
    parameters, tensors = result["parameters"], 2 * 9 + 3
    # Every dimension is divided by four; step counters are everywhere.
    assert adamw["state_bytes"]["max"] == 2 * 4 * parameters // 4 + 4 * tensors
    assert adamw["sent"] == []
    assert {entry["collective"] for entry in shared_basis["sent"]} == {"all_reduce"}
    assert {entry["collective"] for entry in soap["sent"]} == {"all_reduce", "all_to_all"}
    gathered = {entry["collective"]: entry for entry in result["passes"]}
    assert gathered["all_gather"]["ring_bytes"] == 2 * 4 * parameters * 3 / 4
    assert gathered["reduce_scatter"]["ring_bytes"] == 4 * parameters * 3 / 4
    assert soap["operations"]["max"]["total"] >= soap["operations"]["mean"]["total"] > 0
    assert "| shared_basis_adam:rank=2 |" in capsys.readouterr().out
    assert "--ranks 4 --parallel fsdp2" in result["command"]


def test_bf16_weights_halve_adamws_state_not_ours(script: ModuleType, tmp_path: Path) -> None:
    full = planned(script, tmp_path, "--optims", "block_adam")
    half = planned(script, tmp_path, "--optims", "block_adam", "--dtype", "bfloat16")
    state = [[row["state_bytes"]["max"] for row in result["rows"]] for result in (full, half)]
    steps = 4 * (2 * 9 + 3)
    assert 2 * (state[1][0] - steps) == state[0][0] - steps
    assert state[1][1] == state[0][1]


def test_replicas_add_an_all_reduce(script: ModuleType, tmp_path: Path) -> None:
    mesh = ["--ranks", "8", "--parallel", "hsdp", "--replicas", "2"]
    result = planned(script, tmp_path, *mesh, "--optims", "soap")
    kinds = [entry["collective"] for entry in result["passes"]]
    assert kinds == ["all_reduce", "reduce_scatter", "all_gather"]


@pytest.mark.parametrize("sharding", ["replicated", "owner"])
def test_sharding_of_all_optimizers(script: ModuleType, tmp_path: Path, sharding: str) -> None:
    arguments = ["--ranks", "4", "--sharding", sharding, "--optims", "muon"]
    muon = planned(script, tmp_path, *arguments)["rows"][1]["state_bytes"]
    assert (muon["mean"] == muon["max"]) == (sharding == "replicated")


def test_a_config_file_is_read(script: ModuleType, tmp_path: Path) -> None:
    values = dict(item.split("=") for item in SMALL)
    config = {"model_type": "llama", **{key: int(value) for key, value in values.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "plan.json"
    arguments = ["--config", str(tmp_path), "--optims", "muon", "--output", str(output)]
    assert script.main(arguments) == 0
    again = planned(script, tmp_path, "--optims", "muon")
    assert json.loads(output.read_text())["parameters"] == again["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama-9m", "--ranks", "6", "--replicas", "4"], "do not make 4 replicas"),
        (["--preset", "llama-9m", "--ranks", "4", "--replicas", "2"], "replicas are for hsdp"),
        (["--preset", "llama-9m", "--optims", "no_such"], "no_such"),
        (["--model_type", "no_such"], "no_such"),
        (["--config", "nowhere.json"], "does not exist"),
        ([*MODEL, "--sharding", "blocks", "--optims", "soap"], "blocks"),
    ],
)
def test_mistakes_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert_refused(lambda: script.main(arguments), capsys, message)
