"""How fast this GPU's memory is: a copy, a read and a write far beyond its caches. All floors stand on the copy."""

from __future__ import annotations

import statistics

import torch

from ..contestants import Run
from .context import Context
from .meter import meter_of

REPEATS = 15
BYTES = 4 * 10**9


def run(context: Context) -> bool:
    size, repeats = BYTES, REPEATS
    if context.smoke:
        size, repeats = 10**6, 3
    elif context.device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    elements = size // 2 // 4096 * 4096
    source = torch.randn(elements, device=context.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    as_words = source.view(torch.int64)  # summed as integers, so that arithmetic is no part of it

    def copy() -> None:
        target.copy_(source)

    def read() -> None:
        as_words.sum()

    def write() -> None:
        target.fill_(1.0)

    meter = meter_of(context.device)
    works: dict[str, tuple[Run, int]] = {"copy": (copy, 2), "read": (read, 1), "write": (write, 1)}
    context.put("bandwidth", "buffer_bytes", value=elements * 2)
    for name, (work, passes) in works.items():
        for _ in range(3):
            meter.timed(work)
        seconds = [meter.timed(work) for _ in range(repeats)]
        rates = [passes * elements * 2 / s for s in seconds]
        found = {
            "bytes_per_second": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "repeats": repeats,
        }
        context.put("bandwidth", name, value=found)
        context.say(f"{name:<6} {found['bytes_per_second'] / 1e12:.3f} TB/s")
    return True
