"""The process of one part: python -m benchmarks.gpu.worker <module> [arguments]; started by `parts.run`.

What it finds it writes at once, a line each, so that a crash later on takes none of it along. With --wait it imports
torch and takes its arguments from a line on standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys

from .context import Absent, Context
from .parts import ABSENT

MODULES = (
    "environment", "extension", "bandwidth", "suite", "profile", "speed", "one_read", "variants", "counters", "linear",
    "sanitizer",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    die_with_parent()
    if arguments == ["--wait"]:
        arguments = _wait()
        if not arguments:
            return 0
    name, *rest = arguments
    if name not in MODULES:
        raise SystemExit(f"worker: expected one of {', '.join(MODULES)}; got {name!r}")
    context = Context([a for a in rest if a != "--smoke"], "--smoke" in rest)
    print(f"\n==== {name} {' '.join(rest)}", flush=True)
    try:
        result: bool = importlib.import_module(f".{name}", __package__).run(context)
    except Absent as reason:
        print(reason, flush=True)
        return ABSENT
    return 0 if result else 1


def _wait() -> list[str]:
    """Not this package, which the extension's part may build first; and nothing that touches the GPU."""
    with contextlib.suppress(Exception):
        import torch

        importlib.import_module("triton")
        if torch.version.cuda:  # a run without a GPU is short of processors, not of time
            importlib.import_module("torch._dynamo")
    line = sys.stdin.readline()
    if not line:
        return []  # the run is over
    task = json.loads(line)
    os.environ.update(task["environment"])
    with open(task["log"], "ab") as log:  # which has got its name since this process started
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    arguments: list[str] = task["arguments"]
    return arguments


def die_with_parent() -> None:
    """No process keeps a GPU after whoever started it was killed. Linux only."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
