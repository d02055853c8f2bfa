"""The commands of docs/quickstart.md, in their order, as a new user runs them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    line
    for block in re.findall(
        r"```bash\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL
    )
    for line in block.splitlines()
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_fifteen_minutes(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shown = {}
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        assert program == "hf-precond"
        done = subprocess.run(
            [sys.executable, "-m", "trainer_ext", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        shown[line] = done.stdout
    (first, second) = (text for line, text in shown.items() if " train " in line)
    loss = re.compile(r"validation loss ([0-9.]+)")
    assert loss.search(first)[1] == loss.search(second)[1]
    (listed,) = (text for line, text in shown.items() if " push " in line)
    assert "last-checkpoint/optimizer.safetensors" in listed
    assert "nothing uploaded" in listed


def test_all_commands_are_in_it() -> None:
    named = {shlex.split(line)[1] for line in COMMANDS}
    assert named >= {"list", "info", "explain", "estimate", "suggest", "train", "inspect", "push"}
