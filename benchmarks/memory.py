"""The most memory that a call held beyond what was there before it, from Linux's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
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


def keep_freed_memory(keep: bool) -> None:
    """From now on memory that this process frees stays with it and serves its next calls, as allocators made for
    training keep it; or goes back to the system. With glibc alone: elsewhere nothing changes.

    Else a call that follows another's waits for pages: what lies free the host of a virtual machine takes back, and to
    get a gigabyte again can cost more than what is to be measured.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_MAX, 0 if keep else 1 << 16)  # big blocks come from the heap, too
        libc.mallopt(_TRIM_THRESHOLD, -1 if keep else 1 << 17)  # whose end is not given back


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
