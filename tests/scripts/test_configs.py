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


@pytest.mark.parametrize("path", _files("vision"), ids=lambda path: path.stem)
def test_vision_configs_are_valid_arguments(path: Path) -> None:
    script = load_script("train_classifier")
    model_args, _, args = parser_of(script)([str(path)])
    content = read_yaml_mapping(path)
    assert args.optim == content["optim"]
    assert path.stem == content["optim"].removesuffix("_torch")
    # Builds the optimizer's options for the model, and so checks them.
    config = script.vision_preset_config(model_args.preset)
    model = script.AutoModelForImageClassification.from_config(config)
    Trainer.get_optimizer_cls_and_kwargs(args, model)


@pytest.mark.parametrize("path", _files("autoencoder"), ids=lambda path: path.stem)
def test_autoencoder_configs_are_valid_arguments(path: Path) -> None:
    script = load_script("train_autoencoder")
    model_args, _, args = parser_of(script)([str(path)])
    model = script.AutoModel.from_config(script.autoencoder_preset_config(model_args.preset))
    Trainer.get_optimizer_cls_and_kwargs(args, model)


@pytest.mark.parametrize("path", _files("tagger"), ids=lambda path: path.stem)
def test_tagger_configs_are_valid_arguments(path: Path) -> None:
    script = load_script("train_tagger")
    model_args, _, args = parser_of(script)([str(path)])
    with torch.device("meta"):
        config = model_args.load_config(script.tagger_preset_config)
        model = script.AutoModelForTokenClassification.from_config(config)
    Trainer.get_optimizer_cls_and_kwargs(args, model)


@pytest.mark.parametrize("path", _files("translation"), ids=lambda path: path.stem)
def test_translation_configs_are_valid_arguments(path: Path) -> None:
    script = load_script("train_translation")
    model_args, _, args = parser_of(script)([str(path)])
    with torch.device("meta"):
        config = model_args.load_config(script.translation_preset_config)
        model = script.AutoModelForSeq2SeqLM.from_config(config)
    Trainer.get_optimizer_cls_and_kwargs(args, model)


@pytest.mark.parametrize("path", _files("clicks"), ids=lambda path: path.stem)
def test_clicks_configs_are_valid_arguments(path: Path) -> None:
    script = load_script("train_clicks")
    model_args, _, args = parser_of(script)([str(path)])
    config = model_args.load_config(script.preset_config)
    model = script.AutoModelForSequenceClassification.from_config(config)
    Trainer.get_optimizer_cls_and_kwargs(args, model)


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
