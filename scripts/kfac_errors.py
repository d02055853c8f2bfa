#!/usr/bin/env python
"""Errors of K-FAC variants along one training run, against K-FAC that is always up to date.

    scripts/kfac_errors.py --preset wide-cnn --data_dir FOLDER --windows 15 30
    scripts/kfac_errors.py --preset mlp --max_train_samples 2000 --update_interval 2 \\
        --variants rs_kfac:inverse_interval=10 b_kfac:brand_interval=2 --output results/kfac_errors

The diagnostics of Puiu, Brand New K-FACs (2022), section 4.2. One optimizer trains; the variants
only look on: they get the columns of one layer and keep their own state. The reference is K-FAC
that decomposes both factors at every update of them. In each window of steps, relative to it:

    input     ||A^-1 - ref|| / ||ref||, Frobenius norms, A the factor of the inputs
    output    the same for the factor of the output gradients
    step      the same for the preconditioned gradient
    angle     1 - cos(preconditioned gradient, ref)

The first two are taken at each update of the factors, the others every --step_interval steps and
averaged from update to update. A window begins where all intervals of all variants are due, at the
next such step. Variants whose state follows from the factors alone rest outside the windows.

Without --variants they are those of Table 1 there, its intervals 10, 50 and 300 in proportion to
--update_interval. Times are means over a window of update and application, of this layer alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, set_seed

from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.optim.layer_columns import LayerColumns
from hf_precond.preconditioners.base import StepContext
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.data.image_sources import SHAPES
from trainer_ext.data.images import (
    Augmentation,
    ImageData,
    ImageDataset,
    channel_statistics,
    load_images,
)
from trainer_ext.data.presets import override_config
from trainer_ext.data.vision_presets import (
    VISION_PRESETS,
    fit_to_images,
    name_labels,
    vision_preset_config,
)
from trainer_ext.kfac_observers import METRICS, REFERENCE, ObservedLayer, Observer, observed_layers
from trainer_ext.provenance import provenance
from trainer_ext.reports import show_report

# Intervals of Table 1 in units of the interval between updates of the factors.
HEAVY, NEVER = 5, 30
BY_UPDATE, BY_STEP = ("input", "output"), ("step", "angle")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, observes, and writes JSON, markdown and plot."""
    args = parse_arguments(argv)
    try:
        observer = new_observer(args)
        runs = [run(args, observer, seed) for seed in args.seeds]
    except ValueError as error:
        print(f"kfac_errors.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    result = report(runs, args, observer)
    show_report(result, format_report(result), plot, args.output)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(VISION_PRESETS), default="wide-cnn")
    parser.add_argument("--config_overrides", default="", help="of the preset, hidden_sizes=[64]")
    parser.add_argument("--layers", nargs="+", help="by name, or all; default: the largest")
    parser.add_argument("--dataset_name", help=f"as of train_classifier.py; default: {SHAPES}")
    parser.add_argument("--data_dir", help="folder with the files of MNIST or CIFAR-10")
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--random_crop_padding", type=int, default=0)
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument(
        "--optim", default="kfac", metavar="NAME[:OPTIONS]", help="the optimizer that trains"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME[:OPTIONS]",
        help="names with options as in optim_args: rs_kfac:inverse_interval=50,rank=64",
    )
    parser.add_argument(
        "--common",
        default="",
        metavar="OPTIONS",
        help="options of the reference and of all variants that have them: rank=64,damping=0.1",
    )
    parser.add_argument(
        "--update_interval", type=int, default=10, help="steps between updates of the factors"
    )
    parser.add_argument(
        "--max_columns", type=int, help="positions of a batch that are taken; default: batch_size"
    )
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument(
        "--windows", type=float, nargs="+", help="epochs done where a window begins; default: 15 30"
    )
    starts.add_argument("--start_steps", type=int, nargs="+", help="the same as steps, from 1")
    parser.add_argument("--window_steps", type=int, help=f"default: {NEVER} update intervals")
    parser.add_argument("--step_interval", type=int, default=1, help="steps between measured steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs to average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, help="path without suffix, for example results/kfac_errors"
    )
    args = parser.parse_args(argv)
    interval = args.update_interval
    if args.windows is None and args.start_steps is None:
        args.windows = [15.0, 30.0]
    args.window_steps = args.window_steps or NEVER * interval
    args.max_columns = args.max_columns or args.batch_size
    args.variants = args.variants or table_1(interval)
    for name in ("update_interval", "step_interval", "batch_size", "max_columns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be >= 1")
    if interval % args.step_interval:
        parser.error(f"--step_interval {args.step_interval} must divide --update_interval")
    if args.window_steps < 1 or args.window_steps % interval:
        parser.error(f"--window_steps {args.window_steps} must be a multiple of --update_interval")
    return args


