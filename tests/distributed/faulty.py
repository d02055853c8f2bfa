"""Scenarios in which one rank is unlike the others: its gradient, its LAPACK, its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.distributed.training import STEPS, Run, Training, Weights, local, rank_and_world

FACTORIZATIONS = ("eigh", "eigvalsh", "qr", "svd", "cholesky_ex")


def with_noise(run: Run, noisy: int, steps: int = STEPS) -> Weights:
    """Trains where the decompositions of one rank are off by a bit, as those of a GPU may be."""
    with altered(_jittered) if rank_and_world()[0] == noisy else ExitStack():
        return Training(run).take(range(steps)).weights()


def with_failures(run: Run, failing: int, steps: Iterable[int]) -> dict[str, Any]:
    """Trains with decompositions that fail on one rank at some steps.

    Returns:
        weights, health figures, and the error that ended it, if one did.
    """
    training = Training(run)
    error = ""
    steps = set(steps)
    for step in range(STEPS):
        training.backward(step)
        fails = step in steps and training.rank == failing
        try:
            with altered(_failing) if fails else ExitStack():
                training.step()
        except ArithmeticError as raised:
            error = f"{type(raised).__name__}: {raised}"
            break
    return {"weights": training.weights(), "health": training.optimizer.health(), "error": error}


def with_poison(run: Run, name: str, poisoned: int, steps: Iterable[int]) -> dict[str, Any]:
    """Trains where at some steps a gradient is not finite.

    Averaged by DDP it is so on every rank, in shards only where the entry lies: at ``poisoned``.

    Returns:
        weights, health figures, and the error that ended it, if one did.
    """
    training = Training(run)
    param = dict(training.model.named_parameters())[name]
    error = ""
    steps = set(steps)
    for step in range(STEPS):
        training.backward(step)
        if step in steps and param.grad is not None:
            _poison(param.grad, training, poisoned)
        try:
            training.step()
        except ArithmeticError as raised:
            error = f"{type(raised).__name__}: {raised}"
            break
    return {"weights": training.weights(), "health": training.optimizer.health(), "error": error}


def disagreeing(run: Run, other: Run, odd: int) -> str:
    """Lets one rank train something else; returns what each rank was told."""
    try:
        Training(other if rank_and_world()[0] == odd else run).take(range(2))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _poison(grad: Tensor, training: Training, rank: int) -> None:
    part = local(grad)
    if part is grad or training.rank == rank:
        assert part.numel(), "the poisoned rank has no part of this parameter"
        part.view(-1)[-1] = torch.nan


@contextmanager
def altered(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Puts something in the place of the factorizations of torch.linalg."""
    with ExitStack() as stack:
        for name in FACTORIZATIONS:
            stock = getattr(torch.linalg, name)
            stack.enter_context(mock.patch.object(torch.linalg, name, change(stock)))
        yield


def _failing(stock: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        if isinstance(found, torch.return_types.linalg_cholesky_ex):
            return found.L, torch.ones_like(found.info)
        raise torch.linalg.LinAlgError("the test lets it fail")

    return fail


def _jittered(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Results that differ from the true ones in about their last bit."""

    def jitter(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        eps = torch.finfo(x.dtype).eps
        return x * (1 + eps * torch.randint_like(x, -2, 3))

    def call(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        if isinstance(found, Tensor):
            return jitter(found)
        return type(found)(map(jitter, found))

    return call
