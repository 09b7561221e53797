"""Builds the C++ extension in place, with this Python. The GPU's kernels do without; the tests that compare do not."""

from __future__ import annotations

import subprocess
import sys

from .context import Absent, Context
from .parts import REPOSITORY


def run(context: Context) -> bool:
    if context.smoke:
        raise Absent("a smoke run takes the extension that is there")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=REPOSITORY).returncode == 0