def table_1(interval: int) -> list[str]:
    """The variants of Table 1 for an interval between updates of the factors.

    >>> table_1(10)[0], table_1(10)[3]
    ('kfac:inverse_interval=50', 'rs_kfac:inverse_interval=300')
    """
    heavy, never = HEAVY * interval, NEVER * interval
    # Sides that are too small for Brand's form follow RS-KFAC at the heavy interval.
    brand = f"brand_interval={interval},inverse_interval={heavy}"
    return [
        f"kfac:inverse_interval={heavy}",
        f"rs_kfac:inverse_interval={heavy}",
        f"rs_kfac:inverse_interval={interval}",
        f"rs_kfac:inverse_interval={never}",
        f"b_kfac:{brand}",
        f"b_kfac_c:{brand},correction_interval={heavy}",
        f"b_r_kfac:{brand},rsvd_interval={heavy}",
    ]


def new_observer(args: argparse.Namespace) -> Observer:
    """The algorithms that the command line names.

    Raises:
        ValueError: a bad option, or a variant that cannot be compared.
    """
    return Observer.of(
        args.variants,
        update_interval=args.update_interval,
        max_columns=args.max_columns,
        common=args.common,
    )


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps that are measured.

    Attributes:
        start: its first step, from 1.
        epoch: done before it.
    """

    start: int
    stop: int
    epoch: float


@dataclass(kw_only=True)
class Run:
    """What one seed gave.

    Attributes:
        losses: mean training loss of each window.
        curves: (window, layer, label) -> metric -> values, one an update of the factors.
        times: the same keys -> mean milliseconds.
    """

    windows: list[Window]
    layers: dict[str, tuple[int, int, int]]
    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    curves: dict[tuple[int, str, str], dict[str, list[float]]] = field(default_factory=dict)
    times: dict[tuple[int, str, str], dict[str, float]] = field(default_factory=dict)


def run(args: argparse.Namespace, observer: Observer, seed: int) -> Run:
    """Trains once, up to the end of the last window.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    device = torch.device(args.device)
    data = load_images(
        dataset_name=args.dataset_name,
        data_dir=args.data_dir,
        image_size=args.image_size,
        max_train_samples=args.max_train_samples,
    )
    model, images = build_model(data, args, seed)
    model.to(device).train()
    name, _, text = args.optim.partition(":")
    options = parse_optim_args(name, text).options
    optimizer = build_optimizer(model, name, lr=args.learning_rate, **options)
    layers, columns, params = observed_layers(model, observer, layers=args.layers, device=device)
    batches = Batches(images, args.batch_size, seed)
    windows = to_windows(args, observer, len(batches))
    found = Run(
        windows=windows,
        layers={layer.name: layer.shape for layer in layers},
        steps_per_epoch=len(batches),
    )
    losses: list[float] = []
    for step, batch in enumerate(batches.forever(), start=1):
        if step >= windows[-1].stop:
            break
        number = next((i for i, each in enumerate(windows) if each.start <= step < each.stop), None)
        captured = observer.wants(step)
        columns.arm({layer.slot.param: step for layer in layers} if captured else {})
        optimizer.zero_grad()
        loss = model(**{key: tensor.to(device) for key, tensor in batch.items()}).loss
        loss.backward()
        columns.collect(1.0)
        losses.append(float(loss.detach()))
        with torch.no_grad(), highest_matmul_precision():
            for layer in layers:
                observe(layer, columns, params, found, step, number, args)
        optimizer.step()
        if number is not None and step + 1 == windows[number].stop:
            found.losses.append(fmean(losses[windows[number].start - 1 :]))
        if step % 50 == 0:
            print(f"seed {seed} step {step} loss {fmean(losses[-50:]):.3f}", file=sys.stderr)
    columns.remove()
    return found


