"""compute-sanitizer over small calls of the kernels (`memcheck.py`), where it is installed.

Its memcheck watches every kernel; racecheck those in CUDA C++, whose blocks read each other's memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .context import Absent, Context
from .parts import ABSENT, REPOSITORY

_FOUND = 99


def run(context: Context) -> bool:
    """Argument: memcheck or racecheck."""
    (check,) = context.arguments
    script = _script("--cuda") if check == "racecheck" else _script()
    if context.smoke:
        return subprocess.run([*script, "--smoke"], cwd=REPOSITORY).returncode in (0, ABSENT)
    tool = _tool()
    if tool is None:
        raise Absent("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    command = [tool, "--tool", check, "--error-exitcode", str(_FOUND), "--print-limit", "20", *script]
    # Each tensor in an allocation of its own: a step beyond one is a step into no man's land, not into its neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=context.left() - 5).returncode
    except subprocess.TimeoutExpired:
        context.put("sanitizer", check, value={"tool": tool, "outcome": "not finished in its time"})
        return False
    if code == ABSENT:
        raise Absent(f"{check}: no CUDA C++ kernels run here")
    outcome = {0: "no errors", _FOUND: "errors: see the log"}.get(code, f"exit code {code}")
    context.put("sanitizer", check, value={"tool": tool, "outcome": outcome})
    context.say(f"{check}: {outcome}")
    return code == 0


def _script(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.memcheck", *arguments]


def _tool() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    found = shutil.which("compute-sanitizer")
    if found:
        return found
    for home in (CUDA_HOME, os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if home and (Path(home) / place).exists():
                return str(Path(home) / place)
    return None
