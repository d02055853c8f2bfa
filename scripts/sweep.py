#!/usr/bin/env python
"""Runs a training script over a grid and collects one JSON line per run.

    scripts/sweep.py configs/bench/wikitext2_gpt2_7m.yaml
    scripts/sweep.py configs/bench/wikitext2_gpt2_7m.yaml --only adamw_torch --set max_steps=100

The YAML file may name the `script` (scripts/train_lm.py, or scripts/train_classifier.py) and has
three mappings: `base` (options all runs share), `grid` (option -> values, all
combinations are run) and `variants` (name -> options of that variant, where a list extends or
replaces the grid). A run that is in the results file already is skipped, so an interrupted sweep is
continued by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer_ext.config_file import check_keys, read_yaml_mapping, to_arguments
from trainer_ext.provenance import git_revision, hardware, package_versions

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN_SCRIPTS = ("scripts/train_lm.py", "scripts/train_classifier.py")
SECTIONS = ("base", "grid", "variants")


@dataclass(frozen=True)
class Run:
    """One training run: the variant it belongs to and its complete options."""

    variant: str
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of variant and options: equal keys are equal runs."""
        content = json.dumps([self.variant, self.options], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing; returns the number of failed runs as the exit status."""
    args = parse_arguments(argv)
    try:
        script, config = read_sweep(args.config)
        runs = select(expand(config, parse_overrides(args.set)), args.only)
    except ValueError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    results = args.results or Path("results") / f"{args.config.stem}.jsonl"
    done = finished_keys(results)
    waiting = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them in {results}")
    failures = 0
    for number, run in enumerate(waiting, start=1):
        print(f"[{number}/{len(waiting)}] {label(run, config)}", flush=True)
        if args.dry_run:
            continue
        record = execute(run, args.work_dir / args.config.stem / run.key, script)
        if record is None:
            failures += 1
            continue
        append_record(results, record)
        print(f"    eval_loss {record['metrics'].get('eval_loss')}, {record['wall_time_s']:.0f} s")
    return min(failures, 1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the sweep itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file with base, grid and variants")
    parser.add_argument("--results", type=Path, help="JSON lines; results/<config name>.jsonl")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/sweep"), help="run folders")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants only")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change options of all runs"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs that are missing")
    return parser.parse_args(argv)


# --- what to run ----------------------------------------------------------------------------------


def read_sweep(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The training script and the three sections of a sweep file, empty where they are missing.

    Raises:
        ValueError: an unknown section or script, a section that is no mapping, or no variant.
    """
    content = read_yaml_mapping(path)
    check_keys(content, ("script", *SECTIONS))
    script = content.get("script", TRAIN_SCRIPTS[0])
    if script not in TRAIN_SCRIPTS:
        raise ValueError(
            f"script = {script!r} in {str(path)!r} must be one of {', '.join(TRAIN_SCRIPTS)}"
        )
    config = {section: content.get(section) or {} for section in SECTIONS}
    for section, value in config.items():
        if not isinstance(value, dict):
            raise ValueError(f"{section} in {str(path)!r} must be a mapping")
    if not config["variants"]:
        raise ValueError(f"variants in {str(path)!r} must name at least one variant")
    return script, config


def expand(
    config: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any] | None = None
) -> list[Run]:
    """All runs of a sweep; a variant's own values win over the grid, the grid over the base.

    `overrides` win over all of them.
    """
    runs = []
    for variant, own in config["variants"].items():
        options = {**config["base"], **config["grid"], **(own or {}), **(overrides or {})}
        # Only the sections for axes turn a list into several runs: in `base` it is a plain value.
        axes = {
            key: value
            for key, value in options.items()
            if isinstance(value, list) and (key in config["grid"] or key in (own or {}))
        }
        for values in itertools.product(*axes.values()):
            chosen = {**options, **dict(zip(axes, values, strict=True))}
            runs.append(Run(variant, {key: as_number(value) for key, value in chosen.items()}))
    return runs


def as_number(value: Any) -> Any:
    """A number for a string that is one: YAML reads 1e-3, without a dot, as a string.

    >>> as_number("1e-3"), as_number("none")
    (0.001, 'none')
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings with YAML values.

    Raises:
        ValueError: an item without `=`.

    >>> parse_overrides(["max_steps=10", "seed=[0, 1]"])
    {'max_steps': 10, 'seed': [0, 1]}
    """
    overrides = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be KEY=VALUE")
        overrides[key] = yaml.safe_load(value)
    return overrides


def select(runs: list[Run], variants: Sequence[str] | None) -> list[Run]:
    """The runs of the named variants, all for None.

    Raises:
        ValueError: a name that no run has.
    """
    if variants is None:
        return runs
    known = sorted({run.variant for run in runs})
    for variant in variants:
        if variant not in known:
            raise ValueError(f"--only {variant!r} must be one of {', '.join(known)}")
    return [run for run in runs if run.variant in variants]


def label(run: Run, config: Mapping[str, Mapping[str, Any]]) -> str:
    """The variant and the values of the grid's options."""
    values = (f"{key}={run.options[key]}" for key in config["grid"])
    return f"{run.variant} {' '.join(values)}"


# --- one run --------------------------------------------------------------------------------------


def execute(run: Run, folder: Path, script: str) -> dict[str, Any] | None:
    """Trains in a fresh process; returns the record, or None and the log's tail for a failure."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments = to_arguments(run.options)
    command = [
        sys.executable,
        str(REPOSITORY / script),
        *arguments,
        f"--output_dir={folder}",
        "--disable_tqdm=true",
    ]
    log = folder / "train.log"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    wall_time_s = time.perf_counter() - started
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        print(f"    failed with exit status {code}, see {log}", *tail, sep="\n    ")
        return None
    return {
        "key": run.key,
        "variant": run.variant,
        "seed": run.options.get("seed", 42),
        "options": dict(run.options),
        "command": [script, *arguments],
        "git_revision": git_revision(REPOSITORY),
        "packages": package_versions(),
        "hardware": hardware(),
        "wall_time_s": round(wall_time_s, 1),
        **read_run(folder),
    }


def read_run(folder: Path) -> dict[str, Any]:
    """Curves as [step, loss] pairs and final metrics, from the files the Trainer wrote."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "train_loss": curve(history, "loss"),
        "eval_loss": curve(history, "eval_loss"),
        "metrics": json_numbers(json.loads((folder / "all_results.json").read_text())),
    }


def curve(history: Iterable[Mapping[str, Any]], name: str) -> list[list[float]]:
    """[step, value] of one logged figure; the last entry counts where a step was logged twice.

    >>> curve([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}], "loss")
    [[1, 2.0]]
    """
    values = {entry["step"]: entry[name] for entry in history if name in entry}
    return [[step, _json_number(value)] for step, value in sorted(values.items())]


def json_numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics with None for values that JSON cannot hold, as of a diverged run."""
    return {key: _json_number(value) for key, value in metrics.items()}


# --- results --------------------------------------------------------------------------------------


def finished_keys(results: Path) -> set[str]:
    """Keys of the runs in the results file."""
    if not results.is_file():
        return set()
    lines = results.read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["key"] for line in lines if line.strip()}


def append_record(results: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
