"""The GPU of a run: what it is, how fast its memory is, and how time and memory are measured on it.

Time is the GPU's own clock, memory is of torch's allocator. Before each timed call the L2 cache is swept, and the
device is kept busy for two milliseconds while the host queues the call. So the device's work alone is measured, as in
training, where the host runs ahead. `idle_seconds` measures the other case. The first rounds of a contestant may
contain a cudaMalloc; medians are reported.

The sweep reads an array several times the size of the cache. Afterwards the cache holds no inputs and no dirty lines.
Dirty lines, of the copy that restored the logits or of a sweep that writes, would be written back in the timed call.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

import gspo_kernels

from .gpu_parts import Absent, Context
from .race import HostMeter, Meter, T
from .results import machine

_BUSY_CYCLES = 4_000_000  # two milliseconds at 2 GHz
_SWEPT_BYTES = 256 << 20  # at least; four times the L2 cache where that is more


class CudaMeter:
    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stay_busy = getattr(torch.cuda, "_sleep", None)
        self._scratch = torch.zeros(swept_bytes() // 8, dtype=torch.int64, device="cuda")
        self._total = torch.zeros((), dtype=torch.int64, device="cuda")

    def get_ready(self) -> None:
        """Sweeps the L2 cache, then keeps the device busy while the host queues what is timed."""
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
    """A profile's kernels, copies and fills in the order of their starts, without the waits of streams."""
    events = [e for e in profile.events() or [] if e.device_type.name == "CUDA"]
    return sorted((e for e in events if not e.name.endswith(" Sync")), key=lambda e: e.time_range.start)


PACKAGES = ("triton", "liger-kernel", "trl", "transformers", "pytest", "hypothesis", "numpy", "ninja")
QUERY = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "ecc.mode.current", "mig.mode.current")


# ---- what the numbers depend on


def environment(context: Context) -> bool:
    """The GPU and its limits, driver, versions, commit, and which backend runs."""
    about = {**machine(PACKAGES), "cuda": torch.version.cuda}
    if context.smoke:
        context.put("machine", value={"gpu": "smoke", **about})
        return True
    if not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} sees no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    about |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "nvidia_smi": _nvidia_smi(),
    }
    context.put("machine", value=about)  # before anything runs on the device
    text = gspo_kernels.explain(torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=context.device))
    context.put("machine", "explain", value=text.splitlines())
    context.say(f"{properties.name}, torch {torch.__version__}, triton {about['packages']['triton']}")
    context.say(text.splitlines()[0])
    return True


def _nvidia_smi() -> dict[str, str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = {}
    for field in QUERY:  # one at a time: an older tool refuses the whole line for one field it does not know
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [tool, "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            found[field] = answer.stdout.strip()
    return found


# ---- how fast the memory is


def bandwidth(context: Context) -> bool:
    """A copy, a read and a write of more than the caches hold. All floors are computed from the copy."""
    size, repeats = 4 * 10**9, 15
    if context.smoke:
        size, repeats = 10**6, 3
    elif context.device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    elements = size // 2 // 4096 * 4096
    source = torch.randn(elements, device=context.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    as_words = source.view(torch.int64)  # summed as integers, so that arithmetic is no part of it

    works: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(source), 2),
        "read": (as_words.sum, 1),
        "write": (lambda: target.fill_(1.0), 1),
    }
    meter = meter_of(context.device)
    context.put("bandwidth", "buffer_bytes", value=elements * 2)
    for name, (work, passes) in works.items():
        rates = [passes * elements * 2 / meter.timed(work) for _ in range(3 + repeats)][3:]
        found = {"bytes_per_second": statistics.median(rates), "min": min(rates), "max": max(rates), "repeats": repeats}
        context.put("bandwidth", name, value=found)
        context.say(f"{name:<6} {found['bytes_per_second'] / 1e12:.3f} TB/s")
    return True
