"""The processor, its memory and the GPUs. Nothing here fails where a system tells less than Linux does."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..linear.cpu_products import product_instructions
from ..rows import cpu_rows
from .findings import Gpu, Processor

# By what the kernel's /proc/cpuinfo calls them; of AVX-512 the kernels need four parts.
_INSTRUCTION_SETS = {
    "AVX2": {"avx2", "fma", "f16c"},
    "AVX-512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "AVX512-BF16": {"avx512_bf16"},
    "AMX-BF16": {"amx_bf16"},
    "NEON": {"asimd"},
    "SVE": {"sve"},
    "BF16": {"bf16"},
}
_CPUINFO = Path("/proc/cpuinfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def processor() -> Processor:
    kernels = products = None
    problem = chosen_by = ""
    if cpu_rows.unavailable_reason():
        problem = "none: the C++ extension does not run, see native"
    else:
        try:
            kernels, products = cpu_rows.instruction_set(), product_instructions()
            requested = os.environ.get("GSPO_KERNELS_ISA")
            chosen_by = f"GSPO_KERNELS_ISA={requested}" if requested else "the widest that this processor has"
        except ValueError as error:  # GSPO_KERNELS_ISA names none
            problem = str(error)
        except AttributeError as error:
            problem = f"the C++ extension was compiled from another version of this package ({error})"
    return Processor(
        model=processor_model(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        physical_cores=_physical_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        instruction_sets=_instruction_sets(),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        kernels=kernels,
        product_kernels=products,
        chosen_by=chosen_by,
        huge_pages=_huge_pages(),
        problem=problem,
    )


def processor_model() -> str:
    model = _of_cpuinfo("model name")
    if not model and sys.platform == "darwin":
        model = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return model or platform.processor() or platform.machine() or "unknown"


def memory_bytes() -> int:
    """All of it; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0


def available_bytes() -> int | None:
    """What programs may still take; None where the system does not tell."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def usable_cores() -> int:
    """The cores that this process may run on, or fewer where its container has a quota."""
    cores = len(_affinity())
    with contextlib.suppress(ValueError, ZeroDivisionError):
        quota, period = _lines(_QUOTA)[0].split() if _lines(_QUOTA) else ("max", "1")
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def gpus() -> tuple[Gpu, ...]:
    """Those that torch can use; equal ones once."""
    found: dict[tuple[str, str], list[int]] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.setdefault((properties.name, _capability(properties)), []).append(index)
    driver = _driver() if found else None
    return tuple(
        Gpu(
            name=name,
            device=f"cuda:{indices[0]}",
            count=len(indices),
            memory_bytes=torch.cuda.get_device_properties(indices[0]).total_memory,
            capability=capability,
            driver=driver,
        )
        for (name, capability), indices in found.items()
    )


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver finds a GPU, whatever torch was built for."""
    return "GPU 0" in _output("nvidia-smi", "--list-gpus")


def devices(found: tuple[Gpu, ...]) -> list[torch.device]:
    """The CPU, one GPU of each kind, and what else torch calls an accelerator, such as Apple's."""
    here = [torch.device("cpu"), *(torch.device(gpu.device) for gpu in found)]
    if not found and torch.accelerator.is_available():
        other = torch.accelerator.current_accelerator()
        here += [] if other is None or other.type == "cuda" else [other]
    return here


def _capability(properties: object) -> str:
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    major, minor = (getattr(properties, name, 0) for name in ("major", "minor"))
    return architecture.split(":")[0] or f"{major}.{minor}"


def _driver() -> str | None:
    if torch.version.hip:
        version = _lines(Path("/sys/module/amdgpu/version"))
        return f"amdgpu {version[0].strip()}" if version else None
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else None


def _instruction_sets() -> tuple[str, ...]:
    flags = set((_of_cpuinfo("flags") or _of_cpuinfo("Features")).split())
    return tuple(name for name, needed in _INSTRUCTION_SETS.items() if needed <= flags)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _physical_cores() -> int:
    """Cores of `_affinity`, each counted once although it runs two threads. As many as are usable, if that is fewer."""
    usable, cores = _affinity(), set[tuple[str, str]]()
    for each in _processors():
        if int(each.get("processor", "-1")) in usable and "core id" in each:
            cores.add((each.get("physical id", ""), each["core id"]))
    return min(len(cores) or len(usable), usable_cores())


def _processors() -> Iterator[dict[str, str]]:
    """The blocks of /proc/cpuinfo."""
    block: dict[str, str] = {}
    for line in [*_lines(_CPUINFO), ""]:
        name, colon, value = line.partition(":")
        if colon:
            block[name.strip()] = value.strip()
        elif block:
            yield block
            block = {}


def _of_cpuinfo(name: str) -> str:
    return next((block[name] for block in _processors() if name in block), "")


def _huge_pages() -> str | None:
    """The file lists all settings, the chosen one in brackets."""
    words = " ".join(_lines(_HUGE_PAGES)).split()
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there, fails or takes long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
