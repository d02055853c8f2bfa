"""Elementwise functions that may run under ``torch.compile``, one pass over memory each.

A function marked with :func:`fused` runs as it is written, unless :func:`fusing` is on around the
call. Compiled, it sees

- numbers given by position, which may change with every step, as 0-dim tensors: a number would be
  part of the compiled code, and every step would compile anew;
- numbers given by keyword as constants;
- tensors flattened, so that one compilation serves the shapes of all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Looked up at every compilation: tests count with a backend of their own.
BACKEND: Any = "inductor"
_is_on: ContextVar[bool] = ContextVar("fusing", default=False)
_has_failed = False


@contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Runs functions marked with :func:`fused` under ``torch.compile``, or as they are."""
    token = _is_on.set(enabled)
    try:
        yield
    finally:
        _is_on.reset(token)


def check_can_compile() -> None:
    """Raises ValueError where this Python has no ``torch.compile``."""
    from torch._dynamo import is_dynamo_supported  # takes a second: only where it is asked for

    if not is_dynamo_supported():
        raise ValueError(
            "compile = True is not allowed: torch.compile does not work with this version of "
            "Python; it must be False"
        )


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Marks an elementwise function of tensors and numbers.

    Its tensors are of one shape ``[G, ...]``, that of the first, or one entry a group, ``[G, 1,
    ...]``. Tensors that it changes in place have no gaps in memory. It returns nothing, or a new
    tensor of that shape. A compilation that fails is logged once and the function runs as written.
    """

    @wraps(function)
    def call(*args: Any, **constants: Any) -> Result:
        if not _is_on.get() or _has_failed:
            return function(*args, **constants)
        try:
            assert isinstance(function, FunctionType)
            out = _compiled(function, BACKEND, **constants)(*_as_inputs(args))
        except _compile_error() as error:
            _give_up(error)
            return function(*args, **constants)
        return cast(Result, out if out is None else out.view(args[0].shape))

    return call


@cache
def _compiled(function: FunctionType, backend: Any, **constants: Any) -> Callable[..., Any]:
    # Torch counts and limits compilations by code object: each set of constants has its own.
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, closure=function.__closure__)
    own.__kwdefaults__ = constants
    return torch.compile(own, dynamic=True, backend=backend)


def _as_inputs(args: Sequence[Any]) -> list[Any]:
    """Numbers as tensors; tensors as ``[N]``, beside one entry a group as ``[G, N / G]``."""
    alike = len({arg.numel() for arg in args if isinstance(arg, Tensor)}) == 1
    return [_as_input(arg, 0 if alike else 1) for arg in args]


def _as_input(value: Any, first_dim: int) -> Any:
    if isinstance(value, Tensor):
        # Not a view for torch: it would compile anew for every shape of what is viewed.
        return value.flatten(first_dim).data
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value) if isinstance(value, int) else value


def _compile_error() -> type[Exception]:
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def _give_up(error: Exception) -> None:
    global _has_failed
    _has_failed = True
    reason = " ".join(str(error).split("\n\n")[0].split())
    logger.warning("compile=true: torch.compile failed, steps run uncompiled (%s)", reason)
