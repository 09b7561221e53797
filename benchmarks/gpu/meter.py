"""Time by the GPU's own clock, memory by torch's allocator.

Before each timed call the device is kept busy for two milliseconds, in which the host queues the call: what is measured
is the device's work, as in training, where the host runs ahead. `idle_seconds` measures the other case. The L2 cache is
not flushed: the logits of even 1,024 rows are several times its size, and no call finds its first rows there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from ..race import HostMeter, Meter, T

_BUSY_CYCLES = 4_000_000


class CudaMeter:
    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stay_busy = getattr(torch.cuda, "_sleep", None)

    def timed(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        gc.disable()
        try:
            if self._stay_busy:
                self._stay_busy(_BUSY_CYCLES)
            self._start.record()
            answer = run()
            self._end.record()
            self._end.synchronize()
            del answer
        finally:
            gc.enable()
        return self._start.elapsed_time(self._end) / 1e3

    def peak_extra_bytes(self, run: Callable[[], T]) -> tuple[T, int | None]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = run()
        torch.cuda.synchronize()
        return answer, torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def idle_seconds(run: Callable[[], object]) -> float:
    """From an idle device to an idle device, by the host's clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    answer = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del answer
    return seconds


def meter_of(device: str) -> Meter:
    return CudaMeter() if device == "cuda" else HostMeter()


def finish() -> None:
    """Waits for the device; raises what went wrong on it since."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call starts, copies and fills included."""
    run()
    finish()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        finish()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
