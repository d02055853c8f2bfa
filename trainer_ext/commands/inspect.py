"""``hf-precond inspect``: what a file of optimizer state holds, without reading its tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_precond.explain import format_bytes
from trainer_ext import checkpoint
from trainer_ext.arguments import as_text
from trainer_ext.commands.output import JsonOption, print_json, print_table

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint's folder, or its optimizer.safetensors."
    ),
]
VerifyOption = Annotated[bool, typer.Option(help="Read all tensors and compare the checksums.")]


def inspect_command(
    folder: CheckpointArgument, verify: VerifyOption = False, as_json: JsonOption = False
) -> None:
    """What an optimizer.safetensors holds: optimizer, options, steps, tensors. No model needed."""
    path = Path(folder)
    path = path.parent if path.is_file() else path
    if not checkpoint.has_optimizer(path):
        raise ValueError(f"{folder!r} holds no {checkpoint.FILE_NAME}")
    if verify:
        checkpoint.check_files(path)
    header, tensors = checkpoint.read_contents(path)
    if as_json:
        print_json({**header, "tensors": tensors, "verified": verify})
        return
    total = sum(entry["bytes"] for entry in tensors.values())
    print(f"{header['algorithm']}, {format_bytes(total)} in {len(tensors)} tensors", end="")
    print(", checksums are right" if verify else "")
    print(f"format {header['format_version']}, written with {_versions(header)}\n")
    options = {key: as_text(value) for key, value in header["hyperparameters"].items()}
    print(f"options: {', '.join(f'{key}={value}' for key, value in options.items())}\n")
    for number, group in enumerate(header["param_groups"]):
        rates = f"lr {group['lr']:g}, weight decay {group['weight_decay']:g}"
        print(f"group {number}: {group['num_params']} parameters, {rates}")
    print()
    print_table(("parameter", "shape", "state", "bytes"), parameter_rows(header, tensors), wrap=2)


def parameter_rows(
    header: dict[str, Any], tensors: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str, str]]:
    """Each parameter with its state tensors and their bytes."""
    found: dict[str, list[str]] = {name: [] for name in header["shapes"]}
    sizes: Counter[str] = Counter()
    for key, entry in tensors.items():
        name = owner_of(key, found)
        local = key.removeprefix(f"state.{name}.")
        if entry["shape"]:
            found[name].append(f"{local} {entry['dtype']}{entry['shape']}")
        sizes[name] += entry["bytes"]
    return [
        (name, "x".join(map(str, header["shapes"][name])), ", ".join(parts), str(sizes[name]))
        for name, parts in found.items()
    ]


def owner_of(key: str, names: Any) -> str:
    """The parameter that a tensor belongs to: the longest name that the key begins with."""
    fitting = [name for name in names if key.startswith(f"state.{name}.")]
    return max(fitting, key=len, default="")


def _versions(header: dict[str, Any]) -> str:
    versions = header.get("versions") or {"torch": header.get("torch_version", "?")}
    return ", ".join(f"{package} {version}" for package, version in versions.items())
