"""Hooks of mkdocs: pages made from the registry, and files outside of docs/ that pages link to.

``make docs`` builds the site. Pages in docs/ are written for the repository, where
``../results/c4_gpt2.png`` is beside them; on the site such files are below ``repository/``.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import hf_precond
import trainer_ext
from hf_precond import list_optimizers, option_specs
from hf_precond.registry import optimizer_info
from trainer_ext.arguments import as_text
from trainer_ext.citations import bibtex
from trainer_ext.reports import steps_to_reach
from trainer_ext.sweep_results import VariantResult, read_runs, summarise

REPOSITORY = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
HOME = "README.md"
TASKS = {
    "c4_gpt2": "language model, C4",
    "translation_multi30k": "translation, Multi30k",
    "tagger_ewt": "tagging, UD EWT",
    "autoencoder_mnist": "autoencoder, MNIST",
    "optimizers": "language model, WikiText-2",
    "layer_methods_vision": "images, CIFAR-10 subset",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_DEVIATIONS = re.compile(r"^Deviations(?: from the paper)?: *", re.MULTILINE)
_ROLES = re.compile(r":(?:meth|func|class|mod|data|attr):(?=<code>)")
BASELINE = "adamw_torch"


# --- hooks ----------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of algorithms, the API, and what pages link to outside of docs/."""
    pages = {"algorithms/index.md": index_of_algorithms(), "api.md": api_page()}
    pages |= {f"algorithms/{name}.md": algorithm_page(name) for name in list_optimizers()}
    pages |= {"index.md": (REPOSITORY / HOME).read_text(encoding="utf-8")}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for path in sorted(linked_files()):
        uri = f"{OUTSIDE}/{path}"
        files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into links of the site."""
    here = repository_path(page.file.src_uri)
    return markdown if here is None else rewrite(markdown, here, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leaves out the roles that docstrings put before names."""
    return _ROLES.sub("", html)


# --- links ----------------------------------------------------------------------------------------


def repository_path(uri: str) -> str | None:
    """Where a page of the site lies in the repository; None for one that is made here."""
    if uri == "index.md":
        return HOME
    if uri.startswith(f"{OUTSIDE}/"):
        return uri.removeprefix(f"{OUTSIDE}/")
    return None if uri.startswith("algorithms/") or uri == "api.md" else f"docs/{uri}"


def site_path(path: str) -> str:
    """Inverse of :func:`repository_path`."""
    if path == HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def rewrite(markdown: str, here: str, uri: str) -> str:
    """The links of a page, from the place in the repository to that on the site."""

    def on_site(match: re.Match[str]) -> str:
        target = resolved(match[2], here)
        if target is None:
            return match[0]
        place = posixpath.relpath(site_path(target), posixpath.dirname(uri) or ".")
        return f"{match[1]}{place}{match[3] or ''}{match[4]}"

    return _LINK.sub(on_site, markdown)


