"""Trains a causal language model with the stock Trainer.

    scripts/train_lm.py configs/lm/shared_basis_adagrad.yaml --max_steps 200
    scripts/train_lm.py --preset gpt2-7m --dataset_name stdlib --max_steps 200

Every key of the YAML file and every `--key` is a field of the dataclasses below or of
`TrainingArguments`; the command line overrides the file. `import trainer_ext` makes the optimizers
of this project valid values of `--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer_ext.data.corpus import STDLIB, Corpus, TextDataset, load_corpus
from trainer_ext.data.metrics import LanguageModelMetrics, perplexity, sequence_statistics
from trainer_ext.data.packing import collate_blocks, pack
from trainer_ext.data.presets import PRESETS, preset_config
from trainer_ext.data.tokenizer import load_or_train_tokenizer
from trainer_ext.training_script import (
    ModelChoice,
    Task,
    check_minima,
    new_trainer,
    overrides_option,
    preset_option,
    run_task,
)

MODEL_DTYPES = ("float32", "bfloat16", "auto")

FIGURES = (
    ("validation loss", "eval_loss", ".4f"),
    ("perplexity", "eval_perplexity", ".2f"),
    ("token accuracy", "eval_accuracy", ".3f"),
    ("training seconds", "train_runtime", ".0f"),
)


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model, in which dtype."""

    DEFAULT_PRESET: ClassVar[str] = "gpt2-7m"

    preset: str | None = preset_option(PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("n_layer=2,n_head=4")
    model_dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(MODEL_DTYPES)}."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel: eager, sdpa, flash_attention_2."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_dtype not in MODEL_DTYPES:
            raise ValueError(
                f"model_dtype={self.model_dtype!r} must be one of {', '.join(MODEL_DTYPES)}"
            )


