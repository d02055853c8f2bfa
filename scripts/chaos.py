#!/usr/bin/env python
"""Kills training runs at random instants and checks that what goes on is what would have been.

    scripts/chaos.py --kills 100
    scripts/chaos.py --kills 1000 --optim soap --optim_args basis_interval=2 --seed 7

A chain is one run of the Trainer that is killed (SIGKILL) again and again, half of the times inside
the writing of a checkpoint, and each time started anew from its last complete checkpoint. Its end
must equal that of an uninterrupted run bit for bit: weights, optimizer, schedule, random state and
logged losses. Chains follow each other until all kills are done. Exit status 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from threading import RLock
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import safe_globals

from hf_precond import list_optimizers
from trainer_ext import checkpoint
from trainer_ext.resume import incomplete_because, last_complete_checkpoint

# A child is a copy of this process: it has imported everything already.
FORK = multiprocessing.get_context("fork")
POLL_S = 2e-4
# A run that takes longer hangs.
PATIENCE_S = 300
# Files of a checkpoint that may be there at the moment of a kill.
MOST_FILES = 9
STEPS_AHEAD = 3


@dataclass(kw_only=True)
class Tally:
    """What has happened so far."""

    kills: int = 0
    chains: int = 0
    half_written: Counter[str] = field(default_factory=Counter)  # by the file written last
    differences: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Kills as often as asked and prints the summary."""
    args = parse_arguments(argv)
    # By default bars share a lock between processes, which a child that is killed would keep.
    tqdm.set_lock(RLock())
    rng = Random(args.seed)
    tally = Tally()
    with work_folder(args.output_dir) as work:
        straight = work / "uninterrupted"
        started = time.perf_counter()
        if finish(start(args, straight), straight, tally):
            duration = time.perf_counter() - started
            with tqdm(total=args.kills, unit="kill", disable=args.quiet) as progress:
                while tally.kills < args.kills and not tally.differences:
                    run_chain(args, work, duration, rng, tally, progress)
    print(summary(args, tally))
    return 1 if tally.differences else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often to kill")
    parser.add_argument("--optim", choices=list_optimizers(), default="shared_basis_adagrad")
    parser.add_argument(
        "--optim_args", default=None, help="options of the optimizer, as in TrainingArguments"
    )
    parser.add_argument("--steps", type=int, default=24, help="steps of a whole run")
    parser.add_argument("--save_steps", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    parser.add_argument("--width", type=int, default=16, help="of the GPT-2 that is trained")
    parser.add_argument("--max_shard_size", default=checkpoint.MAX_SHARD_SIZE, help="of states")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    parser.add_argument("--output_dir", type=Path, help="keeps the runs; a temporary folder else")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.steps % args.save_steps:
        parser.error(f"--steps {args.steps} must be a multiple of --save_steps {args.save_steps}")
    return args


@contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder of all runs."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=False)
        yield wanted
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- one run, in a process of its own -------------------------------------------------------------


def start(args: argparse.Namespace, folder: Path) -> BaseProcess:
    """Starts a run, or goes on with one from its last complete checkpoint."""
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=train, args=(args, folder), daemon=True)
    process.start()
    return process


