"""compute-sanitizer's memcheck over a small call of every kernel (`memcheck.py`), where the tool is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .context import Absent, Context
from .parts import REPOSITORY

_FOUND = 99


def run(context: Context) -> bool:
    tool = _tool()
    if context.smoke:
        return subprocess.run(_script("--smoke"), cwd=REPOSITORY).returncode == 0
    if tool is None:
        raise Absent("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(_FOUND), "--print-limit", "20", *_script()]
    # Each tensor in an allocation of its own: a step beyond one is a step into no man's land, not into its neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=context.left() - 5).returncode
    except subprocess.TimeoutExpired:
        context.put("sanitizer", value={"tool": tool, "outcome": "not finished in its time"})
        return False
    outcome = {0: "no errors", _FOUND: "errors: see the log"}.get(code, f"exit code {code}")
    context.put("sanitizer", value={"tool": tool, "outcome": outcome})
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
