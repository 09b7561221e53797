"""What the numbers depend on: the GPU and its limits, driver, versions, commit, and which backend runs."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

import gspo_kernels

from ..results import commit, machine
from .context import Absent, Context

PACKAGES = ("triton", "liger-kernel", "trl", "transformers", "pytest", "hypothesis", "numpy", "pybind11", "ninja")
QUERY = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "ecc.mode.current", "mig.mode.current")


def run(context: Context) -> bool:
    about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": commit()}
    about |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    about["packages"] = {name: _version(name) for name in PACKAGES}
    if context.smoke:
        context.put("machine", value={"gpu": "smoke", **machine(), **about})
        return True
    if not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} sees no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    about |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "nvidia_smi": _nvidia_smi(),
        "gspo_kernels": gspo_kernels.__version__,
    }
    context.put("machine", value=about)  # before anything runs on the device
    text = gspo_kernels.explain(torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=context.device))
    context.put("machine", "explain", value=text.splitlines())
    context.say(f"{properties.name}, torch {torch.__version__}, triton {about['packages']['triton']}")
    context.say(text.splitlines()[0])
    return True


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _nvidia_smi() -> dict[str, str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = {}
    for field in QUERY:  # one at a time: an older tool refuses the whole line for one field it does not know
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [tool, "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            found[field] = answer.stdout.strip()
    return found
