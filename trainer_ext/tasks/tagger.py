"""Trains a part-of-speech tagger on a Universal Dependencies treebank with the stock Trainer.

    scripts/train_tagger.py configs/tagger/ewt.yaml --max_steps 500
    scripts/train_tagger.py --train_file a.conllu --validation_file b.conllu --optim soap

Files are CoNLL-U, plain or packed as .xz or .gz. Every key of the YAML file and every `--key` is a
field of the dataclasses below or of `TrainingArguments`; the command line overrides the file.
`import trainer_ext` makes the optimizers of this project valid values of `--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer_ext.data.classification_metrics import ClassificationMetrics, predicted_classes
from trainer_ext.data.conllu import (
    TAG_COLUMNS,
    TaggedDataset,
    TaggedSentence,
    by_frequency,
    read_conllu,
    word_tokenizer,
)
from trainer_ext.data.tagger import TAGGER_PRESETS, TaggerConfig, tagger_preset_config
from trainer_ext.data.vision_presets import name_labels
from trainer_ext.training_script import (
    ModelChoice,
    Task,
    check_minima,
    new_trainer,
    overrides_option,
    preset_option,
    run_task,
)

FIGURES = (
    ("validation loss", "eval_loss", ".4f"),
    ("token accuracy", "eval_accuracy", ".4f"),
    ("training seconds", "train_runtime", ".0f"),
)


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model."""

    DEFAULT_PRESET: ClassVar[str] = "small"

    preset: str | None = preset_option(TAGGER_PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("hidden_size=64,dropout=0.1")


@dataclass(kw_only=True)
class DataArguments:
    """Which treebank."""

    train_file: str | None = field(
        default=None, metadata={"help": "CoNLL-U file to train on, also packed as .xz or .gz."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "CoNLL-U file to evaluate on."}
    )
    tags: str = field(
        default="xpos", metadata={"help": f"Which tags: {', '.join(sorted(TAG_COLUMNS))}."}
    )
    min_count: int = field(
        default=1, metadata={"help": "Words that are rarer in training are unknown."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad all sentences to max_position_embeddings, not to the longest."},
    )
    save_final_model: bool = field(
        default=True, metadata={"help": "Save model, tokenizer and model card in output_dir."}
    )

    def __post_init__(self) -> None:
        check_minima(self, min_count=1)
        if self.tags not in TAG_COLUMNS:
            raise ValueError(f"tags={self.tags!r} must be one of {', '.join(sorted(TAG_COLUMNS))}")

    def read(self, name: str) -> list[TaggedSentence]:
        """The sentences of `train_file` or `validation_file`.

        Raises:
            ValueError: the option is not given, or the file is not as it should be.
        """
        path = getattr(self, name)
        if path is None:
            raise ValueError(f"{name} is needed: a CoNLL-U file")
        return read_conllu(path, tags=self.tags)


# --- preparation ----------------------------------------------------------------------------------


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Reads the treebank and builds a model for its words and tags.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    train, validation = data_args.read("train_file"), data_args.read("validation_file")
    model, tokenizer, tags = build_model(model_args, data_args, train, args.seed)
    length = model.config.max_position_embeddings
    padding: dict[str, Any] = {}
    if data_args.pad_to_max_length:
        padding = {"padding": "max_length", "max_length": length}
    return new_trainer(
        model,
        args,
        TaggedDataset(train, tokenizer, tags),
        TaggedDataset(validation, tokenizer, tags),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer, **padding),
        compute_metrics=ClassificationMetrics(),
        preprocess_logits_for_metrics=predicted_classes,
    )


def build_model(
    model_args: ModelArguments, data_args: DataArguments, train: Sequence[TaggedSentence], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[str]]:
    """The model with its words and its tags, those of the training sentences for a new one.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    config = model_args.load_config(tagger_preset_config)
    set_seed(seed)
    if model_args.model_name_or_path is not None:
        folder = model_args.model_name_or_path
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = AutoModelForTokenClassification.from_pretrained(folder)
        return model, tokenizer, [config.id2label[index] for index in range(config.num_labels)]
    words = by_frequency(
        (word for sentence in train for word in sentence.words), min_count=data_args.min_count
    )
    tags = by_frequency(tag for sentence in train for tag in sentence.tags)
    name_labels(config, tags)
    config.vocab_size = len(words)
    tokenizer = word_tokenizer(words, _length(config))
    return AutoModelForTokenClassification.from_config(config), tokenizer, tags


def _length(config: TaggerConfig) -> int:
    if config.max_position_embeddings < 2:
        raise ValueError(
            f"max_position_embeddings={config.max_position_embeddings} must be at least 2"
        )
    return config.max_position_embeddings


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="token-classification",
    data_name=lambda data: Path(data.train_file).name,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
