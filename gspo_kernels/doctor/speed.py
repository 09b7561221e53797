"""How fast the default backend moves the logits, as a share of what a copy of them reaches in the same rounds.

A quick measurement on the machine as it is loaded now; the benchmarks measure more carefully.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..losses.from_logits import gspo_loss, token_logprobs
from ..rows.dispatch import choose
from .findings import Speed, Timing
from .machine import available_bytes
from .services import DTYPES

VOCAB = 151_936
ROUNDS = 5
LEAST_BYTES = 64 << 20  # of the logits, for kernels: fewer may stay in a cache
MOST_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # a copy takes as much again
SECONDS = 0.15  # of a loss and its gradient, at most
MEASURED = ("fp32", "bf16")
_FIRST_ROWS = 16


def speed(device: torch.device) -> Speed:
    problem = ""
    timings: tuple[Timing, ...] = ()
    if device.type not in MOST_BYTES:
        problem = "measured on CPUs and on the GPUs that torch calls cuda"
    else:
        try:
            timings = tuple(timing for dtype in MEASURED for timing in _timings(device, dtype))
        except _NotMeasured as reason:
            problem = str(reason)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    return Speed(str(device), VOCAB, timings, problem)


class _NotMeasured(Exception):
    pass


def _timings(device: torch.device, dtype: str) -> Iterator[Timing]:
    backend = choose(torch.empty(1, 1, 2, dtype=DTYPES[dtype], device=device), None, warn=False)
    if device.type == "cpu" and backend.runs_stage_in_triton:
        raise _NotMeasured("Triton's interpreter runs, which is for tests")
    row_bytes = VOCAB * DTYPES[dtype].itemsize
    most = min(MOST_BYTES[device.type], _free_bytes(device) // 4) // row_bytes
    if most < _FIRST_ROWS:
        raise _NotMeasured("too little memory is free")
    first = _Work(device, dtype, _FIRST_ROWS)
    first.timed(first.forward_and_backward)  # compiles, and wakes threads
    seconds = first.timed(first.forward_and_backward)
    least = LEAST_BYTES // row_bytes if backend.has_kernels else _FIRST_ROWS
    rows = min(most, max(least, int(SECONDS / seconds * _FIRST_ROWS)))
    work = _Work(device, dtype, rows // _FIRST_ROWS * _FIRST_ROWS)
    runs: dict[str, Callable[[], object]] = {
        "copy": work.copy, "forward": work.forward, "forward and backward": work.forward_and_backward,
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + ROUNDS):
        for name, run in runs.items():
            taken = work.timed(run)
            if turn > 0:  # the first one touches the memory
                found[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    copy = 2 * work.bytes / medians["copy"]  # read and written
    for name, passes in (("forward", 1), ("forward and backward", 3)):  # read; read twice and written
        rate = passes * work.bytes / medians[name]
        yield Timing(dtype, name, backend.name, work.rows, medians[name], rate, copy, rate / copy)


class _Work:
    """A copy of the logits, a loss of them, and a loss with its gradient, which is written over them."""

    def __init__(self, device: torch.device, dtype: str, rows: int) -> None:
        """`rows`: a multiple of `_FIRST_ROWS`, which are repeated."""
        made = torch.Generator().manual_seed(3)
        few = 2.0 * torch.randn(1, _FIRST_ROWS, VOCAB, generator=made)
        self.rows, self._device = rows, device
        self._source = few.to(device, DTYPES[dtype]).repeat(1, rows // _FIRST_ROWS, 1)
        self._logits = torch.empty_like(self._source)
        self._token_ids = torch.randint(VOCAB, (1, rows), generator=made).to(device)
        self._advantages = torch.ones(1, device=device)
        self._old_logprobs = token_logprobs(self._source, self._token_ids).logprobs
        self.bytes = self._source.numel() * self._source.element_size()

    def copy(self) -> Tensor:
        return self._logits.copy_(self._source)

    def forward(self) -> None:
        with torch.no_grad():
            gspo_loss(self._logits, self._token_ids, self._advantages, self._old_logprobs)

    def forward_and_backward(self) -> None:
        logits = self._logits.detach().requires_grad_()
        loss, _ = gspo_loss(logits, self._token_ids, self._advantages, self._old_logprobs, overwrite_logits=True)
        loss.backward()

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds of a call after a copy. On a GPU its own clock: while it copies, the host prepares the launches."""
        self.copy()
        if self._device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = available_bytes()
    return MOST_BYTES["cpu"] * 4 if free is None else free