def resolved(link: str, here: str) -> str | None:
    """The file of the repository that a page's link means; None for one of the web or a folder."""
    if "://" in link or link.startswith(("mailto:", "data:")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    return path if (REPOSITORY / path).is_file() else None


@cache
def linked_files() -> frozenset[str]:
    """Files outside of docs/ that pages link to, directly or through each other."""
    waiting = [HOME, "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
    waiting += [f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")]
    seen: set[str] = set()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.endswith(".md"):
            text = (REPOSITORY / here).read_text(encoding="utf-8")
            targets = (resolved(match[2], here) for match in _LINK.finditer(text))
            waiting += [target for target in targets if target is not None]
    return frozenset(path for path in seen if path != HOME and not path.startswith("docs/"))


# --- pages of algorithms --------------------------------------------------------------------------


def index_of_algorithms() -> str:
    """All names, with one line each."""
    rows = [
        f"| [`{name}`]({name}.md) | {optimizer_info(name).summary} | {optimizer_info(name).paper} |"
        for name in list_optimizers()
    ]
    return "\n".join(["# One by one", "", "| name | what | paper |", "|---|---|---|", *rows])


def algorithm_page(name: str) -> str:
    """Idea, formula, hyperparameters, results, paper and deviations of one optimizer."""
    info = optimizer_info(name)
    idea, deviations = idea_and_deviations(name)
    parts = [
        f"# {name}\n\n{info.summary[0].upper()}{info.summary[1:]}.",
        f"```bash\n--optim {name}\n```",
        f"## Formula\n\n{info.formula}",
        f"## The method and its names in the code\n\n{idea}",
        f"## Hyperparameters\n\n{options_table(name)}",
        f"## When it helps\n\n{results_table(name)}",
        f"## Paper\n\n{info.paper}\n\n```bibtex\n{bibtex(name)}\n```",
    ]
    if deviations:
        parts.append(f"## Where it leaves the paper\n\n{deviations}")
    parts.append("[All methods, with memory and options in words](../optimizers.md)")
    return "\n\n".join(parts) + "\n"


def idea_and_deviations(name: str) -> tuple[str, str]:
    """The docstring of an algorithm's module, what it says of deviations apart, as Markdown."""
    module = sys.modules[optimizer_info(name).algorithm.__module__]
    text = inspect.cleandoc(module.__doc__ or "").replace("``", "`")
    idea, *deviations = _DEVIATIONS.split(text, maxsplit=1)
    return as_markdown(idea), as_markdown("".join(deviations))


def as_markdown(text: str) -> str:
    """Indented blocks of a docstring as code, the rest as it is; lists joined to items."""
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(block)}\n```" if block.startswith("    ") else block
        for block in re.split(r"\n\s*\n", text.strip("\n"))
        if block.strip()
    )


def options_table(name: str) -> str:
    """The method's own options, then those that all have."""
    rows = [
        f"| `{spec.name}` | {as_text(spec.default)} | {spec.allowed} | {spec.help} |"
        for spec in option_specs(name).values()
    ]
    return "\n".join(["| option | default | range | what |", "|---|---|---|---|", *rows])


def results_table(name: str) -> str:
    """What the runs in results/ say of it beside AdamW."""
    rows = [
        f"| {task} | {own.final_loss:.3f} | {base.final_loss:.3f} | {reached(own, base)} | "
        f"{own.seeds} |"
        for task, own, base in found_results(name)
    ]
    if not rows:
        return "It has not been run beside tuned AdamW on a task of [results](../results.md) yet."
    head = "| task | validation loss | AdamW's | AdamW's loss after | seeds |"
    end = "Learning rates tuned over the same grid: [results](../results.md)."
    return "\n".join([head, "|---|---:|---:|---:|---:|", *rows, "", end])


def found_results(name: str) -> Iterator[tuple[str, VariantResult, VariantResult]]:
    """Task, the optimizer's best variant, AdamW."""
    for file, task in TASKS.items():
        results = task_results(file)
        base = next((result for result in results if result.name == BASELINE), None)
        own = [result for result in results if result.runs[0]["options"]["optim"] == name]
        if base is not None and own:
            yield task, min(own, key=lambda result: result.final_loss), base


@cache
def task_results(file: str) -> list[VariantResult]:
    """The runs of a task; read once."""
    return summarise(read_runs(REPOSITORY / "results" / f"{file}.jsonl"))


def reached(own: VariantResult, base: VariantResult) -> str:
    """Share of AdamW's steps after which AdamW's final loss is reached."""
    steps = steps_to_reach(own.curve, base.final_loss)
    return "not reached" if steps is None else f"{steps / base.curve[-1][0]:.0%} of its steps"


# --- API ------------------------------------------------------------------------------------------


def api_page() -> str:
    """The public names of both packages, from their docstrings."""
    parts = ["# API"]
    for package in (hf_precond, trainer_ext):
        summary = inspect.cleandoc(package.__doc__ or "").partition("\n\n")[0]
        parts.append(f"## {package.__name__}\n\n{summary}")
        names = (name for name in package.__all__ if name != "__version__")
        parts += [f"::: {place_of(package, name)}" for name in names]
    parts.append("## trainer_ext.diagnostics")
    parts.append("::: trainer_ext.diagnostics.callback.DiagnosticsCallback")
    return "\n\n".join(parts) + "\n"


def place_of(package: Any, name: str) -> str:
    """Where a public name is written down, which is where its docstring is."""
    found = getattr(package, name)
    module = getattr(found, "__module__", package.__name__)
    return f"{module}.{getattr(found, '__name__', name)}"
