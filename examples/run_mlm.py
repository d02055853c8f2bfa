"""Masked language modelling, from text files or a data set of the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from datasets import load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass
class ModelArguments:
    tokenizer_name: str = field(default="bert-base-uncased")
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "train one of so many tokens on the text instead"}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "weights to go on from"})
    config_name: str | None = field(default=None, metadata={"help": "configuration to begin with"})
    config_overrides: str = field(default="", metadata={"help": "hidden_size=64,..."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "text, one example a line"})
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    max_length: int = 128
    mlm_probability: float = 0.15


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Word pieces, as BERT has them."""
    pieces = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    kept = list(SPECIAL.values())
    pieces.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=kept)
    )
    ends = (SPECIAL["cls_token"], SPECIAL["sep_token"])
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}",
        pair=f"{ends[0]} $A {ends[1]} $B {ends[1]}",
        special_tokens=[(token, pieces.token_to_id(token)) for token in ends],
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **SPECIAL)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    if data_args.dataset_name:
        raw = load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    else:
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = load_dataset("text", data_files={key: path for key, path in files.items() if path})

    if model_args.train_tokenizer:
        texts = (row["text"] for row in raw["train"])
        tokenizer = train_tokenizer(texts, model_args.train_tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    if model_args.model_name_or_path:
        model = AutoModelForMaskedLM.from_pretrained(model_args.model_name_or_path)
    else:
        config = AutoConfig.from_pretrained(model_args.config_name)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        model = AutoModelForMaskedLM.from_config(config)

    tokens = raw.filter(lambda row: row["text"].strip() != "").map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=data_args.max_length),
        batched=True,
        remove_columns=["text"],
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=data_args.mlm_probability
        ),
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card()


if __name__ == "__main__":
    main()