def observe(
    layer: ObservedLayer,
    columns: LayerColumns,
    params: Sequence[nn.Parameter],
    found: Run,
    step: int,
    number: int | None,
    args: argparse.Namespace,
) -> None:
    """Shows a step to all algorithms of a layer, and notes the errors inside a window."""
    grads = ((index, params[index].grad) for index in layer.slot.params)
    gradients = {index: grad for index, grad in grads if grad is not None}
    g_GMB = layer.slot.to_blocks(gradients).float()
    ctx = StepContext(
        step=step,
        phases=[0.0] * len(g_GMB),
        steps_per_epoch=found.steps_per_epoch,
        columns=columns.columns(layer.slot, gradients),
    )
    if number is None:
        layer.follow(g_GMB, ctx)
        return
    window = found.windows[number]
    since = step - window.start
    if since == 0:
        layer.begin_window()
    measured = layer.measure(
        g_GMB,
        ctx,
        inverses=since % args.update_interval == 0,
        directions=since % args.step_interval == 0,
    )
    for label, values in measured.items():
        curves = found.curves.setdefault(
            (number, layer.name, label), {metric: [] for metric in METRICS}
        )
        for metric, value in values.items():
            curves[metric].append(value)
    if step + 1 == window.stop:
        samples = args.update_interval // args.step_interval
        for label, times in layer.end_window().items():
            key = number, layer.name, label
            found.times[key] = times
            for metric in BY_STEP:
                found.curves[key][metric] = means_of(found.curves[key][metric], samples)


def means_of(values: Sequence[float], size: int) -> list[float]:
    """Means of consecutive parts of a size.

    >>> means_of([1.0, 3.0, 5.0, 7.0], 2)
    [2.0, 6.0]
    """
    return [fmean(values[start : start + size]) for start in range(0, len(values), size)]


def to_windows(args: argparse.Namespace, observer: Observer, steps_per_epoch: int) -> list[Window]:
    """The windows in order, each moved to the next step at which all intervals are due.

    Raises:
        ValueError: windows that overlap.
    """
    if args.start_steps is not None:
        asked = list(args.start_steps)
    else:
        asked = [math.floor(epoch * steps_per_epoch) + 1 for epoch in args.windows]
    alignment = observer.alignment()
    starts = sorted(math.ceil((step - 1) / alignment) * alignment + 1 for step in asked)
    for start, later in pairwise(starts):
        if later < start + args.window_steps:
            raise ValueError(
                f"windows of {args.window_steps} steps overlap: they begin at {starts}, the steps "
                f"at which all intervals are due ({alignment} apart)"
            )
    return [
        Window(start=step, stop=step + args.window_steps, epoch=(step - 1) / steps_per_epoch)
        for step in starts
    ]


def build_model(
    data: ImageData, args: argparse.Namespace, seed: int
) -> tuple[nn.Module, ImageDataset]:
    """A new model for the images, and the training images normalised by their own statistics.

    Raises:
        ValueError: overrides that do not fit the configuration or the images.
    """
    config = vision_preset_config(args.preset)
    if args.config_overrides:
        override_config(config, args.config_overrides)
    config = fit_to_images(config, num_channels=data.num_channels, image_size=data.image_size)
    name_labels(config, data.label_names)
    set_seed(seed)
    model = AutoModelForImageClassification.from_config(config)
    augmentation = None
    if args.random_crop_padding or args.random_flip:
        augmentation = Augmentation(
            padding=args.random_crop_padding, flip=args.random_flip, seed=seed
        )
    mean, std = channel_statistics(data.train)
    return model, ImageDataset(data.train, mean=mean, std=std, augmentation=augmentation)


