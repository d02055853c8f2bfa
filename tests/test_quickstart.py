"""The commands of docs/quickstart.md, in their order, as a new user runs them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer_ext.hub_server import TOKEN, Hub, loopback_hub

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
    with loopback_hub() as hub:
        shown = {line: run(line, tmp_path, hub) for line in COMMANDS}
    first, second, third = (text for line, text in shown.items() if " train " in line)
    loss = re.compile(r"validation loss ([0-9.]+)")
    assert loss.search(first)[1] == loss.search(second)[1]  # type: ignore[index]
    assert float(loss.search(third)[1]) < float(loss.search(first)[1])  # type: ignore[index]
    listed, _ = (text for line, text in shown.items() if " push " in line)
    assert "last-checkpoint/optimizer.safetensors" in listed
    assert "nothing uploaded" in listed
    assert "rank=" in (tmp_path / "outputs" / "look" / "index.html").read_text()
    published = hub.repos["your-name/first"]["main"]
    assert {"README.md", "model.safetensors", "training_curves.png"} <= set(published)
    assert "license: apache-2.0" in published["README.md"].decode()
    assert "model-index:" in published["README.md"].decode()


def run(line: str, folder: Path, hub: Hub) -> str:
    """Runs a command of the page and returns what it prints."""
    program, *arguments = shlex.split(line)
    own = [sys.executable, "-m", "trainer_ext"]
    start = {"hf-precond": own, "hf": [str(Path(sys.executable).with_name("hf"))]}[program]
    done = subprocess.run(
        [*start, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_all_commands_are_in_it() -> None:
    named = {shlex.split(line)[1] for line in COMMANDS if line.startswith("hf-precond")}
    steps = ("list", "info", "explain", "estimate", "suggest", "diagnose", "train", "inspect")
    assert named >= {*steps, "card", "push"}
