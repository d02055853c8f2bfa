"""Walks over a live model: modules with their config, and the weights behind adapter wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def modules_with_config(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yields ``(name, module, config)``; the config is its own or its nearest ancestor's."""
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        inherited = configs.get(name.rpartition(".")[0])
        configs[name] = getattr(module, "config", None) or inherited
        yield name, module, configs[name]


def class_names(module: nn.Module) -> list[str]:
    """Names of the module's class and its bases: users subclass, FSDP2 puts a class on top."""
    return [cls.__name__ for cls in type(module).__mro__]


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a dotted path, ``module`` itself for ``""``, ``None`` if missing."""
    for part in filter(None, path.split(".")):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields ``(name, owner)`` of the two-dimensional weights that act as the weight of ``module``.

    That is its own weight, or, where an adapter library wrapped it, the one of the wrapped layer
    and of its trainable copies. The adapter's low-rank factors are matrices of their own.
    """
    for name, owner in module.named_modules():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        weight = dict(owner.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2:
            yield f"{name}.weight" if name else "weight", owner
