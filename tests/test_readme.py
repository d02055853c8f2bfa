"""The README's Python runs as it stands, and its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer_ext.cli import command_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_named_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [
        (document.parent / target).resolve()
        for target in re.findall(r"\]\(([^)#:]+)\)", text)
        if "://" not in target
    ]
    paths = [ROOT / path for path in re.findall(r"(?:scripts|configs|results)/[\w/.-]+\w", text)]
    assert links or paths
    missing = [str(path) for path in links + paths if not path.exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_named_commands_exist(document: Path) -> None:
    named = set(re.findall(r"^hf-precond (\w+)", document.read_text(), re.MULTILINE))
    assert named <= set(command_names())


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"hf-precond {name}" in text or f"`{name}`" in text for name in command_names())


@pytest.mark.parametrize("target", ["demo", "test"])
def test_makefile_has_the_two_commands(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