def train(args: argparse.Namespace, folder: Path) -> None:
    """The body of the child: a tiny GPT-2, random tokens, dropout, the stock Trainer."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    torch.set_num_threads(1)
    # The Trainer's hook has no option for it, and this process ends with the run.
    checkpoint.save_optimizer.__kwdefaults__["max_shard_size"] = args.max_shard_size
    set_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=args.width, vocab_size=64, n_positions=16, bos_token_id=0
    )
    tokens = torch.randint(64, (64, 8))
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            output_dir=str(folder),
            optim=args.optim,
            optim_args=args.optim_args,
            max_steps=args.steps,
            save_steps=args.save_steps,
            save_total_limit=args.save_total_limit,
            logging_steps=1,
            learning_rate=1e-2,
            warmup_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


def finish(process: BaseProcess, folder: Path, tally: Tally) -> bool:
    """Waits for the end of a run; one that fails is a difference."""
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode:
        tail = Path(f"{folder}.log").read_text(errors="replace").splitlines()[-5:]
        tally.differences.append(
            f"{folder.name} ended with exit status {process.exitcode}: {' | '.join(tail)}"
        )
    return not process.exitcode


# --- chains ---------------------------------------------------------------------------------------


def run_chain(
    args: argparse.Namespace,
    work: Path,
    duration: float,
    rng: Random,
    tally: Tally,
    progress: tqdm[Any],
) -> None:
    """Kills one run until its end or until there have been kills enough, and compares its end."""
    tally.chains += 1
    folder = work / f"chain{tally.chains}"
    reached = 0
    while tally.kills < args.kills:
        before = fingerprint(folder)
        process = start(args, folder)
        wait_for(draw_moment(folder, duration, rng), process)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        tally.kills += 1
        progress.update()
        if fingerprint(folder) != before and incomplete_because(checkpoints(folder)[-1]):
            tally.half_written[last_written(checkpoints(folder)[-1])] += 1
        # What is complete must stay so.
        step = complete_step(folder)
        if step < reached:
            tally.differences.append(f"{folder.name} fell from step {reached} back to {step}")
            return
        reached = step
    else:
        process = start(args, folder)
    if finish(process, folder, tally):
        found = differences(
            *(run / f"checkpoint-{args.steps}" for run in (work / "uninterrupted", folder))
        )
        tally.differences += [f"{folder.name}: {difference}" for difference in found]


def draw_moment(folder: Path, duration: float, rng: Random) -> Callable[[], bool]:
    """An instant of a run: at any time, or when a checkpoint has some of its files."""
    if rng.random() < 0.5:
        end = time.monotonic() + rng.uniform(0, duration)
        return lambda: time.monotonic() >= end
    wanted = newest_step(folder) + rng.randint(1, STEPS_AHEAD)
    count = rng.randint(1, MOST_FILES)
    pause = rng.uniform(0, 1e-3)

    def is_writing() -> bool:
        if newest_step(folder) < wanted or count_files(folder) < count:
            return False
        time.sleep(pause)
        return True

    return is_writing


def wait_for(moment: Callable[[], bool], process: BaseProcess) -> None:
    """Waits for an instant, or for the end of a run that comes earlier."""
    while process.is_alive() and not moment():
        time.sleep(POLL_S)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder."""
    return int(path.name.rpartition("-")[2])


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint folder, whole or not; 0 without one."""
    return max(map(step_of, checkpoints(folder)), default=0)


def complete_step(folder: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 without one."""
    whole = (path for path in checkpoints(folder) if not incomplete_because(path))
    return max(map(step_of, whole), default=0)


def count_files(folder: Path) -> int:
    """Files in the newest checkpoint folder."""
    return len(os.listdir(checkpoints(folder)[-1]))


def fingerprint(folder: Path) -> tuple[str, int] | None:
    """Name and time of the newest checkpoint folder."""
    found = checkpoints(folder)
    return (found[-1].name, found[-1].stat().st_mtime_ns) if found else None


def last_written(folder: Path) -> str:
    """The youngest file of a folder; of our temporary ones without the number of the process."""
    name = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, default=folder).name
    return "an unfinished file" if name.startswith(".") else name


# --- comparison -----------------------------------------------------------------------------------


def differences(expected: Path, found: Path) -> list[str]:
    """What two checkpoints do not have in common."""
    problem = incomplete_because(found)
    if problem:
        return [f"{found.name} is not complete: {problem}"]
    unequal = [
        f"weight {name}"
        for name in different(
            *(load_file(folder / "model.safetensors") for folder in (expected, found))
        )
    ]
    (tensors, header), (other_tensors, other_header) = map(checkpoint.read_state, (expected, found))
    unequal += different(tensors, other_tensors)
    unequal += [] if header == other_header else ["the header of the optimizer's state"]
    for name in ("scheduler.pt", "rng_state.pth"):
        with safe_globals():
            one, two = (
                torch.load(folder / name, weights_only=True) for folder in (expected, found)
            )
        unequal += [] if repr(one) == repr(two) else [name]
    one, two = (losses(folder) for folder in (expected, found))
    return unequal + ([] if one == two else ["the logged losses"])


def different(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit, or that only one side has."""
    return [
        name
        for name in sorted(one.keys() | two.keys())
        if name not in one or name not in two or not torch.equal(one[name], two[name])
    ]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of every logged step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(log["step"], log["loss"], log["learning_rate"]) for log in history if "loss" in log]


def summary(args: argparse.Namespace, tally: Tally) -> str:
    """The closing lines."""
    lines = [
        f"{args.optim}: {tally.kills} kills in {tally.chains} chains, "
        f"{sum(tally.half_written.values())} of them left a half-written checkpoint, up to"
    ]
    lines += [f"  {count:5d}  {file}" for file, count in tally.half_written.most_common()]
    if tally.differences:
        return "\n".join([*lines, "DIFFERENT from the uninterrupted run:", *tally.differences])
    return "\n".join([*lines, "all chains equal the uninterrupted run bit for bit"])


if __name__ == "__main__":
    sys.exit(main())
