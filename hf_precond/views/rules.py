"""Which view each parameter of a model gets: ordered rules, first match wins.

A rule sees one parameter together with the module that owns it and answers with an
:class:`Assignment`, or ``None`` to pass. ``GENERAL_RULES`` covers plain torch modules; packages
that know an architecture put their own rules in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hf_precond.views.view import ParamView, check_cover, columns, experts, rows

_WRAPPER_PARTS = frozenset(
    {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamInfo:
    """One trainable parameter and its place in the model.

    Attributes:
        name: canonical dotted name (wrapper prefixes of DDP, compile and checkpointing removed).
        param: the tensor.
        module: the module that owns it.
        module_name: canonical dotted name of that module.
        tied_names: all further canonical names of the same tensor.
        owners: all modules that own the tensor (more than one where weights are tied).
        parents: the modules above ``module``, the model first.
    """

    name: str
    param: Tensor
    module: nn.Module
    module_name: str
    tied_names: tuple[str, ...] = ()
    owners: tuple[nn.Module, ...] = ()
    parents: tuple[nn.Module, ...] = ()

    @property
    def local_name(self) -> str:
        """The attribute name inside the owning module, for example ``"weight"``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The views a rule gives to a parameter. No views means the fallback algorithm.

    Attributes:
        views: tuple that covers each element once, or ``()`` for the fallback.
        reason: a few words for the explanation table.
    """

    views: tuple[ParamView, ...]
    reason: str


Rule = Callable[[ParamInfo], Assignment | None]


def canonical_name(name: str) -> str:
    """Returns a parameter or module name without the prefixes that wrappers add.

    >>> canonical_name("module._orig_mod.lm_head.weight")
    'lm_head.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def iter_params(model: nn.Module) -> Iterator[ParamInfo]:
    """Yields every trainable parameter once, in ``named_parameters`` order, with its owners."""
    names: dict[int, list[str]] = {}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    modules = dict(model.named_modules())
    paths = {module: name for name, module in modules.items()}
    for module_name, module in modules.items():
        prefix = canonical_name(module_name)
        for local, param in module.named_parameters(recurse=False):
            # id() only pairs the two walks over the same live model; it is never stored.
            names.setdefault(id(param), []).append(f"{prefix}.{local}" if prefix else local)
            owners.setdefault(id(param), []).append((prefix, module))
    for _, param in model.named_parameters():
        if not param.requires_grad:
            continue
        first, *tied = names[id(param)]
        (module_name, module), *_ = owners[id(param)]
        yield ParamInfo(
            name=first,
            param=param,
            module=module,
            module_name=module_name,
            tied_names=tuple(tied),
            owners=tuple(owner for _, owner in owners[id(param)]),
            parents=tuple(modules[path] for path in _paths_above(paths[module])),
        )


def _paths_above(path: str) -> list[str]:
    """Paths of the modules above one.

    >>> _paths_above("layers.0.mlp"), _paths_above("")
    (['', 'layers', 'layers.0'], [])
    """
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def fallback(reason: str) -> Assignment:
    """The assignment of a parameter without a matrix view."""
    return Assignment(views=(), reason=reason)


def vector_rule(info: ParamInfo) -> Assignment | None:
    """Scalars, biases and norm weights follow the fallback, whatever their shape.

    Stacked experts have biases ``[E, O]``, layer norms over images weights ``[H, W]``.
    """
    if info.param.ndim < 2:
        return fallback("vector or scalar")
    if info.local_name.endswith("bias"):
        return fallback("bias")
    return fallback("norm") if isinstance(info.module, nn.LayerNorm | nn.RMSNorm) else None


def embedding_rule(info: ParamInfo) -> Assignment | None:
    """Embeddings, and any weight tied to one, follow the fallback."""
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in info.owners):
        return fallback("tied to an embedding" if info.tied_names else "embedding")
    return None


def output_head_rule(info: ParamInfo) -> Assignment | None:
    """A projection onto the vocabulary, found by its name, follows the fallback."""
    if info.module_name.rpartition(".")[2] in {"lm_head", "embed_out", "output_projection"}:
        return fallback("output head")
    return None


def linear_rule(info: ParamInfo) -> Assignment | None:
    """``nn.Linear`` and subclasses: one block per output neuron (paper 001, H_out)."""
    if isinstance(info.module, nn.Linear) and info.param.ndim == 2:
        return Assignment(views=(rows(info.param.shape),), reason="linear")
    return None


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's linear layer with a weight ``[I, O]``.

    Known by its class name, so that torch is all we need; a base class counts, because FSDP2 puts
    a class of its own on top.
    """
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def conv1d_rule(info: ParamInfo) -> Assignment | None:
    """GPT-2's transposed linear layer."""
    if is_conv1d(info.module) and info.param.ndim == 2:
        return Assignment(views=(columns(info.param.shape),), reason="transposed linear (Conv1D)")
    return None


def convolution_rule(info: ParamInfo) -> Assignment | None:
    """Convolutions: one block per output channel, one group per convolution group."""
    module = info.module
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or info.param.ndim < 3:
        return None
    if module.groups == info.param.shape[0]:
        return fallback("depthwise convolution")
    return Assignment(views=(rows(info.param.shape, groups=module.groups),), reason="convolution")


def matrix_rule(info: ParamInfo) -> Assignment | None:
    """Any other matrix is read as ``[O, I]``, any other 3-D weight as experts ``[E, O, I]``."""
    if info.param.ndim == 2:
        return Assignment(views=(rows(info.param.shape),), reason="matrix")
    if info.param.ndim == 3 and min(info.param.shape) > 1:
        return Assignment(views=experts(info.param.shape), reason="stacked matrices")
    return None


def catch_all_rule(info: ParamInfo) -> Assignment | None:
    """Whatever is left follows the fallback."""
    return fallback(f"no matrix view for {info.param.ndim} dimensions")


GENERAL_RULES: tuple[Rule, ...] = (
    vector_rule,
    embedding_rule,
    output_head_rule,
    linear_rule,
    conv1d_rule,
    convolution_rule,
    matrix_rule,
    catch_all_rule,
)


def assign(info: ParamInfo, rules: Sequence[Rule]) -> Assignment:
    """Returns the first matching rule's assignment after checking that it covers each element once.

    Raises:
        ValueError: if no rule matches, or the views do not cover the parameter.
    """
    for rule in rules:
        assignment = rule(info)
        if assignment is None:
            continue
        if assignment.views:
            try:
                check_cover(assignment.views, info.param.shape)
            except ValueError as error:
                raise ValueError(f"parameter {info.name!r}: {error}") from error
        return assignment
    raise ValueError(
        f"no view rule matches parameter {info.name!r} of shape {tuple(info.param.shape)}"
    )


def assign_all(
    model: nn.Module, rules: Iterable[Rule] = GENERAL_RULES
) -> list[tuple[ParamInfo, Assignment]]:
    """Returns every trainable parameter of ``model`` with its assignment, in model order."""
    rules = tuple(rules)
    return [(info, assign(info, rules)) for info in iter_params(model)]
