"""The most memory that a call held beyond what was there before it, from Linux's own high-water mark."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_RESET = Path("/proc/self/clear_refs")


def peak_extra_bytes(run: Callable[[], T]) -> tuple[T, int | None]:
    """The call's result, which is counted, and the peak of resident memory above its start; None where not Linux.

    Free heap goes back to the system first, so that nothing hides in it: each call maps its big blocks afresh.
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


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Memory that this process frees stays with it and serves its next calls, as with allocators made for training.

    With glibc alone: elsewhere nothing changes.

    Otherwise a call waits for pages: a virtual machine's host takes back what is free, and to get a gigabyte again can
    cost more than what is to be measured.
    """
    _keep_freed_memory(True)
    try:
        yield
    finally:
        _keep_freed_memory(False)


def _keep_freed_memory(keep: bool) -> None:
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_MAX, 0 if keep else 1 << 16)  # big blocks come from the heap, too
        libc.mallopt(_TRIM_THRESHOLD, -1 if keep else 1 << 17)  # whose end is not returned to the system


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
