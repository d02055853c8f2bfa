"""What a figure needs to be repeated: revision, versions, hardware."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def provenance(script: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to repeat a run of `script`, a path in the folder scripts."""
    return {
        "command": f"scripts/{Path(script).name} {' '.join(shown_options(args))}",
        "git_revision": git_revision(Path(script).parent),
        "packages": package_versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def shown_options(args: argparse.Namespace) -> list[str]:
    """The options that repeat the run but for `output`; the folder `data_dir` by its name only.

    >>> shown_options(argparse.Namespace(lr=0.0, flip=True, layers=None, seeds=[0, 1]))
    ['--lr', '0.0', '--flip', '--seeds', '0', '1']
    """
    parts = []
    for key, value in vars(args).items():
        if value is None or value is False or value == "" or key == "output":
            continue
        if key == "data_dir":
            value = Path(value).name
        if value is True:
            parts.append(f"--{key}")
        else:
            parts += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def git_revision(folder: Path) -> str:
    """The commit, marked `-dirty` where tracked files differ from it; `unknown` without git.

    What `results/` holds decides no run: a sweep that adds to a file there stays clean.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    others = ("--", ":/", ":(top,exclude)results")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", *others)
    return (revision or "unknown") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, of those that are there."""
    versions = {}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **versions}


def hardware() -> dict[str, Any]:
    """Processor models, visible cores and the thread limit of the numeric libraries."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
