#!/usr/bin/env python
"""Runs a training script over a grid and collects one JSON line per run.

    scripts/sweep.py configs/bench/wikitext2_gpt2_7m.yaml
    scripts/sweep.py configs/bench/wikitext2_gpt2_7m.yaml --only adamw_torch --set max_steps=100

The YAML file may name the `script` (scripts/train_lm.py, or another scripts/train_*.py) and has
mappings:

    base      options that all runs share
    grid      option -> values; all combinations are run
    variants  name -> options of that variant, where a list extends or replaces the grid
    random    a random search beside the grid: `trials`, `seed`, `log_uniform` (option ->
              [low, high]) and `one_minus` (option -> [low, high] of what it lacks to one); every
              combination of the grid has the same trials, so that draws are equal for all variants

`extends` names another such file, whose sections count where this one has none; options of `base`
are added to its own. A run that is in the results file already is skipped, so an interrupted sweep
is continued by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trainer_ext.config_file import check_keys, read_yaml_mapping, to_arguments
from trainer_ext.provenance import git_revision, hardware, package_versions
from trainer_ext.reports import read_records
from trainer_ext.step_times import ELAPSED

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_SCRIPT = "scripts/train_lm.py"
SECTIONS = ("base", "grid", "variants", "random")
EXTENDS = "extends"
RANGES = ("log_uniform", "one_minus")


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
    """Runs what is missing; returns 1 where a run failed, 2 where nothing could be run."""
    args = parse_arguments(argv)
    try:
        script, config = read_sweep(args.config)
        runs = select(expand(config, parse_overrides(args.set)), args.only)
        results = args.results or Path("results") / f"{args.config.stem}.jsonl"
        folder = args.work_dir / args.config.stem
        lock = None if args.dry_run else alone_in(folder)
        done = finished_keys(results)
    except ValueError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    waiting = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them in {results}")
    if lock is None:
        print(*(label(run, config) for run in waiting), sep="\n")
        return 0
    try:
        return run_all(waiting, config, script, results, folder, jobs=args.jobs)
    finally:
        lock.release()


def run_all(
    runs: Sequence[Run],
    config: Mapping[str, Mapping[str, Any]],
    script: str,
    results: Path,
    folder: Path,
    *,
    jobs: int,
) -> int:
    """Runs and appends to the results file; returns 1 where a run failed, 0 otherwise."""
    failures = 0
    with cancelled_at_exit(ThreadPoolExecutor(jobs)) as pool:
        futures = {
            pool.submit(execute, run, folder / run.key, script, jobs=jobs): run for run in runs
        }
        for number, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            print(f"[{number}/{len(runs)}] {label(futures[future], config)}: ", end="")
            if isinstance(result, str):
                failures += 1
                print(result, flush=True)
                continue
            append_record(results, result)
            loss, wall_time_s = result["metrics"].get("eval_loss"), result["wall_time_s"]
            print(f"eval_loss {loss}, {wall_time_s:.0f} s", flush=True)
    return min(failures, 1)


def alone_in(folder: Path) -> FileLock:
    """Lets one sweep at a time into the folder of the runs: two would empty each other's.

    Raises:
        ValueError: another sweep works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another sweep works in {str(folder)!r}: wait for it, or give another --work_dir"
        ) from None
    return lock


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
    parser.add_argument(
        *("--jobs", "-j"),
        type=positive,
        default=1,
        help="runs at a time, which share the cores: losses are the same, times are not comparable",
    )
    return parser.parse_args(argv)


