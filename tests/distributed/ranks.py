"""Long-lived ranks on gloo that run one scenario after the other, in groups of one to four.

Importing torch and transformers takes seconds, a scenario a fraction of one: so the ranks are
forked from one process that has imported everything, and stay. Each scenario gets a process group
of its own. A rank that fails, dies or hangs ends the scenario with what every rank has to say, and
the next scenario gets new ranks.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST = 4
TIMEOUT = 60.0
# How long the other ranks may go on after one has failed: what failed on all of them is to be
# seen on all of them, what waits for the one that failed never ends.
_GRACE = 3.0
_PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "transformers.models.llama.modeling_llama",
    "trainer_ext",
]
SEED = 1234


class RankError(AssertionError):
    """A scenario did not come to its end on all ranks; the message has every rank's traceback."""


@dataclass(frozen=True, slots=True)
class Call:
    """A scenario for one rank of a group of ``world``, which meet at the file ``store``."""

    scenario: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    world: int
    store: str
    timeout: float


@dataclass(slots=True)
class _Rank:
    """One process, the parent's end of its pipe, and where its stacks are written on request."""

    process: Any
    pipe: Connection
    stacks: Path


class Ranks:
    """Up to four processes that run scenarios, functions of a module that a process can import."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._is_idle = True
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0

    def run(
        self,
        scenario: Callable[..., Any],
        *args: Any,
        world: int = MOST,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> list[Any]:
        """Runs ``scenario(*args, **options)`` on each rank and returns what each brought back.

        Args:
            world: number of ranks.
            timeout: seconds until the scenario counts as hanging.

        Raises:
            RankError: a rank raised, died or was not done in time.
        """
        ranks = self._started()[:world]
        store = Path(self._folder.name) / f"store-{self._calls}"
        self._calls += 1
        call = Call(scenario, args, options, world, str(store), timeout)
        for rank in ranks:
            rank.pipe.send(call)
        answers = _answers(ranks, timeout)
        store.unlink(missing_ok=True)
        if all(isinstance(answer, _Value) for answer in answers):
            return [answer.value for answer in answers if isinstance(answer, _Value)]
        self._is_idle = False
        self.close()
        raise RankError(f"{scenario.__name__} on {world} ranks:\n{_report(answers)}")

    def close(self) -> None:
        """Ends all processes; the next scenario starts new ones."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            # Without a pipe they end by themselves, unless they hang.
            rank.process.join(_GRACE if self._is_idle else 0)
            rank.process.kill()
            rank.process.join()
        self._ranks = []

    def _started(self) -> list[_Rank]:
        if not self._ranks:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOADED)
            self._ranks = [self._start(context, number) for number in range(MOST)]
            self._is_idle = True
        return self._ranks

    def _start(self, context: Any, number: int) -> _Rank:
        ours, theirs = context.Pipe()
        stacks = Path(self._folder.name) / f"stacks-{number}"
        process = context.Process(target=_serve, args=(number, theirs, str(stacks)), daemon=True)
        process.start()
        theirs.close()
        return _Rank(process, ours, stacks)


# -- what a rank answers, and how long it may take --


@dataclass(frozen=True, slots=True)
class _Value:
    """What a scenario returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Trouble:
    """What became of a rank that has no value, and the error alone if one was raised."""

    text: str
    error: str = ""


_Answer = _Value | _Trouble


def _report(answers: Sequence[_Answer]) -> str:
    """What each rank has to say; what another one has said already in short."""
    lines: list[str] = []
    told: set[str] = set()
    for number, answer in enumerate(answers):
        if isinstance(answer, _Value):
            lines.append(f"rank {number}: came to its end")
            continue
        lines.append(f"rank {number}: {answer.error if answer.error in told else answer.text}")
        told |= {answer.error} - {""}
    return "\n".join(lines)


def _answers(ranks: Sequence[_Rank], timeout: float) -> list[_Answer]:
    """Waits for all ranks, and not for long once one has failed."""
    found: dict[int, _Answer] = {}
    end = time.monotonic() + timeout
    while len(found) < len(ranks) and (left := end - time.monotonic()) > 0:
        open_pipes = {ranks[i].pipe: i for i in range(len(ranks)) if i not in found}
        for pipe in wait(list(open_pipes), left):
            number = open_pipes[pipe]
            found[number] = _answer_of(ranks[number])
            if isinstance(found[number], _Trouble):
                end = min(end, time.monotonic() + _GRACE)
    for number, rank in enumerate(ranks):
        if number not in found:
            found[number] = _Trouble(f"was not done in time\n{_stacks_of(rank)}")
    return [found[number] for number in range(len(ranks))]


def _answer_of(rank: _Rank) -> _Answer:
    try:
        return torch.load(io.BytesIO(rank.pipe.recv_bytes()), weights_only=False)
    except (EOFError, OSError):
        rank.process.join()
        return _Trouble(f"died with exit code {rank.process.exitcode}")


def _stacks_of(rank: _Rank) -> str:
    """Where a rank hangs, as far as it can still say."""
    os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return rank.stacks.read_text() if rank.stacks.exists() else ""


# -- on the rank --


def _serve(rank: int, pipe: Connection, stacks: str) -> None:
    """Answers calls until the parent is gone."""
    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            try:
                call = pipe.recv()
            except EOFError:
                return
            except Exception:
                answer: _Answer = _Trouble(f"cannot import the scenario\n{traceback.format_exc()}")
            else:
                answer = _answer(rank, call)
            pipe.send_bytes(_packed(answer))


def _answer(rank: int, call: Call) -> _Answer:
    try:
        torch.manual_seed(SEED)
        with process_group(rank, call):
            return _Value(call.scenario(*call.args, **call.options))
    except BaseException as error:
        return _Trouble(traceback.format_exc(), f"{type(error).__name__}: {error}")


@contextmanager
def process_group(rank: int, call: Call) -> Iterator[None]:
    """The default group, for one scenario; the launcher's variables as torchrun would set them."""
    launched = {"RANK": rank, "LOCAL_RANK": rank}
    launched |= {"WORLD_SIZE": call.world, "LOCAL_WORLD_SIZE": call.world, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in launched.items()})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{call.store}",
        rank=rank,
        world_size=call.world,
        # Longer than the parent waits: it asks for the stacks of ranks that hang.
        timeout=timedelta(seconds=2 * call.timeout),
    )
    try:
        # A rank that is done at once would close connections that others are still making.
        dist.barrier()
        yield
    finally:
        dist.destroy_process_group()


def _packed(answer: _Answer) -> bytes:
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()