class Batches:
    """Full batches of an image data set, epoch after epoch, in an order of the seed alone.

    Raises:
        ValueError: fewer images than a batch has.
    """

    def __init__(self, images: ImageDataset, batch_size: int, seed: int) -> None:
        if len(images) < batch_size:
            raise ValueError(f"--batch_size {batch_size} is more than the {len(images)} images")
        self._images = images
        self._loader = torch.utils.data.DataLoader(
            images,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def forever(self) -> Iterator[dict[str, Tensor]]:
        """All batches, without end."""
        epoch = 0
        while True:
            self._images.begin_epoch(epoch)
            yield from self._loader
            epoch += 1


# --- the report -----------------------------------------------------------------------------------


def report(runs: Sequence[Run], args: argparse.Namespace, observer: Observer) -> dict[str, Any]:
    """Curves and averages over the runs, and everything needed to repeat them."""
    first = runs[0]
    rows = [
        {
            "window": number,
            "layer": layer,
            "variant": label,
            "averages": {
                metric: fmean(fmean(each.curves[key][metric]) for each in runs)
                for metric in METRICS
            },
            "times_ms": {
                what: fmean(each.times[key][what] for each in runs) for what in first.times[key]
            },
            "curves": {
                metric: mean_curve([each.curves[key][metric] for each in runs])
                for metric in METRICS
            },
        }
        for key in first.curves
        for number, layer, label in [key]
    ]
    return {
        **provenance(__file__, args),
        "device": args.device,
        "data": data_name(args),
        "layers": {name: list(shape) for name, shape in first.layers.items()},
        "steps_per_epoch": first.steps_per_epoch,
        "update_interval": args.update_interval,
        "windows": [
            {
                "start_step": window.start,
                "epoch": window.epoch,
                "steps": window.stop - window.start,
                "training_loss": fmean(each.losses[number] for each in runs),
            }
            for number, window in enumerate(first.windows)
        ],
        "seeds": args.seeds,
        "rows": rows,
    }


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Means over curves, point by point.

    >>> mean_curve([[1.0, 2.0], [3.0, 6.0]])
    [2.0, 4.0]
    """
    return [fmean(values) for values in zip(*curves, strict=True)]


def data_name(args: argparse.Namespace) -> str:
    """The data set by name: the folder's own, never a path of this machine."""
    return (args.data_dir and Path(args.data_dir).name) or args.dataset_name or SHAPES


def format_report(result: Mapping[str, Any]) -> str:
    """A table per window and layer, in Markdown."""
    parts = []
    seeds = len(result["seeds"])
    for number, window in enumerate(result["windows"]):
        for layer, (groups, rows, columns) in result["layers"].items():
            stack = f"{groups} of " if groups > 1 else ""
            lines = [
                f"{layer} ({stack}{rows} x {columns}), {result['data']}, {window['steps']} steps "
                f"from step {window['start_step']} (epoch {window['epoch']:.1f}, training loss "
                f"{window['training_loss']:.3f}), {seeds} run{'s' * (seeds > 1)}",
                "",
                f"| variant | {' | '.join(METRICS.values())} | ms a step: update | apply |",
                f"|---|{'---:|' * (len(METRICS) + 2)}",
            ]
            for row in result["rows"]:
                if (row["window"], row["layer"]) == (number, layer):
                    cells = [f"{row['averages'][metric]:.2e}" for metric in METRICS]
                    cells += [f"{row['times_ms'][what]:.1f}" for what in ("update", "apply")]
                    lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws four panels per window and layer, errors logarithmic over steps, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(n, layer) for n in range(len(result["windows"])) for layer in result["layers"]]
    figure, axes = plt.subplots(
        len(panels),
        len(METRICS),
        figsize=(4 * len(METRICS), 3.2 * len(panels) + 0.8),
        layout="constrained",
        squeeze=False,
    )
    for (number, layer), row in zip(panels, axes, strict=True):
        start = result["windows"][number]["start_step"]
        for axis, (metric, words) in zip(row, METRICS.items(), strict=True):
            for entry in result["rows"]:
                own = (entry["window"], entry["layer"]) == (number, layer)
                if own and entry["variant"] != REFERENCE:
                    values = entry["curves"][metric]
                    steps = [start + result["update_interval"] * i for i in range(len(values))]
                    # What is exact, as K-FAC at its refresh, has no place on a logarithmic axis.
                    shown_values = [value if value > 0 else math.nan for value in values]
                    axis.plot(steps, shown_values, marker=".", label=entry["variant"])
            axis.set(yscale="log", xlabel="step", title=f"{layer}: {words}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("relative error")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
