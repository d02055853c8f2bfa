"""Attention and gated feed-forward weights of a live model, by parameter name."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hf_precond.views.rules import Assignment, canonical_name, is_conv1d
from trainer_ext.layers.heads import read_heads
from trainer_ext.layers.roles import ROLES, Grouping, Kernel
from trainer_ext.layers.table import LAYOUTS, Layout
from trainer_ext.layers.walk import class_names, matrices, modules_with_config, submodule


def kernel_assignments(model: nn.Module, grouping: Grouping) -> dict[str, Assignment]:
    """Returns the assignment of every weight that the table knows, by canonical parameter name."""
    return {
        canonical_name(name): assignment
        for prefix, module, config in modules_with_config(model)
        if (layout := find_layout(module)) is not None
        for name, assignment in _layer_assignments(prefix, module, config, layout, grouping)
    }


def find_layout(module: nn.Module) -> Layout | None:
    """Returns the first row of the table that describes ``module``, if any."""
    names = class_names(module)
    for layout in LAYOUTS:
        if any(fnmatchcase(name, pattern) for name in names for pattern in layout.classes) and all(
            submodule(module, path) is not None for path in layout.kernels
        ):
            return layout
    return None


def _layer_assignments(
    prefix: str, module: nn.Module, config: Any, layout: Layout, grouping: Grouping
) -> Iterator[tuple[str, Assignment]]:
    heads = read_heads((submodule(module, layout.core), module), config)
    for path, role in layout.kernels.items():
        for local, owner in matrices(module.get_submodule(path)):
            rows, columns = owner.get_parameter("weight").shape
            kernel = Kernel(shape=(rows, columns), transposed=is_conv1d(owner), heads=heads)
            name = ".".join(filter(None, (prefix, path, local)))
            yield name, ROLES[role].assignment(kernel, grouping)
