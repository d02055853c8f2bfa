"""Trains a small translation model with the stock Seq2SeqTrainer.

    scripts/train_translation.py configs/translation/multi30k.yaml --max_steps 500
    scripts/train_translation.py --train_source a.de --train_target a.en --validation_source b.de \\
        --validation_target b.en --optim ng_plus --predict_with_generate true

Files are plain text, one sentence a line, plain or packed as .xz or .gz. Every key of the YAML file
and every `--key` is a field of the dataclasses below or of `Seq2SeqTrainingArguments`; the command
line overrides the file. `import trainer_ext` makes the optimizers of this project valid values of
`--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    set_seed,
)

from trainer_ext.data.classification_metrics import predicted_classes
from trainer_ext.data.tokenizer import load_or_train_tokenizer
from trainer_ext.data.translation import (
    TRANSLATION_PRESETS,
    ParallelDataset,
    TranslationMetrics,
    read_parallel,
    translation_preset_config,
)
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
    ("BLEU", "eval_bleu", ".2f"),
    ("training seconds", "train_runtime", ".0f"),
)
FILES = ("train_source", "train_target", "validation_source", "validation_target")


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model."""

    DEFAULT_PRESET: ClassVar[str] = "marian-tiny"

    preset: str | None = preset_option(TRANSLATION_PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("encoder_layers=4,dropout=0.3")


@dataclass(kw_only=True)
class DataArguments:
    """Which parallel text."""

    train_source: str | None = field(
        default=None, metadata={"help": "Sentences to translate, one a line; also .xz or .gz."}
    )
    train_target: str | None = field(
        default=None, metadata={"help": "Their translations, line by line."}
    )
    validation_source: str | None = field(
        default=None, metadata={"help": "Sentences to evaluate on."}
    )
    validation_target: str | None = field(default=None, metadata={"help": "Their translations."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a sentence at most."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first N pairs only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N pairs only."}
    )
    vocab_size: int = field(
        default=4000, metadata={"help": "Size of the tokenizer of both languages."}
    )
    tokenizer_cache_dir: str | None = field(
        default=None, metadata={"help": "Trained tokenizers are kept here; HF_HOME by default."}
    )
    save_final_model: bool = field(
        default=True, metadata={"help": "Save model, tokenizer and model card in output_dir."}
    )

    def __post_init__(self) -> None:
        check_minima(self, max_length=2, max_train_samples=1, max_eval_samples=1)

    def read(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Training and validation pairs.

        Raises:
            ValueError: a file that is not named, or not as it should be.
        """
        for name in FILES:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is needed: a file with one sentence a line")
        train, train_target, validation, validation_target = (getattr(self, n) for n in FILES)
        return (
            read_parallel(train, train_target)[: self.max_train_samples],
            read_parallel(validation, validation_target)[: self.max_eval_samples],
        )


# --- preparation ----------------------------------------------------------------------------------


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: Seq2SeqTrainingArguments
) -> Trainer:
    """Reads the text and builds tokenizer and model for it.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    train, validation = data_args.read()
    with args.main_process_first(desc="tokenizer"):
        tokenizer = load_tokenizer(model_args, data_args, train)
    model = build_model(model_args, tokenizer, data_args.max_length, args.seed)
    return new_trainer(
        model,
        args,
        ParallelDataset(train, tokenizer, data_args.max_length),
        ParallelDataset(validation, tokenizer, data_args.max_length),
        trainer_class=Seq2SeqTrainer,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=TranslationMetrics(tokenizer, generated=args.predict_with_generate),
        # What is generated are tokens already.
        preprocess_logits_for_metrics=None if args.predict_with_generate else predicted_classes,
    )


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, train: Sequence[tuple[str, str]]
) -> PreTrainedTokenizerBase:
    """The pretrained model's tokenizer, or one of both languages trained on the text."""
    if model_args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    return load_or_train_tokenizer(
        (text for pair in train for text in pair),
        vocab_size=data_args.vocab_size,
        cache_dir=data_args.tokenizer_cache_dir,
    )


def build_model(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> PreTrainedModel:
    """The pretrained model, or a new one whose weights depend on config and seed only.

    Raises:
        ValueError: sentences that may be longer than the model's.
    """
    config = model_args.load_config(translation_preset_config)
    # T5 has relative positions, which have no end.
    if max_length > getattr(config, "max_position_embeddings", max_length):
        raise ValueError(
            f"max_length={max_length} is above max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    set_seed(seed)
    if model_args.model_name_or_path is not None:
        model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)
    else:
        config.vocab_size = config.decoder_vocab_size = len(tokenizer)
        config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
        config.bos_token_id = None
        config.eos_token_id = tokenizer.eos_token_id
        if hasattr(config, "forced_eos_token_id"):  # Marian's own; for T5 it is generation's
            config.forced_eos_token_id = tokenizer.eos_token_id
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.max_length = max_length
    # Marian's loss takes the number of items and ignores it; the Trainer would then sum over the
    # accumulated batches instead of averaging.
    model.accepts_loss_kwargs = False
    return model


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="translation",
    data_name=lambda data: Path(data.train_source).name,
    training_type=Seq2SeqTrainingArguments,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
