"""Refusing engines that hand the optimizer flat one-dimensional parameters.

In those no layer can be seen, let alone preconditioned; other optimizers silently become AdamW.
Types are told by name: importing these engines takes seconds, and most runs never use them.
"""

from __future__ import annotations

from torch import Tensor, nn


def flat_message(what: str) -> str:
    """Why an engine is refused, and what to use in its place."""
    return (
        f"{what} hands the optimizer flat one-dimensional parameters, in which no layer can be "
        "preconditioned. Use DDP or FSDP version 2 (fsdp_version: 2)"
    )


def check_model_not_flat(model: nn.Module) -> None:
    """Raises ValueError where FSDP version 1 has flattened the parameters of a model."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(flat_message("FSDP version 1"))


def check_not_flat(param: Tensor) -> None:
    """Raises ValueError for a parameter that FSDP version 1 or DeepSpeed ZeRO-3 has flattened."""
    if type(param).__name__ == "FlatParameter":
        raise ValueError(flat_message("FSDP version 1"))
    if hasattr(param, "ds_id"):
        raise ValueError(flat_message("DeepSpeed ZeRO-3"))
