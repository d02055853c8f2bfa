"""Every committed YAML file says valid things, one commented key a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Trainer, TrainingArguments

from tests.scripts.conftest import load_script
from trainer_ext.config_file import parse_config_and_command_line, read_yaml_mapping, to_arguments

Parse = Callable[[Sequence[str]], tuple[Any, ...]]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEY_LINE = re.compile(r"^\s*(- )?[\w-]+:")


def _files(folder: str) -> list[Path]:
    return sorted((CONFIGS / folder).glob("*.yaml"))


def parser_of(script: ModuleType) -> Parse:
    """Parses arguments as a training script does."""
    training_type = getattr(script, "Seq2SeqTrainingArguments", TrainingArguments)
    types = (script.ModelArguments, script.DataArguments, training_type)
    return lambda argv: parse_config_and_command_line(types, argv)


@pytest.fixture
def parse(train_lm: ModuleType) -> Parse:
    """Parses arguments as scripts/train_lm.py does."""
    return parser_of(train_lm)


@pytest.mark.parametrize("path", _files("lm"), ids=lambda path: path.stem)
def test_lm_configs_are_valid_arguments(parse: Parse, path: Path) -> None:
    *_, args = parse([str(path)])
    assert args.optim == read_yaml_mapping(path)["optim"]


def _name(value: str | Path) -> str:
    return value.stem if isinstance(value, Path) else value


# Folder -> script, its function of presets and the class of models.
TASKS = {
    "vision": ("train_classifier", "vision_preset_config", "AutoModelForImageClassification"),
    "autoencoder": ("train_autoencoder", "autoencoder_preset_config", "AutoModel"),
    "tagger": ("train_tagger", "tagger_preset_config", "AutoModelForTokenClassification"),
    "translation": ("train_translation", "translation_preset_config", "AutoModelForSeq2SeqLM"),
    "clicks": ("train_clicks", "preset_config", "AutoModelForSequenceClassification"),
}


@pytest.mark.parametrize(
    ("folder", "path"), [(folder, path) for folder in TASKS for path in _files(folder)], ids=_name
)
def test_task_configs_are_valid_arguments(folder: str, path: Path) -> None:
    name, presets, auto_class = TASKS[folder]
    script = load_script(name)
    model_args, _, args = parser_of(script)([str(path)])
    with torch.device("meta"):
        config = model_args.load_config(getattr(script, presets))
        model = getattr(script, auto_class).from_config(config)
    # Builds the optimizer's options for the model, and so checks them.
    Trainer.get_optimizer_cls_and_kwargs(args, model)


@pytest.mark.parametrize("path", _files("vision"), ids=lambda path: path.stem)
def test_vision_configs_are_named_as_their_optimizers(path: Path) -> None:
    assert path.stem == read_yaml_mapping(path)["optim"].removesuffix("_torch")


@pytest.mark.parametrize("path", _files("bench"), ids=lambda path: path.stem)
def test_bench_configs_expand_to_valid_runs(sweep: ModuleType, path: Path) -> None:
    script, config = sweep.read_sweep(path)
    parse = parser_of(load_script(Path(script).stem))
    runs = sweep.expand(config)
    assert runs
    for run in runs:
        *_, args = parse(to_arguments(run.options))
        assert args.learning_rate == run.options["learning_rate"]


@pytest.mark.parametrize("path", _files("accelerate"), ids=lambda path: path.stem)
def test_accelerate_configs_load(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == read_yaml_mapping(path)["num_processes"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_has_a_comment_and_no_path_is_absolute(path: Path) -> None:
    lines = path.read_text().splitlines()
    with_values = [line for line in lines if KEY_LINE.match(line) and not line.endswith(":")]
    uncommented = [line for line in with_values if "#" not in line]
    # The variants of a sweep are the algorithms themselves: their names say enough.
    assert [line for line in uncommented if "{optim:" not in line] == []
    assert not [line for line in lines if re.search(r":\s+/", line)]
