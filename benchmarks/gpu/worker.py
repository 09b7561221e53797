"""The process of one part: python -m benchmarks.gpu.worker <part> [arguments]; started by `parts.run`.

What it finds it writes at once, a line each, so that a crash later on takes none of it along.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import signal
import sys

from .context import Absent, Context
from .parts import ABSENT

MODULES = ("environment", "extension", "bandwidth", "speed", "linear", "one_read", "suite", "sanitizer", "tuning")


def main(arguments: list[str]) -> int:
    name, *rest = arguments
    if name not in MODULES:
        raise SystemExit(f"worker: expected one of {', '.join(MODULES)}; got {name!r}")
    _die_with_parent()
    context = Context([a for a in rest if a != "--smoke"], "--smoke" in rest)
    print(f"\n==== {name} {' '.join(rest)}", flush=True)
    try:
        result: bool = importlib.import_module(f".{name}", __package__).run(context)
    except Absent as reason:
        print(reason, flush=True)
        return ABSENT
    return 0 if result else 1


def _die_with_parent() -> None:
    """No process keeps a GPU after whoever started it was killed. Linux only."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
