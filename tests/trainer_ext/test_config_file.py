"""YAML files and command lines reach the dataclasses by one way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trainer_ext.config_file import parse_config_and_command_line, to_arguments


@dataclass
class Options:
    learning_rate: float = 0.1
    steps: int = 5
    shuffle: bool = False
    optim_args: str | None = None
    names: list[str] = field(default_factory=list)
    schedule: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}\nmust be at least 1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "learning_rate: 1e-3\n"
        "steps: 7\n"
        "shuffle: true\n"
        "optim_args: rank=32,betas=0.9/0.95\n"
        "names: [a, b]\n"
        "schedule: {min_lr_rate: 0.1}\n"
    )
    return path


def _parse(*argv: str, **options: object) -> Options:
    return parse_config_and_command_line((Options,), argv, **options)[0]


def test_yaml_values_get_the_types_of_the_fields(config: Path) -> None:
    assert _parse(str(config)) == Options(
        learning_rate=1e-3,
        steps=7,
        shuffle=True,
        optim_args="rank=32,betas=0.9/0.95",
        names=["a", "b"],
        schedule='{"min_lr_rate": 0.1}',
    )


def test_command_line_overrides_the_file(config: Path) -> None:
    options = _parse(str(config), "--steps", "9", "--names", "c", "--shuffle", "false")
    assert (options.steps, options.names, options.shuffle) == (9, ["c"], False)
    assert options.learning_rate == 1e-3


def test_script_defaults_yield_to_the_file(config: Path) -> None:
    assert _parse(defaults={"steps": 3}).steps == 3
    assert _parse(str(config), defaults={"steps": 3}).steps == 7


def test_null_leaves_the_default(tmp_path: Path) -> None:
    path = tmp_path / "null.yaml"
    path.write_text("steps: null\n")
    assert _parse(str(path)).steps == 5


def test_negative_numbers_are_values() -> None:
    assert to_arguments({"max_steps": -1}) == ["--max_steps=-1"]


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        ("stesp: 3", (), "unknown key 'stesp' in the config file; did you mean steps?"),
        ("- 1", (), "must hold `key: value` lines"),
        ("a: [", (), "is not valid YAML"),
        ("steps: many", (), "argument --steps: invalid int value: 'many'"),
        ("steps: 1", ("--stesp", "3"), "unknown option '--stesp'; did you mean steps?"),
        ("steps: 1", ("stray",), "argument 'stray' belongs to no option"),
        ("steps: 0", (), "steps=0 must be at least 1"),
        ("steps: 1", ("--step", "3"), "unknown option '--step'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    argv: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        _parse(str(path), *argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_missing_config_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse("missing.yaml")
    assert "'missing.yaml' does not exist" in capsys.readouterr().err
