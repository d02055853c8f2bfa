from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainer_ext.provenance import git_revision


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def new_repository(folder: Path) -> str:
    (folder / "results").mkdir()
    (folder / "code").mkdir()
    for name in ("results/runs.jsonl", "code/step.py"):
        (folder / name).write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_changed_code_marks_the_revision_and_results_do_not(tmp_path: Path) -> None:
    revision = new_repository(tmp_path)
    assert git_revision(tmp_path) == revision
    (tmp_path / "results/runs.jsonl").write_text("one\ntwo\n")
    (tmp_path / "notes.txt").write_text("nobody tracks this\n")
    assert git_revision(tmp_path / "code") == revision
    (tmp_path / "code/step.py").write_text("two\n")
    assert git_revision(tmp_path) == f"{revision}-dirty"
    git(tmp_path, "add", "code/step.py")
    assert git_revision(tmp_path / "results") == f"{revision}-dirty"


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_revision(tmp_path) == "unknown"
    new_repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) == "unknown"
