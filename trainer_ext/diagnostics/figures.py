"""The figures of a diagnostics report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer_ext.callbacks import HEALTH_PREFIX
from trainer_ext.diagnostics.collect import evenly
from trainer_ext.diagnostics.findings import METHODS, KernelFindings, Window
from trainer_ext.kfac_observers import METRICS

Draw = Callable[[Axes, KernelFindings], None]

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 130,
    "legend.frameon": False,
}
_COLORS = {
    "separate": "#7a7a7a",
    "shared": "#1f5fa8",
    "online": "#58a6e8",
    "frequent directions": "#b0792b",
    "block diagonal": "#b3352e",
}
_ACROSS = 4


def draw_all(window: Window, folder: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Draws what there is to draw; what figure -> its file."""
    figures = {
        "structure": structure(window),
        "inputs": inputs(window),
        "errors": errors(window),
        "rotation": rotation(window),
        "run": run(window),
        "kfac": kfac(window),
        "health": health(history),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"{name}-step-{window.first}.png"
            figure.savefig(paths[name], bbox_inches="tight")
    return paths


def structure(window: Window) -> Figure:
    """Second moments of a few weights, in both orderings (paper 001, Figure 1)."""
    shown = _spread(window.kernels, 4)
    with _styled():
        figure = Figure(figsize=(2.2 * len(shown), 4.6))
        axes = figure.subplots(2, len(shown), squeeze=False)
        for column, kernel in zip(axes.T, shown, strict=True):
            images = window.pictures[kernel.name].structure
            for axis, (ordering, image) in zip(column, images.items(), strict=True):
                axis.imshow(image.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
                axis.set_xlabel(f"{ordering}: {kernel.block_shares[ordering]:.1f}")
            column[0].set_title(_short(kernel.name))
    return figure


def inputs(window: Window) -> Figure | None:
    """Singular values of what the layers have seen (paper 001, Figure 2)."""
    seen = [kernel for kernel in window.kernels if kernel.spectrum]
    by_layer = {kernel.name.partition("[")[0]: kernel for kernel in seen}
    if not by_layer:
        return None
    with _styled():
        figure = Figure(figsize=(6.4, 3.4))
        axis = figure.subplots()
        colors = mpl.colormaps["viridis"]
        for number, (name, kernel) in enumerate(by_layer.items()):
            held, values = [0.0], kernel.spectrum
            for value in values:
                held.append(held[-1] + value)
            places = [index / len(values) for index in range(len(held))]
            color = colors(number / max(1, len(by_layer) - 1))
            axis.plot(places, held, color=color, linewidth=1, label=_short(name))
        axis.axhline(0.8, color="black", linewidth=0.8, linestyle=":")
        axis.plot([0, 1], [0, 1], color="black", linewidth=0.5, linestyle="--")
        axis.set(xlabel="share of the rank", ylabel="sum of singular values")
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def errors(window: Window) -> Figure:
    """Error of each way to keep the second moments, against rank (paper 001, Figure 5)."""

    def draw(axis: Axes, kernel: KernelFindings) -> None:
        for method, label in METHODS.items():
            curve = kernel.errors[method]
            axis.plot(
                list(curve), list(curve.values()), color=_COLORS[method], label=label, marker=".",
                markersize=3, linewidth=1,
            )  # fmt: skip
        for style, (label, curve) in zip(("--", "-."), kernel.head_errors.items(), strict=False):
            axis.plot(
                list(curve), list(curve.values()), color="#2e8b57", linestyle=style, linewidth=1,
                label=label,
            )  # fmt: skip
        missed = kernel.trace_missed
        axis.plot(
            list(missed), list(missed.values()), color="#1f5fa8", linestyle=":", linewidth=1,
            label="trace outside of one basis",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(ylim=(0, 1.02), xlabel="rank", ylabel="relative error")

    return _small_multiples(window.kernels, draw)


def rotation(window: Window) -> Figure | None:
    """Off-diagonal second moments, before and after rotation (paper 003, Figures 1 and 9)."""
    shown = _spread([each for each in window.kernels if len(each.off_diagonal) > 1], 4)
    if not shown:
        return None

    def draw(axis: Axes, kernel: KernelFindings) -> None:
        colors = ("#b3352e", "#d9a441", "#1f5fa8")
        values = window.pictures[kernel.name].off_diagonal
        for color, (label, entries) in zip(colors, values.items(), strict=True):
            sizes = entries.abs().clamp(min=1e-9).log10().clamp(min=-7)
            axis.hist(
                sizes.numpy(), bins=70, range=(-7, 2), density=True, histtype="step", color=color,
                label=f"{label}: {kernel.off_diagonal[label]:.0%}",
            )  # fmt: skip
        axis.set(xlabel="log10 |entry| / mean diagonal", yticks=[], xlim=(-7, 4.5))
        axis.legend(fontsize=6, loc="upper right", title="off the diagonal", title_fontsize=6)

    return _small_multiples(shown, draw, legend=False, across=2, size=(3.4, 2.2))


def run(window: Window) -> Figure:
    """Escaped mass and Q_T of Algorithm 1 along the steps of a look."""
    with _styled():
        figure = Figure(figsize=(6.4, 2.6))
        escaped, alignment = figure.subplots(1, 2)
        colors = mpl.colormaps["viridis"]
        for number, kernel in enumerate(window.kernels):
            color = colors(number / max(1, len(window.kernels) - 1))
            steps = range(window.first, window.first + len(kernel.run.escaped))
            escaped.plot(steps, kernel.run.escaped, color=color, linewidth=1)
            alignment.plot(
                steps, kernel.run.alignment, color=color, linewidth=1, label=_short(kernel.name)
            )
        title = f"escaped share of the trace, rank {window.rank}"
        escaped.set(ylim=(0, 1), xlabel="step", title=title)
        alignment.set(ylim=(0, 1), xlabel="step", title="Q_T, mean over blocks")
        alignment.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def kfac(window: Window) -> Figure | None:
    """Errors of K-FAC variants against K-FAC at every step (paper 002, section 4.2)."""
    if not window.kfac:
        return None
    with _styled():
        figure = Figure(figsize=(9.6, 2.0 * len(window.kfac)))
        axes = figure.subplots(len(window.kfac), len(METRICS), squeeze=False)
        for row, (layer, variants) in zip(axes, window.kfac.items(), strict=True):
            for axis, (metric, title) in zip(row, METRICS.items(), strict=True):
                for label, curves in variants.items():
                    values = [max(value, 1e-9) for value in curves[metric]]
                    axis.plot(
                        range(window.first, window.first + len(values)), values, linewidth=1,
                        label=label,
                    )  # fmt: skip
                axis.set_yscale("log")
                axis.set_title(title)
            row[0].set_ylabel(_short(layer))
        figure.tight_layout()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return figure


def health(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What the optimizer in use has said of itself in the logs, where it is one of ours."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith(HEALTH_PREFIX):
                points = series.setdefault(name.removeprefix(HEALTH_PREFIX), [])
                points.append((entry["step"], value))
    telling = {name: points for name, points in series.items() if any(y for _, y in points)}
    if not telling:
        return None
    columns, rows = min(len(telling), _ACROSS), ceil(len(telling) / _ACROSS)
    with _styled():
        figure = Figure(figsize=(2.6 * columns, 2.2 * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (name, points) in zip(axes.flat, telling.items(), strict=False):
            axis.plot(*zip(*points, strict=True), linewidth=1, color="#1f5fa8")
            axis.set(title=name.replace("_", " "), xlabel="step")
        for axis in axes.flat[len(telling) :]:
            axis.set_visible(False)
        figure.tight_layout()
    return figure


def _small_multiples(
    kernels: Sequence[KernelFindings],
    draw: Draw,
    *,
    legend: bool = True,
    across: int = _ACROSS,
    size: tuple[float, float] = (2.4, 2.0),
) -> Figure:
    """A small plot for each kernel."""
    columns = min(len(kernels), across)
    rows = ceil(len(kernels) / columns)
    with _styled():
        figure = Figure(figsize=(size[0] * columns, size[1] * rows))
        axes = figure.subplots(rows, columns, squeeze=False, sharey=legend)
        for axis, kernel in zip(axes.flat, kernels, strict=False):
            draw(axis, kernel)
            axis.set_title(_short(kernel.name))
            if legend:
                axis.label_outer()
        for axis in axes.flat[len(kernels) :]:
            axis.set_visible(False)
        figure.tight_layout()
        if legend:
            known = {
                label: handle
                for axis in axes.flat
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            figure.legend(
                known.values(), known.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3
            )
    return figure


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(_STYLE):
        yield


def _spread(kernels: Sequence[KernelFindings], most: int) -> list[KernelFindings]:
    """At most so many, evenly from all."""
    return [kernels[index] for index in evenly(len(kernels), most).tolist()]


def _short(name: str) -> str:
    """A module's name without what all have in common, the end of a long one."""
    common = ("model", "transformer", "layers", "h")
    return ".".join(part for part in name.split(".") if part not in common)[-34:]
