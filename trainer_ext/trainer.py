"""A Trainer and training arguments that know our optimizers without touching any global.

``trainer_ext.register()`` gives the stock classes the same behaviour; these two serve programs that
must not change transformers for others in the same process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from trainer_ext.build import optim_args_of
from trainer_ext.optim_names import HookedTrainer
from trainer_ext.served import served_names

DEFAULT_OPTIMIZER = "shared_basis_adagrad"


class PrecondTrainer(HookedTrainer):
    """The Trainer with our optimizers, checkpoints, health figures and model card section.

    Combines with subclasses of the Trainer: ``class MyTrainer(PrecondTrainer, Seq2SeqTrainer)``.
    """


@dataclass
class PrecondTrainingArguments(TrainingArguments):
    """Training arguments whose ``optim`` is any stock name or one of ours, with typed options.

    Args:
        optim: name of the optimizer.
        optim_options: its options with their Python types, in addition to ``optim_args``.
        strict_resume: fail where a checkpoint holds no fitting optimizer state.

    Raises:
        ValueError: an unknown optimizer, or a mistake in ``optim_args`` or ``optim_options``.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "optim_options",
    ]

    optim: str = field(
        default=DEFAULT_OPTIMIZER,
        metadata={"help": "The optimizer: one of hf_precond or of transformers."},
    )
    optim_options: dict | str | None = field(
        default=None,
        metadata={"help": "Options of the optimizer as a JSON object, in addition to optim_args."},
    )
    strict_resume: bool = field(
        default=False,
        metadata={"help": "Fail when a checkpoint holds no fitting optimizer state."},
    )

    def __post_init__(self) -> None:
        name = str(getattr(self.optim, "value", self.optim))
        if name not in served_names():
            super().__post_init__()
            return
        # The stock check knows the names of transformers only.
        self.optim = TrainingArguments.default_optim
        super().__post_init__()
        self.optim = name
        optim_args_of(self, name)
