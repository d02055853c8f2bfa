"""scripts/bench_ranks.py: a run on a tiny scale, whose bytes are those of the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONTENDERS = [
    "ddp/adamw",
    "ddp/soap:sharding=owner,basis_interval=1",
    "fsdp2/shared_basis_adam:root_interval=1,start_step=1",
]
SIZES = "hidden_size=32,intermediate_size=64,num_hidden_layers=1,vocab_size=64"


@pytest.mark.slow
@pytest.mark.distributed
def test_bytes_are_as_planned(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    sizes = ["--config_overrides", SIZES, "--rounds", "1", "--cycle", "1", "--ranks", "2"]
    # As a program: the ranks it starts import the script anew.
    script = str(repository / "scripts" / "bench_ranks.py")
    command = [sys.executable, script, *sizes, "--contenders", *CONTENDERS]
    found = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    result = json.loads(output.read_text())
    adamw, soap, shared_basis = (row["ranks_2"] for row in result["rows"])
    for row in (adamw, soap, shared_basis):
        assert row["step_bytes"]["measured"] == row["step_bytes"]["planned"]
        assert row["step_ms"] > 0
    passes = adamw["passes_bytes"]
    assert passes["measured"]["all_reduce"] == passes["planned"]["all_reduce"]
    assert set(soap["step_bytes"]["planned"]) == {"all_reduce", "all_gather"}
    assert "| fsdp2/shared_basis_adam" in found.stdout
