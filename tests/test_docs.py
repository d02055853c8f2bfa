"""The documentation site: every optimizer has its page, every link leads somewhere, it builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_precond import list_optimizers, option_specs
from hf_precond.registry import optimizer_info

pytest.importorskip("mkdocs", reason="needs the extra docs")

import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.scripts.conftest import load_script

ROOT = Path(__file__).resolve().parents[1]
site = load_script("docs_site")


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_has_a_page_with_all_parts(name: str) -> None:
    page = site.algorithm_page(name)
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    parts = ["Formula", "The method and its names in the code", "Hyperparameters"]
    assert headings[0] == name
    assert [*parts, "When it helps", "Paper"] == headings[1:6]
    assert all(f"| `{option}` |" in page for option in option_specs(name))
    assert optimizer_info(name).formula in page
    assert "```bibtex\n@" in page
    assert page.count("```") % 2 == 0


def test_results_of_a_page_are_those_of_the_files() -> None:
    page = site.algorithm_page("two_sided_basis")
    (row,) = re.findall(r"\| language model, C4 \| (.*) \|", page)
    cells = row.split(" | ")
    own, base = (
        next(result for result in site.task_results("c4_gpt2") if result.name == name)
        for name in ("two_sided_basis", "adamw_torch")
    )
    assert cells[:2] == [f"{own.final_loss:.3f}", f"{base.final_loss:.3f}"]
    for name in list_optimizers():
        has_runs = bool(list(site.found_results(name)))
        assert ("has not been run" in site.results_table(name)) != has_runs


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[a](../results/c4_gpt2.md) [b](scaling.md#limits) [c](https://x.y/z) [d](../README.md)"
    assert site.rewrite(text, "docs/results.md", "results.md") == (
        "[a](repository/results/c4_gpt2.md) [b](scaling.md#limits) [c](https://x.y/z) [d](index.md)"
    )
    assert site.rewrite("[a](docs/results.md)", "README.md", "index.md") == "[a](results.md)"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(named)
    assert yaml.safe_load(text)["theme"]["font"] is False  # nothing is fetched from elsewhere


@pytest.mark.slow
def test_the_site_builds_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {f"algorithms/{name}.html" for name in list_optimizers()} <= pages
    api = (tmp_path / "api.html").read_text()
    assert 'id="hf_precond.registry.option_specs"' in api
    assert not re.search(r":(meth|func|class):", api)
    home = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href)="https?://(?!squidfunk)[^"]*\.(css|js|woff2?)"', home)
