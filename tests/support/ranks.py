"""Real processes over gloo, started in a fraction of a second.

Importing torch takes a process seconds. Here one process, multiprocessing's fork server, imports it once and computes
nothing, so it has no threads that a fork would lose; every rank of every world is forked from it. What ranks call is a
module-level function of a test module, which each of them imports by name.

Ranks are copies of one process and share its hash seed: a set of strings has one order in all of them, as it would not
in ranks of their own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modes import DEFAULT_MODE
from torch import Tensor

mark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # of the test's own process: in ranks it is NaN
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
]


def free_port() -> int:
    """For trainers that open a store at a port of the environment's."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


START = 600.0  # seconds for the imports of a rank, before the clock of `timeout` runs
GRACE = 10.0  # seconds beyond `timeout`, in which collectives that gave up can say so
TEST_FOLDERS = (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2] / "docs" / "scripts")
# torch._dynamo: torch's operators import it when they are first called, which would take each rank a second.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "pytest", "gspo_kernels"]
PRELOADED += ["ranks", "oracle", "batches", "checks", "linear"]


# --- outside ----------------------------------------------------------------------------------------------------------


def run(
    world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 240.0, plain_memory: bool = False
) -> list[Any]:
    """What `work(rank, *arguments)` returned in each of `world` processes, in the order of ranks, detached on the CPU.

    The default group is all of them, over gloo, and its collectives give up after `timeout` seconds. Where a rank
    raises, dies, or has no answer after `timeout` + GRACE seconds, an AssertionError shows what became of every rank,
    the first to end first: the others lost it. No rank outlives the call.
    """
    pipes: list[connection.Connection] = []
    children: list[Any] = []  # every start method has its own class of processes
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                task = Task(rank, world, folder, timeout, plain_memory, dict(os.environ), work, arguments)
                ours, theirs = context().Pipe()
                child = context().Process(target=be, args=(theirs, task), name=f"rank {rank} of {world}", daemon=True)
                start(child)
                theirs.close()  # open here, it would hide that the rank has died
                pipes.append(ours)
                children.append(child)
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(START), f"rank {rank} of {world}: not started within {START:g} s"
                with contextlib.suppress(EOFError):  # it has died, which `collect` finds again
                    pipe.recv_bytes()
            for pipe in pipes:
                with contextlib.suppress(BrokenPipeError):
                    pipe.send_bytes(b"all are here")
            answers = collect(pipes, time.monotonic() + timeout + GRACE)
        finally:
            for child, pipe in zip(children, pipes, strict=False):
                if child.is_alive():
                    child.kill()
                child.join()
                pipe.close()
        failed = [answer for answer in answers.values() if answer is None or answer.error]
        if failed:
            name = f"{work.__module__}.{work.__qualname__}"
            fates = [fate(rank, answer, children[rank].exitcode, folder) for rank, answer in answers.items()]
            raise AssertionError("\n\n".join([f"{name}: {len(failed)} of {world} ranks failed", *fates]))
        return [answer.value for _, answer in sorted(answers.items()) if answer is not None]


@dataclass(frozen=True)
class Task:
    rank: int
    world: int
    folder: str
    timeout: float
    plain_memory: bool
    environment: dict[str, str]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    value: Any
    error: str  # a traceback, or nothing
    began: float
    ended: float  # on one clock, that of the machine: before anyone can miss this rank


def collect(pipes: list[connection.Connection], end: float) -> dict[int, Answer | None]:
    """By rank, the first to end first. Last, as None, those that died, and those without an answer at `end`."""
    found: dict[int, Answer] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (ready := connection.wait(list(waiting), max(0.0, end - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            with contextlib.suppress(EOFError, ConnectionResetError):
                found[rank] = pickle.loads(pipe.recv_bytes())
    first = dict(sorted(found.items(), key=lambda item: item[1].ended))
    return {**first, **{rank: None for rank in range(len(pipes)) if rank not in found}}


def fate(rank: int, answer: Answer | None, exitcode: int, folder: str) -> str:
    if answer is None:
        stack = stack_file(folder, rank)
        where = stack.read_text().rstrip() if stack.exists() else "it never began: see its standard error"
        return f"--- rank {rank}: no answer, exit code {exitcode}\n{where}"
    how = f"{'raised' if answer.error else 'returned'} after {answer.ended - answer.began:.2f} s"
    return f"--- rank {rank}: {how}\n{answer.error}"


def stack_file(folder: str, rank: int) -> Path:
    """Where a rank that dies or hangs writes its stack."""
    return Path(folder, f"stack-{rank}")


@functools.cache
def context() -> Any:
    """How ranks start: on Linux from a fork server; elsewhere spawned, as system libraries may not survive a fork."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(process: Any) -> None:
    """With the tests' folder on the path: the server, which the first start starts, imports from it before any rank."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, TEST_FOLDERS), before]))
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


# --- inside a rank ----------------------------------------------------------------------------------------------------


def be(pipe: connection.Connection, task: Task) -> None:
    """One rank. Having answered, it stays until `run` ends it, so that nobody loses a peer that has returned."""
    pipe.send_bytes(b"here")
    pipe.recv_bytes()  # until all are: a peer's imports count against no timeout
    began = time.monotonic()
    os.environ.clear()
    os.environ.update(task.environment)  # the server has that of its own start
    stack = stack_file(task.folder, task.rank).open("w")
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(task.timeout + GRACE - 1, file=stack, exit=True)
    torch.set_num_threads(1)
    if not task.plain_memory:  # as conftest.py does: what is forgotten to be written cannot pass by luck
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    error = ""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{task.folder}/meet",
            rank=task.rank,
            world_size=task.world,
            timeout=timedelta(seconds=task.timeout),
        )
        dist.barrier()  # a rank that raises at once is no reason why another cannot begin
        value = task.work(task.rank, *task.arguments)
        answer = pickled(Answer(value, error, began, time.monotonic()))
    except BaseException:  # pytest.skip and sys.exit too: no rank ends unheard
        error = traceback.format_exc()
        answer = pickled(Answer(None, error, began, time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(answer)
    if not error:
        with contextlib.suppress(EOFError):
            pipe.recv_bytes()


class Detached(pickle.Pickler):
    """A tensor, wherever it is in a result, is its values alone: no graph, no gradient, and on the CPU."""

    def reducer_override(self, found: Any) -> Any:
        if not isinstance(found, Tensor):
            return NotImplemented
        return found.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def pickled(answer: Answer) -> bytes:
    Detached(stream := io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(answer)
    return stream.getvalue()


@dataclass(frozen=True)
class Refused:
    type: str
    message: str
    seconds: float


def refused(call: Callable[[], object]) -> Refused | None:
    """How `call` was refused, and after how long, or None if it was not. One rank's error must be every rank's."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        return Refused(type(error).__name__, str(error), time.monotonic() - began)
    return None


def grid(rank: int, tp: int, cp: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The tensor parallel and the context parallel group of `rank`, groups of one too. Rank c * tp + t is (t, c).

    A group is made by all ranks, those outside it included, and by all in one order.
    """
    assert dist.get_world_size() == tp * cp, f"expected a world of {tp} * {cp}; got {dist.get_world_size()}"
    assert dist.group.WORLD is not None
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # else that of gloo, half an hour
    rows = [dist.new_group([c * tp + t for t in range(tp)], timeout=timeout) for c in range(cp)]
    columns = [dist.new_group([c * tp + t for c in range(cp)], timeout=timeout) for t in range(tp)]
    c, t = divmod(rank, tp)
    return rows[c], columns[t]
