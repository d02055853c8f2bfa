"""Makes ``--optim NAME`` valid in transformers. The only file that touches its non-public names.

transformers has no plug-in point for optimizers: the command line takes its choices from the
members of ``OptimizerNames``, ``TrainingArguments`` looks its value up there again, and the
handlers sit in a module-level dict. So ``register()`` adds real enum members and handlers in place,
and puts our behaviours around a few Trainer methods; ``unregister()`` takes all of it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import Enum, EnumMeta
from typing import Any

import transformers
from torch import nn
from transformers import Trainer, trainer, trainer_optimizer, training_args

from trainer_ext import behaviours
from trainer_ext.build import optimizer_cls_and_kwargs
from trainer_ext.callbacks import OptimizerInUseCallback
from trainer_ext.served import MARK, served_names, warn_of_taken_names

_BEHAVIOURS: Mapping[str, Callable[..., Any]] = {
    "train": behaviours.train,
    "log": behaviours.log,
    "create_model_card": behaviours.create_model_card,
    "_save_checkpoint": behaviours.save_checkpoint,
    "_save_optimizer_and_scheduler": behaviours.save_state,
    "_load_optimizer_and_scheduler": behaviours.load_state,
}
_REQUIRED: tuple[tuple[Any, str, Any], ...] = (
    (training_args, "OptimizerNames", EnumMeta),
    (trainer_optimizer, "_OPTIMIZER_HANDLERS", dict),
    (trainer_optimizer, "OptimizerContext", type),
    (trainer, "DEFAULT_CALLBACKS", list),
    (Trainer, "get_optimizer_cls_and_kwargs", Callable),
    (Trainer, "get_decay_parameter_names", Callable),
    *((Trainer, name, Callable) for name in _BEHAVIOURS),
)
_installed: ExitStack | None = None


class TransformersLayoutError(RuntimeError):
    """The installed transformers release lacks a name that registration stands on."""


def register() -> None:
    """Makes every name of the registry a valid ``--optim`` value of the stock Trainer. Idempotent.

    A name that transformers has itself keeps its meaning there, with a warning.

    Raises:
        TransformersLayoutError: this release is laid out differently; nothing is changed.
    """
    global _installed
    if _installed is not None:
        return
    check_layout()
    with ExitStack() as undo:
        warn_of_taken_names()
        for name in served_names():
            _add_optimizer(undo, name)
        for method, behaviour in _BEHAVIOURS.items():
            _wrap_method(undo, method, behaviour)
        _wrap_optimizer_choice(undo)
        trainer.DEFAULT_CALLBACKS.append(OptimizerInUseCallback)
        undo.callback(trainer.DEFAULT_CALLBACKS.remove, OptimizerInUseCallback)
        _self_test()
        _installed = undo.pop_all()


def unregister() -> None:
    """Takes back everything :func:`register` did; existing Trainers lose our behaviours too."""
    global _installed
    if _installed is not None:
        _installed.close()
        _installed = None


def check_layout() -> None:
    """Checks the names of transformers that this file stands on.

    Raises:
        TransformersLayoutError: names what is missing.
    """
    missing = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, name, kind in _REQUIRED
        if not isinstance(getattr(owner, name, None), kind)
    ]
    enum_parts = ("_member_names_", "_member_map_", "_value2member_map_")
    names = getattr(training_args, "OptimizerNames", None)
    missing += [f"OptimizerNames.{part}" for part in enum_parts if not hasattr(names, part)]
    if missing:
        raise TransformersLayoutError(
            f"transformers {transformers.__version__} cannot be extended: "
            f"{', '.join(missing)} not found. Install transformers 5.23, which is known to work"
        )


class HookedTrainer(Trainer):
    """The Trainer with our behaviours, by overriding instead of any global change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_layout()
        super().__init__(*args, **kwargs)
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(callback, OptimizerInUseCallback) for callback in callbacks):
            self.add_callback(OptimizerInUseCallback)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """See :func:`trainer_ext.behaviours.get_optimizer_cls_and_kwargs`."""
        return behaviours.get_optimizer_cls_and_kwargs(
            Trainer.get_optimizer_cls_and_kwargs, args, model
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`trainer_ext.behaviours.train`."""
        return behaviours.train(self, super().train, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See :func:`trainer_ext.behaviours.log`."""
        behaviours.log(self, super().log, logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See :func:`trainer_ext.behaviours.create_model_card`."""
        behaviours.create_model_card(self, super().create_model_card, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        behaviours.save_checkpoint(self, super()._save_checkpoint, model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        behaviours.save_state(self, super()._save_optimizer_and_scheduler, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        behaviours.load_state(self, super()._load_optimizer_and_scheduler, checkpoint)


def _add_optimizer(undo: ExitStack, name: str) -> None:
    member = _add_member(undo, training_args.OptimizerNames, name)
    handlers: dict[Any, Any] = trainer_optimizer._OPTIMIZER_HANDLERS
    handlers[member] = lambda ctx: optimizer_cls_and_kwargs(ctx.args, ctx.model)
    undo.callback(handlers.pop, member)


def _add_member(undo: ExitStack, names: type[Enum], value: str) -> Enum:
    """Adds a str member to an enum class that already exists (Python 3.10 to 3.13)."""
    key = value.upper()
    if key in names._member_map_ or value in names._value2member_map_:
        raise TransformersLayoutError(f"{names.__name__} already has a member {key} = {value!r}")
    member: Any = str.__new__(names, value)  # type: ignore[type-var]
    member._name_, member._value_ = key, value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    setattr(member, MARK, True)
    # training_args.bin must load where this package is missing: the member pickles as a plain str.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    member.__deepcopy__ = lambda memo: member
    names._member_names_.append(key)
    names._member_map_[key] = member
    names._value2member_map_[value] = member
    # Enum forbids assignment of members; Python >= 3.12 finds them as class attributes only.
    type.__setattr__(names, key, member)

    undo.callback(names._member_names_.remove, key)
    undo.callback(names._member_map_.pop, key)
    undo.callback(names._value2member_map_.pop, value)
    undo.callback(type.__delattr__, names, key)
    return member


def _wrap_method(undo: ExitStack, method: str, behaviour: Callable[..., Any]) -> None:
    stock = getattr(Trainer, method)

    @functools.wraps(stock)
    def wrapper(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(stock, self)
        if isinstance(self, HookedTrainer):
            return bound(*args, **kwargs)
        return behaviour(self, bound, *args, **kwargs)

    setattr(Trainer, method, wrapper)
    undo.callback(setattr, Trainer, method, stock)


def _wrap_optimizer_choice(undo: ExitStack) -> None:
    """Hands ``optim_args`` of our optimizers to our parser; the stock one would die on it first."""
    method = "get_optimizer_cls_and_kwargs"
    descriptor = Trainer.__dict__[method]
    stock = Trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(stock)
    def wrapper(args: Any, model: Any = None) -> tuple[Any, Any]:
        return behaviours.get_optimizer_cls_and_kwargs(stock, args, model)

    setattr(Trainer, method, staticmethod(wrapper))
    undo.callback(setattr, Trainer, method, descriptor)


def _self_test() -> None:
    """Raises TransformersLayoutError if a registered name is not what transformers would find."""
    names, handlers = training_args.OptimizerNames, trainer_optimizer._OPTIMIZER_HANDLERS
    for name in served_names():
        member = names(name)
        found = (
            member == name
            and member in list(names)
            and getattr(names, name.upper()) is member
            and names[name.upper()] is member
            and member in handlers
        )
        if not found:
            raise TransformersLayoutError(
                f"transformers {transformers.__version__} does not find {name!r} after registration"
            )
