"""The C++ extension: the one that is in place or carried (`carried.py`), if it loads with its CUDA kernels; else built.

The GPU's Triton kernels do without it; CUDA C++ and the tests that compare with the CPU do not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from . import carried
from .context import Absent, Context
from .parts import REPOSITORY

_EXPLAIN = """
import json, torch, gspo_kernels
print(json.dumps(gspo_kernels.explain(torch.zeros(1, 1, 8, dtype=torch.bfloat16, device="cuda")).splitlines()))
"""


def run(context: Context) -> bool:
    if context.smoke:
        raise Absent("a smoke run takes the extension that is there")
    used = carried.use_extension()
    context.put("part", "extension", value=used)
    context.say(used)
    if used.startswith(("in place", "carried")):
        return True
    context.at("building")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    path = carried.installed()
    reason = carried.probe(path) if path.exists() else "no extension was built"
    context.put("part", "extension", value=f"built: {reason or 'with the CUDA kernels'}")
    if code == 0 and not reason:
        done = subprocess.run([sys.executable, "-c", _EXPLAIN], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode == 0:
            context.put("machine", "explain", value=json.loads(done.stdout.splitlines()[-1]))
    return code == 0 and not reason