@contextmanager
def cancelled_at_exit(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A pool that begins nothing more once its user has left, as by Ctrl-C."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


# --- what to run ----------------------------------------------------------------------------------


def read_sweep(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The training script and the sections of a sweep file, empty where they are missing.

    Raises:
        ValueError: an unknown section or script, a section that is no mapping, no variant, or a
            random search without number of trials or ranges.
    """
    content = read_yaml_mapping(path)
    check_keys(content, ("script", EXTENDS, *SECTIONS))
    inherited: dict[str, dict[str, Any]] = {}
    if EXTENDS in content:
        script, inherited = read_sweep(path.parent / str(content[EXTENDS]))
        content = {"script": script, **inherited, **content}
    script = content.get("script", DEFAULT_SCRIPT)
    known = train_scripts()
    if script not in known:
        raise ValueError(f"script = {script!r} in {str(path)!r} must be one of {', '.join(known)}")
    config = {section: content.get(section) or {} for section in SECTIONS}
    for section, value in config.items():
        if not isinstance(value, dict):
            raise ValueError(f"{section} in {str(path)!r} must be a mapping")
    config["base"] = {**inherited.get("base", {}), **config["base"]}
    if not config["variants"]:
        raise ValueError(f"variants in {str(path)!r} must name at least one variant")
    if config["random"]:
        check_random(config["random"], path)
    return script, config


def train_scripts() -> list[str]:
    """All training scripts of the repository."""
    return sorted(f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("train_*.py"))


def check_random(section: Mapping[str, Any], path: Path) -> None:
    """Checks the section of a random search.

    Raises:
        ValueError: an unknown key, no whole number of trials, or a range that is none.
    """
    check_keys(section, ("trials", "seed", *RANGES))
    trials = section.get("trials")
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials = {trials!r} in {str(path)!r} must be a whole number from 1 on")
    ranges = searched_ranges(section)
    if not ranges:
        raise ValueError(f"log_uniform in {str(path)!r} must map options to [low, high]")
    for option, (_, pair) in ranges.items():
        low, high = (as_number(end) for end in pair) if len(pair) == 2 else (1.0, 0.0)
        if not 0 < low < high:
            raise ValueError(
                f"{option}: {pair} in {str(path)!r} must be [low, high], 0 < low < high"
            )


def expand(
    config: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any] | None = None
) -> list[Run]:
    """All runs of a sweep; a variant's own values win over trials, trials over the grid, the grid
    over the base.

    `overrides` win over all of them.
    """
    runs = []
    trials = random_trials(config.get("random") or {})
    for variant, own in config["variants"].items():
        fixed = overrides or {}
        options = {**config["base"], **config["grid"], **(own or {}), **fixed}
        # Only the sections for axes turn a list into several runs: in `base` it is a plain value.
        axes = {
            key: value
            for key, value in options.items()
            if isinstance(value, list) and (key in config["grid"] or key in (own or {}))
        }
        for values in itertools.product(*axes.values()):
            chosen = {**options, **dict(zip(axes, values, strict=True))}
            for trial in trials:
                drawn = {key: trial[key] for key in trial if key not in {**(own or {}), **fixed}}
                plain = {key: as_number(value) for key, value in {**chosen, **drawn}.items()}
                runs.append(Run(variant, plain))
    return runs


def random_trials(section: Mapping[str, Any]) -> list[dict[str, float]]:
    """The draws of a random search, log-uniform in each range; a single empty one without a search.

    The first trials of a longer search are those of a shorter one.

    >>> trials = random_trials({"trials": 2, "log_uniform": {"learning_rate": [1e-4, 1e-2]}})
    >>> [1e-4 <= trial["learning_rate"] <= 1e-2 for trial in trials]
    [True, True]
    """
    if not section:
        return [{}]
    generator = random.Random(section.get("seed", 0))
    trials = []
    for _ in range(section["trials"]):
        trial = {}
        for option, (kind, pair) in searched_ranges(section).items():
            low, high = (math.log(as_number(end)) for end in pair)
            value = float(f"{math.exp(generator.uniform(low, high)):.4g}")
            trial[option] = round(1 - value, 8) if kind == "one_minus" else value
        trials.append(trial)
    return trials


def searched_ranges(section: Mapping[str, Any]) -> dict[str, tuple[str, Sequence[Any]]]:
    """Option -> kind and [low, high] of its range in a random search."""
    return {
        option: (kind, pair)
        for kind in RANGES
        for option, pair in (section.get(kind) or {}).items()
    }


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
    """The variant and the values of the options that are searched."""
    searched = searched_ranges(config.get("random") or {})
    values = (f"{key}={run.options[key]}" for key in {**config["grid"], **searched})
    return f"{run.variant} {' '.join(values)}"


# --- one run --------------------------------------------------------------------------------------


def execute(run: Run, folder: Path, script: str, *, jobs: int = 1) -> dict[str, Any] | str:
    """Trains in a fresh process; returns the record, or what to print of a failure.

    Args:
        jobs: runs that share the cores.
    """
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
        code = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment(jobs)
        ).returncode
    wall_time_s = time.perf_counter() - started
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        return "\n    ".join([f"failed with exit status {code}, see {log}", *tail])
    return {
        "key": run.key,
        "variant": run.variant,
        "seed": run.options.get("seed", 42),
        "options": dict(run.options),
        "command": [script, *arguments],
        "git_revision": git_revision(REPOSITORY),
        "packages": package_versions(),
        "hardware": hardware(),
        "jobs": jobs,
        "wall_time_s": round(wall_time_s, 1),
        **read_run(folder),
    }


def environment(jobs: int) -> dict[str, str]:
    """Of a run: its share of the cores, unless the user has said how many threads there are."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(threads), **os.environ} if jobs > 1 else dict(os.environ)


def read_run(folder: Path) -> dict[str, Any]:
    """Curves as [step, value] pairs and final metrics, from the files the Trainer wrote."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "train_loss": curve(history, "loss"),
        "eval_loss": curve(history, "eval_loss"),
        ELAPSED: curve(history, ELAPSED),
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
    """Keys of the runs in the results file.

    Raises:
        ValueError: a whole line that is no run.
    """
    return {record["key"] for record in read_records(results)} if results.is_file() else set()


def append_record(results: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line, in place of a last line that a killed sweep has left unfinished."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("ab+") as stream:
        stream.seek(0)
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        stream.write(json.dumps(record).encode() + b"\n")


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