@dataclass(kw_only=True)
class DataArguments:
    """Which text, tokenised how."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"{STDLIB} (the Python library's own source, the default), or a Hub dataset "
            "with a text column, such as wikitext or allenai/c4."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset, such as en."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local text: plain, .xz, .gz, .jsonl or .jsonl.gz."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Local validation text of the same kind as train_file."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share held out where there is no validation text."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and pack the text while training; needs max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Blocks among which a stream is shuffled; 0 keeps order."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per training sequence."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first N blocks only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N blocks only."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a tokenizer; else one is trained on the text."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Size of the trained tokenizer; the model config's when not given."},
    )
    tokenizer_train_rows: int = field(
        default=50_000, metadata={"help": "Rows of training text the tokenizer is trained on."}
    )
    tokenizer_cache_dir: str | None = field(
        default=None, metadata={"help": "Trained tokenizers are kept here; HF_HOME by default."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise and pack."}
    )
    save_final_model: bool = field(
        default=True, metadata={"help": "Save model, tokenizer and model card in output_dir."}
    )

    def __post_init__(self) -> None:
        check_minima(
            self,
            block_size=2,
            max_train_samples=1,
            max_eval_samples=1,
            tokenizer_train_rows=1,
            shuffle_buffer_size=0,
            preprocessing_num_workers=1,
        )
        if self.tokenizer_name is not None and self.vocab_size is not None:
            raise ValueError(
                f"vocab_size={self.vocab_size} has no effect with "
                f"tokenizer_name={self.tokenizer_name!r}; give one of them"
            )


# --- preparation ----------------------------------------------------------------------------------


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Loads text, tokenizer and model, in the order in which they depend on each other.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise ValueError(f"streaming=True needs max_steps > 0, got max_steps={args.max_steps}")
    corpus = load_corpus(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        validation_split_percentage=data_args.validation_split_percentage,
        streaming=data_args.streaming,
    )
    config = model_args.load_config(preset_config)
    with args.main_process_first(desc="tokenizer and packing"):
        tokenizer = load_tokenizer(model_args, data_args, config, corpus)
        train, validation = pack_splits(corpus, tokenizer, data_args, args)
    model = build_model(model_args, data_args, config, tokenizer, args.seed)
    return new_trainer(
        model,
        args,
        train,
        validation,
        processing_class=tokenizer,
        data_collator=collate_blocks,
        compute_metrics=LanguageModelMetrics(),
        preprocess_logits_for_metrics=sequence_statistics,
    )


def load_tokenizer(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: PretrainedConfig,
    corpus: Corpus,
) -> PreTrainedTokenizerBase:
    """The named tokenizer, else that of the pretrained model, else one trained on the corpus."""
    name = data_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        if data_args.vocab_size is not None:
            raise ValueError(
                f"vocab_size={data_args.vocab_size} has no effect with model_name_or_path={name!r}"
            )
        return AutoTokenizer.from_pretrained(name)
    return load_or_train_tokenizer(
        (row["text"] for row in islice(corpus.train, data_args.tokenizer_train_rows)),
        vocab_size=data_args.vocab_size or config.vocab_size,
        cache_dir=data_args.tokenizer_cache_dir,
    )


def pack_splits(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: TrainingArguments,
) -> tuple[TextDataset, TextDataset]:
    """Blocks of the training and of the validation text."""
    train, validation = (
        pack(
            split,
            tokenizer,
            block_size=data_args.block_size,
            rows_are_documents=corpus.rows_are_documents,
            num_proc=data_args.preprocessing_num_workers,
        )
        for split in (corpus.train, corpus.validation)
    )
    if data_args.streaming and data_args.shuffle_buffer_size:
        train = train.shuffle(seed=args.data_seed, buffer_size=data_args.shuffle_buffer_size)
    return (
        first_blocks(train, data_args.max_train_samples, "training", data_args.block_size),
        first_blocks(validation, data_args.max_eval_samples, "validation", data_args.block_size),
    )


def first_blocks(
    blocks: TextDataset, count: int | None, split: str, block_size: int
) -> TextDataset:
    """The first `count` blocks, all of them for None.

    Raises:
        ValueError: the text fills no block (of a stream this shows only while it is read).
    """
    if isinstance(blocks, datasets.IterableDataset):
        return blocks if count is None else blocks.take(count)
    if len(blocks) == 0:
        raise ValueError(f"the {split} text fills no block of block_size={block_size} tokens")
    return blocks if count is None else blocks.select(range(min(count, len(blocks))))


def build_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> PreTrainedModel:
    """The pretrained model, or a new one whose weights depend on config and seed only.

    Raises:
        ValueError: blocks longer than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and data_args.block_size > context:
        raise ValueError(
            f"block_size={data_args.block_size} exceeds the {context} positions of the model"
        )
    model = new_or_pretrained_model(model_args, data_args, config, tokenizer, seed)
    if model.loss_type is None:
        # Derived from the class name, which for GPT-2 says nothing. The Trainer then counts T
        # tokens a sequence instead of the T - 1 predicted ones and reports too small a loss.
        model.loss_type = "ForCausalLM"
    return model


def new_or_pretrained_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> PreTrainedModel:
    """Loads the weights, or initialises them for the vocabulary of the tokenizer.

    Raises:
        ValueError: the tokenizer has more tokens than the pretrained model.
    """
    options: dict[str, Any] = {"dtype": model_args.model_dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.model_name_or_path is not None:
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"tokenizer_name={data_args.tokenizer_name!r} has {len(tokenizer)} tokens, the "
                f"model of {model_args.model_name_or_path!r} only {config.vocab_size}"
            )
        return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)
    # A small text may have fewer merges than asked for; the embedding keeps the size asked for.
    trained = data_args.tokenizer_name is None
    config.vocab_size = data_args.vocab_size or (config.vocab_size if trained else len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    if options["dtype"] == "auto":
        options["dtype"] = config.dtype or torch.float32
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, **options)


def add_perplexity(metrics: dict[str, float]) -> None:
    """With prediction_loss_only the Trainer leaves compute_metrics out."""
    metrics.setdefault("eval_perplexity", perplexity(metrics["eval_loss"]))


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="text-generation",
    data_name=lambda data: (
        (data.train_file and Path(data.train_file).name) or data.dataset_name or STDLIB
    ),
    complete=lambda _, metrics: add_perplexity(metrics),
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
