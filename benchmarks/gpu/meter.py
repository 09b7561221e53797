"""Time by the GPU's own clock, memory by torch's allocator.

Before each timed call the L2 cache is swept, and the device is kept busy for two milliseconds, in which the host queues
the call: what is measured is the device's work, as in training, where the host runs ahead. `idle_seconds` measures the
other case. The first rounds of a contestant may contain a cudaMalloc; medians are quoted.

The sweep reads an array several times the size of the cache. Afterwards the cache holds no inputs and no dirty lines:
those of the copy that restored the logits would be written back in the timed call, and so would those of a sweep that
writes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from ..race import HostMeter, Meter, T

_BUSY_CYCLES = 4_000_000  # two milliseconds at 2 GHz
_SWEPT_BYTES = 256 << 20  # at least; four times the L2 cache where that is more


class CudaMeter:
    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stay_busy = getattr(torch.cuda, "_sleep", None)
        self._scratch = torch.zeros(swept_bytes() // 8, dtype=torch.int64, device="cuda")
        self._total = torch.zeros((), dtype=torch.int64, device="cuda")

    def get_ready(self) -> None:
        """Sweeps the L2 cache, then keeps the device busy: what the host queues next starts without waiting for it."""
        torch.sum(self._scratch, 0, out=self._total)
        if self._stay_busy:
            self._stay_busy(_BUSY_CYCLES)

    def timed(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        gc.disable()
        try:
            self.get_ready()
            self._start.record()
            answer = run()
            self._end.record()
            self._end.synchronize()
            del answer
        finally:
            gc.enable()
        return float(self._start.elapsed_time(self._end)) / 1e3

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


def swept_bytes() -> int:
    l2 = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
    return max(_SWEPT_BYTES, 4 * l2)


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
    return len(on_device(profile))


def on_device(profile: torch.profiler.profile) -> list[Any]:
    """A profile's kernels, copies and fills, in the order in which they started; waits of streams are none of them."""
    events = [e for e in profile.events() or [] if e.device_type.name == "CUDA"]
    return sorted((e for e in events if not e.name.endswith(" Sync")), key=lambda e: e.time_range.start)
