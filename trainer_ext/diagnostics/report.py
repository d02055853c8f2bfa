"""A diagnostics report: one HTML file that needs no other, figures as PNG, and all numbers."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from trainer_ext.diagnostics.figures import draw_all
from trainer_ext.diagnostics.findings import METHODS, ROTATIONS, Advice, Window, advise
from trainer_ext.provenance import git_revision, hardware, package_versions
from trainer_ext.reports import write_json

CAPTIONS: Mapping[str, tuple[str, str]] = {
    "errors": (
        "What a rank keeps",
        "Relative error (squared Frobenius norm) of the second moments of a few output neurons of "
        "each kernel, against the rank. The closer the blue line is to the grey one, the less is "
        "lost by sharing one basis; red at rank 1 is the diagonal that Adam keeps. Dotted: the "
        "share of the trace outside of one basis, in which small directions count for more.",
    ),
    "inputs": (
        "What the layers see",
        "Sum of the largest singular values of each layer's inputs. All gradients of a layer lie "
        "in the span of its inputs: a curve that is above 80 % early leaves little outside a small "
        "basis. The dashed line is white noise of full rank.",
    ),
    "structure": (
        "Where the second moments are",
        "Squared second moments of a few weights of a kernel, ordered by output neuron (above) and "
        "by input (below), largest percent cut off, mean over tiles of 8 x 8. Blocks along the "
        "diagonal are what block preconditioners keep; the number is how much larger entries "
        "inside them are.",
    ),
    "rotation": (
        "What a rotation does",
        "Off-diagonal second moments before and after turning the gradient to the singular vectors "
        "of the look's first gradient, as AdaDiag and SOAP do. Further left is better: a diagonal "
        "second moment then misses less.",
    ),
    "run": (
        "Algorithm 1 along the steps",
        "Share of the trace that Algorithm 1 has moved to the escaped mass, by its bound, and Q_T, "
        "on which the guarantee for the escaped mass rests.",
    ),
    "kfac": (
        "K-FAC variants",
        "Distance of the inverses and steps of K-FAC variants from K-FAC that decomposes its "
        "factors at every step.",
    ),
    "health": (
        "What the optimizer in use says of itself",
        "Health figures from the logs of this run.",
    ),
}


def write_report(
    folder: Path,
    windows: Sequence[Window],
    history: Sequence[Mapping[str, Any]],
    model_name: str,
    seed: int,
) -> None:
    """Writes ``index.html``, the figures and ``findings.json``."""
    advice = [advise(window) for window in windows]
    drawn = [draw_all(window, folder, history) for window in windows]
    write_json(folder / "findings.json", _rounded(as_json(windows, advice, model_name, seed)))
    page = render(windows, advice, drawn, model_name)
    (folder / "index.html").write_text(page, encoding="utf-8")


def as_json(
    windows: Sequence[Window], advice: Sequence[Advice], model_name: str, seed: int
) -> dict[str, Any]:
    """All numbers behind the figures."""
    return {
        "model": model_name,
        "seed": seed,
        "git_revision": git_revision(Path.cwd()),
        "packages": package_versions(),
        "hardware": hardware(),
        "looks": [
            {
                "first_step": window.first,
                "steps": window.steps,
                "skipped_steps": window.skipped,
                "rank": window.rank,
                "advice": {**asdict(each), "optim_args": each.optim_args},
                "kernels": [
                    {**asdict(kernel), "input_rank": kernel.input_rank, "enough": kernel.enough}
                    for kernel in window.kernels
                ],
                "kfac": window.kfac,
            }
            for window, each in zip(windows, advice, strict=True)
        ],
    }


def render(
    windows: Sequence[Window],
    advice: Sequence[Advice],
    drawn: Sequence[Mapping[str, Path]],
    model_name: str,
) -> str:
    """The page; the last look comes first."""
    template = files("trainer_ext").joinpath("templates", "diagnostics.html").read_text("utf-8")
    looks = [
        {
            "window": window,
            "advice": each,
            "figures": [
                {"title": title, "caption": caption, "source": _embedded(paths[name])}
                for name, (title, caption) in CAPTIONS.items()
                if name in paths
            ],
        }
        for window, each, paths in zip(windows, advice, drawn, strict=True)
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            model=model_name,
            date=datetime.date.today().isoformat(),
            looks=looks[::-1],
            methods=METHODS,
            rotations=ROTATIONS,
        )
    )


def _rounded(content: Any) -> Any:
    """Numbers with five digits: more say nothing of a sample."""
    if isinstance(content, float):
        return float(f"{content:.5g}")
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list | tuple) else content


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
