"""Command lines of the form `SCRIPT [CONFIG.yaml] [--key value ...]`, parsed into dataclasses.

The YAML file is turned into command-line arguments that stand before the real ones. So there is one
parser and one set of checks for both, and the command line wins because it comes last.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

YAML_SUFFIXES = (".yaml", ".yml")


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that reports a mistake in one line and never guesses at abbreviations."""

    def __init__(self, dataclass_types: Sequence[Any], **options: Any) -> None:
        options.setdefault("usage", "%(prog)s [CONFIG.yaml] [--key value ...]")
        super().__init__(dataclass_types, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
        raise AssertionError("unreachable: exit ends the process")


def parse_config_and_command_line(
    dataclass_types: Sequence[Any],
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses `[CONFIG.yaml] [--key value ...]` into one instance of each dataclass.

    A mistake ends the process with exit status 2 and one line on stderr.

    Args:
        argv: arguments without the program name; None takes those of the process.
        defaults: values for fields whose dataclass default does not suit the script.
    """
    parser = ScriptArgumentParser(dataclass_types, description=description)
    parser.set_defaults(**(defaults or {}))
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = field_names(dataclass_types)
    try:
        config_arguments: list[str] = []
        if arguments and arguments[0].endswith(YAML_SUFFIXES):
            config = read_yaml_mapping(arguments.pop(0))
            check_keys(config, names)
            config_arguments = to_arguments(config)
        *parsed, unused = parser.parse_args_into_dataclasses(
            [*config_arguments, *arguments],
            return_remaining_strings=True,
            # A stray `SCRIPT.args` file would change a run without a trace.
            look_for_args_file=False,
        )
        check_unused(unused, names)
        return tuple(parsed)
    except ValueError as error:
        parser.error(str(error))


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file.

    Raises:
        ValueError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config file {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {str(path)!r} must hold `key: value` lines")
    return content


def field_names(dataclass_types: Iterable[Any]) -> frozenset[str]:
    """Names of all fields that the parser of these dataclasses accepts."""
    return frozenset(
        field.name for type_ in dataclass_types for field in dataclasses.fields(type_) if field.init
    )


def check_keys(config: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Checks that every key is a field name.

    Raises:
        ValueError: names the first unknown key and the nearest valid ones.
    """
    allowed = frozenset(allowed)
    for key in config:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} in the config file{_hint(str(key), allowed)}")


def check_unused(unused: Sequence[str], allowed: Iterable[str]) -> None:
    """Checks that the parser understood every argument.

    Raises:
        ValueError: names the first argument left over and, for an option, the nearest valid ones.
    """
    for argument in unused:
        if not argument.startswith("--"):
            raise ValueError(f"argument {argument!r} belongs to no option")
        key = argument[2:].partition("=")[0]
        raise ValueError(f"unknown option '--{key}'{_hint(key, allowed)}")


def to_arguments(config: Mapping[str, Any]) -> list[str]:
    """Command-line arguments that say the same as the mapping; a None value leaves the default.

    >>> to_arguments({"bf16": True, "seed": 1, "label_names": ["a", "b"], "run_name": None})
    ['--bf16=true', '--seed=1', '--label_names', 'a', 'b']
    """
    arguments: list[str] = []
    for key, value in config.items():
        if value is None:
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(_to_text, value)]
        else:
            arguments.append(f"--{key}={_to_text(value)}")
    return arguments


def _hint(key: str, allowed: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(allowed), n=3)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)
