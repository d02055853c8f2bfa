"""``optim_args`` -> typed options, with every mistake named in one ValueError.

    rank=32,update_interval=10,betas=0.9/0.95,graft=none,config=options.yaml

Parts are separated by commas, the members of a list by slashes. A trailing comma is tolerated. A
YAML file holds the same options as ``key: value`` lines; what is written in ``optim_args``
overrides the file. All sources are brought to text first, so that one function decides what a value
means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hf_precond.preconditioners.schedule import FORMS, Schedule
from hf_precond.registry import OptionSpec, option_specs
from trainer_ext.config_file import read_yaml_mapping

CONFIG = "config"
STRICT_RESUME = "strict_resume"

_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null")
_TRAINING_ARGUMENT = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "optim_target_modules": "optim_target_modules",
    "target_modules": "optim_target_modules",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimArgs:
    """What ``optim_args`` says.

    Attributes:
        options: typed options of the optimizer, only those that were given.
        strict_resume: a resume without fitting optimizer state is an error instead of a warning.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    strict_resume: bool = False


def parse_optim_args(
    name: str, text: str | None, options: Mapping[str, Any] | None = None
) -> OptimArgs:
    """Returns the typed options of optimizer ``name``.

    Args:
        text: the ``optim_args`` string.
        options: further options as a mapping (:class:`PrecondTrainingArguments`).

    Raises:
        ValueError: names every malformed part, unknown key (with the nearest valid one), duplicate
            and value of a wrong type. Ranges are checked where the optimizer is built.
    """
    specs = option_specs(name)
    problems: list[str] = []
    given = _split(text or "", problems)
    for key, value in (options or {}).items():
        if key in given:
            problems.append(f"{key!r} is given twice")
        given[key] = as_text(value)
    if CONFIG in given:
        given = {**_read_config(given.pop(CONFIG), problems), **given}
    values = _convert_all(given, specs, problems)
    if problems:
        raise ValueError(
            f"optim_args of {name}: {'; '.join(problems)}. "
            f"Valid options: {', '.join(_valid_keys(specs))}"
        )
    strict = values.pop(STRICT_RESUME, False)
    return OptimArgs(options=values, strict_resume=strict)


def as_text(value: Any) -> str:
    """Returns a Python or YAML value in the notation of ``optim_args``.

    >>> as_text([0.9, 0.95]), as_text(True), as_text(None)
    ('0.9/0.95', 'true', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "/".join(as_text(part) for part in value)
    return str(value)


def _split(text: str, problems: list[str]) -> dict[str, str]:
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":
        parts.pop()
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = (item.strip() for item in part.partition("="))
        if not part:
            problems.append("an empty part between two commas")
        elif not equals:
            problems.append(f"{part!r} is not KEY=VALUE (lists are written with slashes: 0.9/0.95)")
        elif not key:
            problems.append(f"{part!r} has no key before '='")
        elif not value:
            problems.append(f"{key!r} has no value after '='")
        elif "=" in value:
            problems.append(f"{part!r} has more than one '='")
        elif key in given:
            problems.append(f"{key!r} is given twice")
        else:
            given[key] = value
    return given


def _read_config(path: str, problems: list[str]) -> dict[str, str]:
    try:
        content = read_yaml_mapping(path)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}
    if CONFIG in content:
        problems.append(f"config file {path!r} names another config file")
        return {}
    return {str(key): as_text(value) for key, value in content.items()}


def _valid_keys(specs: Mapping[str, OptionSpec]) -> tuple[str, ...]:
    return (*specs, STRICT_RESUME, CONFIG)


def _convert_all(
    given: Mapping[str, str], specs: Mapping[str, OptionSpec], problems: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key == STRICT_RESUME:
            convert, expected = _CONVERTERS[bool]
        elif key in specs:
            convert, expected = _converter(specs[key])
        else:
            problems.append(f"unknown option {key!r}{_hint(key, specs)}")
            continue
        try:
            values[key] = convert(text)
        except ValueError:
            problems.append(f"{key} = {text!r} is not allowed: it must be {expected}")
    return values


def _hint(key: str, specs: Mapping[str, OptionSpec]) -> str:
    if key in _TRAINING_ARGUMENT:
        return f" (use --{_TRAINING_ARGUMENT[key]})"
    close = get_close_matches(key, _valid_keys(specs), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def _converter(spec: OptionSpec) -> tuple[Callable[[str], Any], str]:
    """Returns the function from text to the option's type, and its allowed values in words."""
    of_type, words = _CONVERTERS[spec.type]
    expected = " ".join(part for part in (words, spec.allowed) if part)

    def convert(text: str) -> Any:
        return text if text == spec.word else of_type(text)

    if not spec.optional:
        return convert, expected
    return lambda text: None if text.lower() in _NONE else convert(text), f"{expected} or none"


def _to_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _to_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE + _FALSE:
        raise ValueError(text)
    return lowered in _TRUE


def _to_tuple(text: str) -> tuple[float, ...]:
    return tuple(_to_float(part) for part in text.split("/"))


_CONVERTERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "an integer"),
    float: (_to_float, "a finite number"),
    bool: (_to_bool, "true or false"),
    str: (str, ""),
    tuple: (_to_tuple, "numbers separated by slashes, as 0.9/0.95,"),
    Schedule: (Schedule.parse, f"{FORMS},"),
}
