"""The most memory that a call held beyond what was there before it, from Linux's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_RESET = Path("/proc/self/clear_refs")


def peak_extra_bytes(run: Callable[[], T]) -> tuple[T, int | None]:
    """The call's result, which is counted, and the peak of resident memory above its start; None where not Linux.

    Free heap goes back to the system first, so that nothing hides in it: big blocks are mapped afresh by each call.
    """
    gc.collect()
    if not (sys.platform.startswith("linux") and _RESET.exists()):
        return run(), None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    _RESET.write_text("5")  # the high-water mark falls to what is resident now
    before = _status("VmRSS")
    result = run()
    return result, max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
